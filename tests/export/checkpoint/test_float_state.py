"""A float state_dict loads strictly into a quantized model in every state, and one comes out of it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.export.checkpoint.save_load import float_state_dict


class Net(nn.Module):
    """Layers of every family; weights tied, shared and parametrized."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(20, 8), nn.EmbeddingBag(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm1d(8), nn.ReLU()
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.instance = nn.InstanceNorm1d(8, affine=True, track_running_stats=True)
        self.rnn = nn.LSTM(8, 8, 2, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, kdim=8, vdim=6, add_bias_kv=True, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.again = self.normed
        self.head = nn.Linear(8, 20)
        self.head.weight = self.table.weight
        self.register_buffer("steps", torch.arange(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = (self.table(tokens) + self.bag(tokens).unsqueeze(1)).transpose(1, 2)
        y = self.instance(self.up(self.act(self.norm(self.conv(y))))).transpose(1, 2)
        z = self.rnn(y)[0]
        y = y + self.cell(z[:, 0], y[:, 0]).unsqueeze(1)
        y = self.encoder(self.attention(y, y, y[..., :6], need_weights=False)[0])
        return self.head(self.again(self.normed(self.bilinear(y, y))))


TOKENS = torch.arange(12).reshape(2, 6)
EMBEDDINGS = ["Embedding", "EmbeddingBag"]


def built(recipe: Any = "int8") -> Net:
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe, include=EMBEDDINGS):
        return Net().eval()


def calibrated(recipe: Any = "int8", make: Callable[[Any], Net] = built) -> Net:
    model = make(recipe)
    qp.calibrate(model, [TOKENS], progress=False)
    return model


def learned() -> Net:
    learning = qp.QuantDescriptor(learn_amax=True)
    each = qp.QuantDescriptor(axis="channel", learn_amax=True)
    model = calibrated(qp.Recipe(name="learned", input=learning, weight=each, output=learning))
    model.train()(TOKENS).sum().backward()
    return model


def prepared(recipe: Any) -> Net:
    model = built(recipe)
    assert qp.prepare(model, TOKENS).batchnorm.folded == {"norm": "conv"}
    return model


def prepared_for_tensorrt(recipe: Any) -> Net:
    model = built(recipe)
    qp.prepare(model, TOKENS, runtime="tensorrt")
    return model


def converted(recipe: Any) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    qp.convert(model, recipe=recipe, include=EMBEDDINGS)
    return model


def calibrating() -> Net:
    model = built()
    for quantizer in quantizers(model).values():
        quantizer.enable_calib()
    model(TOKENS)
    return model


def with_zero_points() -> Net:
    model = calibrated()
    assert any(qp.fit_zero_points(model, [TOKENS], least_gain=1.0).fitted.values())
    return model


def disabled() -> Net:
    model = calibrated()
    for quantizer in quantizers(model).values():
        quantizer.disable()
    return model


def with_folded_weights() -> Net:
    model = calibrated()
    assert qp.folded_weights(model).folded
    return model


def calibrated_in_inference_mode() -> Net:
    model = built()
    with torch.inference_mode():
        qp.calibrate(model, [TOKENS], progress=False)
    return model


def on_meta() -> Net:
    with torch.device("meta"):
        return built()


STATES: dict[str, Callable[[], Net]] = {
    "fresh": built,
    "training": lambda: built().train(),
    "calibrating": calibrating,
    "calibrated": calibrated,
    "blocks": lambda: calibrated("w4a8"),
    "learned ranges": learned,
    "zero points": with_zero_points,
    "prepared": lambda: prepared("int8"),
    "prepared and calibrated": lambda: calibrated(make=prepared),
    "prepared for TensorRT": lambda: calibrated(make=prepared_for_tensorrt),
    "disabled": disabled,
    "folded weights": with_folded_weights,
    "converted": lambda: calibrated(make=converted),
    "copied": lambda: copy.deepcopy(calibrated()),
    "half": lambda: calibrated().half(),
    "bfloat16": lambda: calibrated().bfloat16(),
    "inference mode": calibrated_in_inference_mode,
    "meta": on_meta,
}


def quantizers(model: nn.Module) -> dict[str, qp.TensorQuantizer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, qp.TensorQuantizer)}


def described(model: nn.Module) -> dict[str, Any]:
    return {name: (q.state, q.descriptor, q.format) for name, q in quantizers(model).items()}


def ranges(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: q.amax.detach().clone() for name, q in quantizers(model).items() if q.amax is not None}


def float_twin(model: nn.Module) -> nn.Module:
    """The float model of one: with its batch norm folded if that is."""
    torch.manual_seed(1)
    twin = Net().eval()
    if isinstance(model.norm, nn.Identity):
        qp.fold_batchnorm(twin, TOKENS)
    return twin


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_a_float_state_dict_loads_strictly_in_every_state_and_leaves_it(state: str, assign: bool) -> None:
    model = STATES[state]()
    torch.manual_seed(1)
    checkpoint = Net().state_dict()
    before, known = described(model), ranges(model)
    if state == "meta" and not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(checkpoint, strict=True, assign=assign)
    assert described(model) == before
    assert ranges(model).keys() == known.keys()
    assert all(torch.equal(amax, known[name]) for name, amax in ranges(model).items())
    held = float_state_dict(model)
    for key, value in float_twin(model).state_dict().items():
        torch.testing.assert_close(held[key], value.to(held[key].dtype), rtol=0, atol=0)


@pytest.mark.parametrize("state", STATES)
def test_a_float_state_dict_of_every_state_loads_strictly_into_the_float_model(state: str) -> None:
    model = STATES[state]()
    found = float_state_dict(model)
    twin = float_twin(model)
    expected = twin.state_dict()
    assert list(found) == list(expected)
    # The versions by which torch tells older checkpoints.
    assert expected._metadata.items() <= found._metadata.items()
    assert not any("quantizer" in name for name in found._metadata)
    if state == "meta":
        assert all(value.is_meta for value in found.values() if value.dtype.is_floating_point)
        return
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert all(torch.equal(v, found[k].to(v.dtype)) for k, v in twin.state_dict().items())
