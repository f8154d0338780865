"""Whole networks, built in a block and converted: how much runs quantized, and what never changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.layers.operands import Add, Cat


class Residual(nn.Module):
    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.skip = nn.Conv2d(inside, outside, 1, stride) if stride > 1 else nn.Identity()
        self.add = Add()

    def forward(self, x):
        return torch.relu(self.add(self.body(x), self.skip(x)))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.MaxPool2d(2),
        Residual(8, 8),
        Residual(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


class Inverted(nn.Module):
    """MobileNet's block: widen, depthwise, squeeze and excite, narrow."""

    def __init__(self, width, expand):
        super().__init__()
        wide = width * expand
        self.widen = nn.Sequential(nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide, 1), nn.Hardsigmoid())
        self.narrow = nn.Conv2d(wide, width, 1)

    def forward(self, x):
        y = self.depthwise(self.widen(x))
        return x + self.narrow(y * self.gate(y))


def mobilenet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        Inverted(8, 2),
        Inverted(8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")
        self.bottom = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.cat = Cat(1)
        self.out = nn.Conv2d(16, 1, 1)

    def forward(self, x):
        skip = torch.relu(self.down(x))
        return self.out(self.cat([skip, self.up(torch.relu(self.bottom(skip)))]))


class LanguageModel(nn.Module):
    """An LSTM with tied embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.rnn = nn.LSTM(16, 16, 2, batch_first=True)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.rnn(self.embedding(ids))[0])


def transformer():
    return nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)


GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(2, 3, 16, 16, generator=GENERATOR)
IDS = torch.randint(0, 50, (2, 7), generator=GENERATOR)
SOURCE, GOAL = torch.randn(2, 5, 16, generator=GENERATOR), torch.randn(2, 4, 16, generator=GENERATOR)

WITH_HIDDEN = qp.Recipe(name="int8 with hidden states", hidden=qp.QuantDescriptor())

# How to build it, its inputs, and the share that runs quantized. The LSTM's hidden state never leaves the
# fused kernel, so half of its work keeps a float operand unless the recipe asks for it.
MODELS = {
    "resnet": (resnet, (IMAGES,), 1.0),
    "mobilenet": (mobilenet, (IMAGES,), 1.0),
    "unet": (UNet, (IMAGES,), 1.0),
    "lstm language model": (LanguageModel, (IDS,), (2 * 16 * 64 + 16 * 50) / (4 * 16 * 64 + 16 * 50)),
    "transformer": (transformer, (SOURCE, GOAL), 1.0),
}


@pytest.fixture(params=MODELS)
def case(request):
    build, inputs, share = MODELS[request.param]
    torch.manual_seed(0)
    reference = build().eval()
    with qp.quantize_modules():
        built = build().eval()
    built.load_state_dict(reference.state_dict())
    converted = copy.deepcopy(reference)
    qp.convert(converted)
    return reference, (built, converted), inputs, share


def run(model, inputs):
    """In the open: without gradients torch would take its fast path in the float model."""
    return model(*inputs)


def test_the_share_that_runs_quantized_is_the_same_built_or_converted(case):
    _, models, inputs, share = case
    for model in models:
        assert qp.audit(model, *inputs).share == pytest.approx(share)


def test_a_language_model_with_its_hidden_states_quantized_is_covered_whole():
    torch.manual_seed(0)
    reference = LanguageModel().eval()
    with qp.quantize_modules(recipe=WITH_HIDDEN):
        built = LanguageModel().eval()
    built.load_state_dict(reference.state_dict())
    converted = copy.deepcopy(reference)
    qp.convert(converted, recipe=WITH_HIDDEN)
    for model in (built, converted):
        report = qp.audit(model, IDS)
        assert report.share == 1.0
        assert report.unreached == ()
        for module in model.modules():
            if isinstance(module, qp.TensorQuantizer):
                module.disable()
        assert torch.equal(model(IDS), reference(IDS))


def test_disabled_quantizers_give_the_float_result_bit_for_bit(case):
    reference, models, inputs, _ = case
    expected = run(reference, inputs)
    for model in models:
        assert not torch.equal(run(model, inputs), expected)
        for module in model.modules():
            if isinstance(module, qp.TensorQuantizer):
                module.disable()
        assert torch.equal(run(model, inputs), expected)


def test_it_calibrates_copies_and_pickles(case):
    _, (built, converted), inputs, _ = case
    for model in (built, converted):
        qp.calibrate(model, [inputs])
    assert torch.equal(run(built, inputs), run(converted, inputs))
    for twin in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert torch.equal(run(twin, inputs), run(built, inputs))


def test_a_training_step_reaches_every_parameter(case):
    _, (built, _), inputs, _ = case
    run(built.train(), inputs).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in built.parameters())
