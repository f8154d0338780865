"""Quantizers where integer kernels want them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.export.placement import quantize_conv_outputs, use_unsigned


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        return self.last(self.second(y) - 1.0)


def built(recipe: str = "int8") -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        return Residual().eval()


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_only_outputs_that_nothing_else_quantizes() -> None:
    model = built()
    assert quantize_conv_outputs(model) == ("second.output_quantizer",)
    assert quantize_conv_outputs(model) == ()
    qp.calibrate(model, [X], progress=False)
    assert model.second.output_quantizer.amax is not None


def test_float_activations_get_none() -> None:
    assert quantize_conv_outputs(built("int8-weight-only")) == ()


def test_parts_of_a_model_that_cannot_be_traced() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Residual()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x) if x.sum() > 0 else x

    with qp.quantize_modules():
        model = Branching()
    assert quantize_conv_outputs(model) == ("part.second.output_quantizer",)


def test_ranges_that_were_never_negative_become_unsigned() -> None:
    model = built()
    qp.calibrate(model, [X], progress=False)
    before = model(X)
    amax = model.second.input_quantizer.amax
    assert use_unsigned(model, [X]) == ("second.input_quantizer",)
    quantizer = model.second.input_quantizer
    assert quantizer.format.name == "uint8"
    assert torch.equal(quantizer.amax, amax)
    assert not torch.equal(model(X), before)
    assert use_unsigned(model, lambda m: m(X)) == ()


def test_data_that_reaches_nothing() -> None:
    model = built()
    qp.calibrate(model, [X], progress=False)
    with pytest.raises(ExportError, match="reached none"):
        use_unsigned(model, [])


def test_batches_of_each_kind() -> None:
    for batch in ((X,), {"x": X}, X):
        model = built()
        qp.calibrate(model, [X], progress=False)
        assert use_unsigned(model, [batch])
