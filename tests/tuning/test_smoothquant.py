"""SmoothQuant leaves float outputs as they are and makes quantized ones better."""

from __future__ import annotations

import copy
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantpatch as qp
from quantpatch.errors import ArgumentError, CheckpointError
from quantpatch.layers.input_factor import _multiplied
from quantpatch.tuning import Tuner, Tuning
from quantpatch.tuning.smoothquant import smoothing


class Block(nn.Module):
    """A block of a transformer, of whose norm some channels are much larger than others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.norm2 = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        with torch.no_grad():
            for norm in (self.norm, self.norm2):
                norm.weight[::5] *= 40

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def error(model: nn.Module, data: list[Tensor], wanted: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - y).square().sum()) for x, y in zip(data, wanted, strict=True))


@pytest.mark.parametrize("calibrated", [False, True])
def test_quantized_outputs_are_nearer_and_float_ones_as_they_were(calibrated: bool) -> None:
    model = Block().eval()
    data = [torch.randn(4, 6, 16) for _ in range(3)]
    wanted = [model(x).detach() for x in data]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qp.convert(model, "int8")
    if calibrated:
        qp.calibrate(model, data)
        plain = error(model, data, wanted)
    report = qp.tune(model, data, method="smoothquant", at_runtime=False)
    assert {"q.weight", "k.weight", "v.weight", "up.weight"} <= set(report.tuned)
    assert "gelu" in str(report.skipped["down.weight"])
    assert all(tuned.after < tuned.before for tuned in report.tuned.values())
    if calibrated:
        assert error(model, data, wanted) < plain
    assert model.q.input_quantizer.amax is not None
    with qp.quantized(nn.Sequential(nn.Linear(2, 2))):
        for quantizer in (m for m in model.modules() if isinstance(m, qp.TensorQuantizer)):
            quantizer.disable()
        for x, y in zip(data, wanted, strict=True):
            torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-4)
    qp.revert(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_alpha_shares_what_is_large_between_activations_and_weights() -> None:
    x, w = torch.tensor([8.0, 2.0, 0.0]), torch.tensor([2.0, 2.0, 3.0])
    torch.testing.assert_close(smoothing(x, w, 0.5), torch.tensor([2.0, 1.0, 1.0]))
    torch.testing.assert_close(smoothing(x, w, 1.0), torch.tensor([8.0, 2.0, 1.0]))
    model = Block().eval()
    qp.convert(model, "int8")
    with pytest.raises(ArgumentError, match="alpha=2"):
        qp.tune(model, [torch.randn(2, 3, 16)], method="smoothquant", alpha=2)


def test_ranges_that_were_known_are_found_anew_for_what_changed_alone() -> None:
    model = Block().eval()
    data = [torch.randn(4, 6, 16) for _ in range(2)]
    qp.convert(model, "int8")
    qp.calibrate(model, data, method="percentile", percentile=90.0)
    known = model.down.input_quantizer.amax.clone()
    narrow = model.up.input_quantizer.amax.clone()
    qp.tune(model, data, method="smoothquant", alpha=0.5, at_runtime=False)
    assert torch.equal(model.down.input_quantizer.amax, known)
    assert not torch.equal(model.up.input_quantizer.amax, narrow)


def test_rounded_weights_are_left() -> None:
    model = Block().eval()
    data = [torch.randn(4, 6, 16) for _ in range(2)]
    qp.convert(model, "w4a8")
    qp.tune(model, data, method="gptq")
    weight = model.q.weight.detach().clone()
    report = qp.tune(model, data, method="smoothquant", alpha=0.5)
    assert torch.equal(model.q.weight, weight)
    assert "gptq has rounded it already" in str(report.skipped["q.weight"])


class PostNorm(nn.Module):
    """As in BERT: what a norm gives is also in the residual, and no factor can go into it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.conv = nn.Conv1d(5, 4, 3)
        with torch.no_grad():
            self.norm.weight[::5] *= 40

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.conv(F.gelu(self.norm2(x + self.down(F.gelu(self.up(x))))))


