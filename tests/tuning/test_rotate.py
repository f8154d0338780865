"""Rotations are folded into neighbours where they cancel, and leave float outputs as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantpatch as qp
from quantpatch.tuning.rotate import hadamard

W8A4 = qp.recipe("int8").replace(name="w8a4", input=qp.QuantDescriptor(num_bits=4))


class Attention(nn.Module):
    """Heads of 8 features, of whose values one is much larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.v.weight[::8] *= 30

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.down(F.relu(self.up(y)))


def error(model: nn.Module, data: list[Tensor], wanted: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - y).square().sum()) for x, y in zip(data, wanted, strict=True))


def without_quantizers(model: nn.Module, x: Tensor) -> Any:
    qp.configure(model, {"*": None})
    return model(x)


def test_a_hadamard_matrix_is_orthogonal_with_entries_of_one_size() -> None:
    matrix = hadamard(16)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16))
    torch.testing.assert_close(matrix.abs(), torch.full((16, 16), 0.25))


def test_values_of_attention_are_mixed_within_their_heads() -> None:
    model = Attention().eval()
    data = [torch.randn(4, 6, 32) for _ in range(2)]
    wanted = [model(x).detach() for x in data]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qp.convert(model, W8A4)
    qp.calibrate(model, data)
    report = qp.tune(model, data, method="rotate")
    assert set(report.tuned) >= {"o.weight"}
    assert report.tuned["o.weight"].after < report.tuned["o.weight"].before
    assert "linear operators alone" in str(report.skipped["down.weight"])
    assert not torch.equal(model.v.weight, before["v.weight"])
    rotated = (model.v.weight.detach() @ before["v.weight"].T).unflatten(0, (4, 8)).unflatten(-1, (4, 8))
    assert rotated.isfinite().all()
    torch.testing.assert_close(without_quantizers(model, data[0]), wanted[0], atol=1e-3, rtol=1e-3)
    qp.revert(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_that_follow_on_each_other_are_rotated_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight[3] *= 40
    data = [torch.randn(64, 8) for _ in range(2)]
    wanted = [model(x).detach() for x in data]
    qp.convert(model, W8A4)
    qp.calibrate(model, data)
    plain = error(model, data, wanted)
    report = qp.tune(model, data, method="rotate")
    assert list(report.tuned) == ["1.weight"]
    assert error(model, data, wanted) < plain
    torch.testing.assert_close(without_quantizers(model, data[0]), wanted[0], atol=1e-4, rtol=1e-4)
