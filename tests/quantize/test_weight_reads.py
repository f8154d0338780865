"""Layers whose weight a forward reads itself: calibration goes on and names them, not so where none ran."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantpatch as qp
from quantpatch.errors import CalibrationError, QuantPatchWarning


class Reading(nn.Module):
    """Computes with a projection's weight and a bias of its own."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.project = nn.Linear(width, width, bias=False)
        self.shift = nn.Parameter(torch.ones(width))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.linear(x, self.project.weight, self.shift))


class QuantReading(qp.QuantizedLayer, Reading):
    operations = {F.linear: ("x", "projection", None)}


class Tied(nn.Module):
    """A head that never runs, whose weight is another layer's as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embedding(x)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def built(make: type[nn.Module], **options: object) -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules(**options):  # type: ignore[arg-type]
        return nn.Sequential(make()).eval()


def off(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, qp.TensorQuantizer) and m.disabled]


@pytest.mark.parametrize("data", [[X, X], lambda model: model(X)])
def test_calibration_goes_on_where_a_forward_reads_a_weight_and_the_layer_is_named(data) -> None:
    model = built(Reading)
    with pytest.warns(QuantPatchWarning, match=r"1 layers never run.*0\.project \(in 0\)"):
        qp.calibrate(model, data, progress=False)
    assert off(model) == ["0.project.input_quantizer", "0.project.weight_quantizer"]
    assert model[0].out.input_quantizer.amax is not None
    (row,) = [row for row in qp.audit(model, X).rows if not row.quantized]
    assert "reads the weight of 0.project itself" in row.reason


def test_what_the_layers_saw_is_not_seen_twice() -> None:
    calls = []
    model = built(Reading)
    model[0].out.register_forward_hook(lambda *_: calls.append(model[0].out.input_quantizer.calibrating))
    with pytest.warns(QuantPatchWarning, match="never run"), qp.calibrating(model):
        model(X)
    assert calls == [True, False]


def test_a_replacement_that_quantizes_the_weight_it_reads_needs_no_warning() -> None:
    model = built(Reading, custom=[(__name__, "Reading", QuantReading)])
    qp.calibrate(model, [X], progress=False)
    assert off(model) == ["0.project.input_quantizer", "0.project.weight_quantizer"]
    assert qp.audit(model, X).share == 1.0


def test_a_layer_that_is_not_reached_is_an_error_beside_one_whose_weight_is_read() -> None:
    class Unused(Reading):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(6, 6)

    model = built(Unused)
    with pytest.raises(CalibrationError, match="saw no data") as caught:
        qp.calibrate(model, [X], progress=False)
    assert caught.value.quantizers == ("0.spare.input_quantizer", "0.spare.weight_quantizer")
    assert off(model) == []
    assert model[0].out.input_quantizer.amax is None


def test_a_tied_weight_is_read_by_the_layer_that_has_it_too() -> None:
    model = built(Tied)
    with pytest.raises(CalibrationError, match=r"head\.input_quantizer"):
        qp.calibrate(model, [torch.arange(9)], progress=False)


def test_the_random_state_and_the_modes_are_as_without_it() -> None:
    model = built(Reading).train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with pytest.warns(QuantPatchWarning, match="never run"):
        qp.calibrate(model, [X], progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert all(module.training for module in model.modules())