def test_a_layer_multiplies_what_it_is_given_where_nothing_before_it_can() -> None:
    model = PostNorm().eval()
    data = [torch.randn(4, 5, 16) for _ in range(3)]
    wanted = [model(x).detach() for x in data]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qp.convert(model, "int8")
    qp.calibrate(model, data)
    plain = error(model, data, wanted)
    report = qp.tune(model, data, method="smoothquant")
    assert report.tuned["up.weight"].note == "with a factor at runtime"
    assert error(model, data, wanted) < plain
    assert type(model.up).__name__ == "QuantLinear"
    twin = copy.deepcopy(model)
    assert torch.equal(twin(data[0]), model(data[0]))
    qp.revert(twin)
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())
    assert torch.equal(twin(data[0]), wanted[0])
    with pytest.raises(CheckpointError, match="Revert a copy"):
        qp.float_state_dict(model)


def test_a_convolution_is_given_factors_for_its_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        model[0].weight[::3] *= 50
    data = [torch.randn(2, 3, 9, 9) for _ in range(2)]
    wanted = model(data[0]).detach()
    qp.convert(model, "int8")
    report = qp.tune(model, data, method="smoothquant", alpha=0.5)
    assert report.tuned["2.weight"].note == "with a factor at runtime"
    assert model[2].input_factor.factor.shape == (8, 1, 1)
    for quantizer in (m for m in model.modules() if isinstance(m, qp.TensorQuantizer)):
        quantizer.disable()
    torch.testing.assert_close(model(data[0]), wanted, atol=1e-3, rtol=1e-3)


def test_factors_are_saved_and_loaded(tmp_path: Path) -> None:
    model = PostNorm().eval()
    data = [torch.randn(4, 5, 16) for _ in range(2)]
    qp.convert(model, "int8")
    qp.tune(model, data, method=["smoothquant", "gptq"])
    qp.save(model, tmp_path / "smooth.safetensors", packed=True)
    loaded = qp.load(PostNorm().eval(), tmp_path / "smooth.safetensors")
    assert torch.equal(loaded(data[0]), model(data[0]))
    # Into one that has factors of its own, and back into one that is to have none.
    qp.load(model, tmp_path / "smooth.safetensors")
    assert torch.equal(loaded(data[0]), model(data[0]))
    plain = PostNorm().eval()
    qp.convert(plain, "int8")
    qp.calibrate(plain, data)
    qp.save(plain, tmp_path / "plain.safetensors")
    qp.load(model, tmp_path / "plain.safetensors")
    assert torch.equal(plain(data[0]), model(data[0]))


def test_a_model_with_factors_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = PostNorm().eval()
    data = [torch.randn(4, 5, 16) for _ in range(2)]
    qp.convert(model, "int8", skip=["Conv1d"])
    qp.tune(model, data, method=["smoothquant", "gptq"], calibration={"method": "max"})
    qp.export_onnx(model, (data[0],), tmp_path / "smooth.onnx")  # which compares it with the model


def test_without_factors_at_runtime_such_layers_are_named() -> None:
    model = PostNorm().eval()
    qp.convert(model, "int8")
    report = qp.tune(model, [torch.randn(4, 5, 16)], method="smoothquant", at_runtime=False)
    assert report.tuned == {}
    assert "native_layer_norm" in str(report.skipped["up.weight"])


def test_an_interrupt_takes_factors_back() -> None:
    model = PostNorm().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qp.convert(model, "int8")

    @attrs.frozen
    class Interrupt(Tuner):
        def tune(self, tuning: Tuning) -> None:
            assert model.up.input_factor is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qp.tune(model, [torch.randn(4, 5, 16)], method=["smoothquant", Interrupt()])
    assert not hasattr(model.up, "input_factor")
    assert _multiplied not in model.up._forward_pre_hooks.values()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
