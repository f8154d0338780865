"""SmoothQuant leaves float outputs as they are and makes quantized ones better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantpatch as qp
from quantpatch.errors import ArgumentError
from quantpatch.tune.smoothquant import smoothing


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
    report = qp.tune(model, data, method="smoothquant")
    assert {"q.weight", "k.weight", "v.weight", "up.weight"} <= set(report.tuned)
    assert "gelu" in str(report.skipped["down.weight"])
    assert all(tuned.after < tuned.before for tuned in report.tuned.values())
    if calibrated:
        assert error(model, data, wanted) < plain
        assert model.q.input_quantizer.amax is not None
    else:
        assert model.q.input_quantizer.amax is None
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
    qp.tune(model, data, method="smoothquant", alpha=0.5)
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
