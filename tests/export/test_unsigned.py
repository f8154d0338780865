"""use_unsigned: ranges that data shows to be never negative."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.export import use_unsigned

X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def calibrated() -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    qp.calibrate(model, [X], progress=False)
    return model


def test_ranges_that_were_never_negative_become_unsigned() -> None:
    model = calibrated()
    before = model(X)
    amax = model[0].input_quantizer.amax
    assert use_unsigned(model, [X]) == ("0.input_quantizer",)
    quantizer = model[0].input_quantizer
    assert quantizer.format.name == "uint8"
    assert torch.equal(quantizer.amax, amax)
    assert not torch.equal(model(X), before)
    assert use_unsigned(model, lambda m: m(X)) == ()


def test_data_that_reaches_nothing() -> None:
    with pytest.raises(ExportError, match="reached none"):
        use_unsigned(calibrated(), [])


def test_batches_of_each_kind() -> None:
    for batch in ((X,), {"input": X}, X):
        assert use_unsigned(calibrated(), [batch])
