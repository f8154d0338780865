"""Whole networks, built in a block and converted: how much runs quantized, and what never changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quantpatch as qp
from quantpatch.layers import Add, Cat


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

HIDDEN = qp.Recipe(name="int8 with hidden states", hidden=qp.QuantDescriptor())

# How to build it, its inputs, the share that runs quantized, and the recipe. The LSTM's hidden state never
# leaves the fused kernel, so half of its work keeps a float operand unless the recipe asks for it.
MODELS = {
    "resnet": (resnet, (IMAGES,), 1.0, "int8"),
    "mobilenet": (mobilenet, (IMAGES,), 1.0, "int8"),
    "unet": (UNet, (IMAGES,), 1.0, "int8"),
    "lstm": (LanguageModel, (IDS,), (2 * 16 * 64 + 16 * 50) / (4 * 16 * 64 + 16 * 50), "int8"),
    "lstm with hidden states": (LanguageModel, (IDS,), 1.0, HIDDEN),
    "transformer": (transformer, (SOURCE, GOAL), 1.0, "int8"),
}


class Case:
    """A network in float, and quantized in both ways with the float one's weights, loaded strictly."""

    def __init__(self, name):
        build, self.inputs, self.share, self.recipe = MODELS[name]
        torch.manual_seed(0)
        self.reference = build().eval()
        with qp.quantize_modules(recipe=self.recipe):
            built = build().eval()
        converted = build().eval()
        qp.convert(converted, recipe=self.recipe)
        self.models = {"built": built, "converted": converted}
        for model in self.models.values():
            model.load_state_dict(self.reference.state_dict(), strict=True)

    def run(self, model):
        """With gradients, since torch would take its fast path in the float model without."""
        return model(*self.inputs)


@pytest.fixture(params=MODELS)
def case(request):
    return Case(request.param)


@pytest.fixture(params=["built", "converted"])
def way(request):
    return request.param


def disable(model):
    for module in model.modules():
        if isinstance(module, qp.TensorQuantizer):
            module.disable()


def test_the_share_that_runs_quantized_is_what_is_said_and_no_quantizer_is_missed(case, way):
    report = qp.audit(case.models[way], tuple(case.inputs))
    assert report.share == pytest.approx(case.share)
    assert (report.unreached, report.opaque, report.to_paste) == ((), (), "")


def test_multiply_accumulates_are_half_of_torchs_own_count_of_operations(case, way):
    model = case.models[way]
    report = qp.audit(model, tuple(case.inputs))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.run(model)
    fused = sum(row.macs for row in report.rows if row.operation.startswith("recurrent"))  # torch counts none
    assert report.macs - fused == counter.get_total_flops() // 2


def test_disabled_quantizers_give_the_float_result_bit_for_bit(case, way):
    model, expected = case.models[way], case.run(case.reference)
    assert not torch.equal(case.run(model), expected)
    disable(model)
    assert torch.equal(case.run(model), expected)


def test_both_ways_give_the_same_model(case):
    built, converted = case.models.values()
    assert [(n, type(m)) for n, m in built.named_modules()] == [
        (n, type(m)) for n, m in converted.named_modules()
    ]
    for model in (built, converted):
        qp.calibrate(model, [case.inputs])
    assert torch.equal(case.run(built), case.run(converted))


def test_calibrated_it_copies_and_pickles(case, way):
    model = case.models[way]
    qp.calibrate(model, [case.inputs])
    expected = case.run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.run(twin), expected)


def test_reverted_it_is_the_float_model(case, way):
    model = case.models[way]
    qp.calibrate(model, [case.inputs])
    qp.revert(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in case.reference.named_modules()
    ]
    assert list(model.state_dict()) == list(case.reference.state_dict())
    assert torch.equal(case.run(model), case.run(case.reference))


def test_a_training_step_reaches_every_parameter(case, way):
    model = case.models[way].train()
    case.run(model).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
