"""Unsigned formats: ranges are those of the values that they can hold, and the others are told of."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.calibrators import BUILTIN_CALIBRATORS
from quantpatch.errors import CalibrationError
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import Blocked, Integer

UINT8 = Integer(8, unsigned=True)


def with_a_negative_tail(count: int = 4000, lowest: float = -50.0) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.cat([torch.rand(count - 40) * 2, torch.linspace(lowest, -0.1, 40)])


@pytest.mark.parametrize("method", sorted(BUILTIN_CALIBRATORS))
def test_negative_values_do_not_widen_an_unsigned_range(method: str) -> None:
    x = with_a_negative_tail()
    model = qp.TensorQuantizer(qp.QuantDescriptor(unsigned=True))
    with pytest.warns(qp.QuantPatchWarning, match=r"1\.00% of the values, down to -50"):
        qp.calibrate(model, [x], method=method, progress=False)
    alone = qp.TensorQuantizer(qp.QuantDescriptor(unsigned=True))
    qp.calibrate(alone, [x.clamp(min=0)], method=method, progress=False)
    assert torch.equal(model.amax, alone.amax)
    assert model.amax <= 2.0


@pytest.mark.parametrize("method", sorted(BUILTIN_CALIBRATORS))
def test_nor_that_of_a_channel_of_a_weight(method: str) -> None:
    recipe = qp.Recipe(name="r", input=None, weight=qp.QuantDescriptor(unsigned=True, axis="channel"))
    with qp.quantize_modules(recipe=recipe):
        layer = nn.Linear(64, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(3, 64))
        layer.weight[1, ::16] = -8.0
    with pytest.warns(qp.QuantPatchWarning, match=r"weight_quantizer: 2\.08% .*, down to -8.*unsigned=False"):
        qp.calibrate(layer, [torch.randn(2, 64)], weight_method=method, progress=False)
    assert (layer.weight_quantizer.amax <= 1.0).all()


def test_the_warning_names_each_quantizer_and_a_signed_one_gets_a_zero_point() -> None:
    unsigned, signed = qp.QuantDescriptor(unsigned=True), qp.QuantDescriptor()
    x = with_a_negative_tail(lowest=-0.5)
    with pytest.warns(qp.QuantPatchWarning, match=r" 0: .*; 1: .*zero_points=True") as told:
        qp.calibrate(
            nn.Sequential(*(qp.TensorQuantizer(d) for d in (unsigned, unsigned, signed))), [x], progress=False
        )
    assert "2: " not in str(told[0].message)
    model = nn.Sequential(qp.TensorQuantizer(signed))
    qp.calibrate(model, [x], zero_points=True, progress=False)  # as the warning advises, and nothing is told
    assert model[0].zero_point == pytest.approx(51, abs=1)


def test_by_hand_it_is_reported_too() -> None:
    quantizer = qp.TensorQuantizer(qp.QuantDescriptor(unsigned=True))
    quantizer.enable_calib()
    quantizer(torch.tensor([-1.0, 3.0]))
    quantizer(torch.tensor([2.0, 1.0]))
    with pytest.warns(qp.QuantPatchWarning, match=r"25\.00% of the values, down to -1"):
        quantizer.load_calib_amax()
    assert quantizer.amax == 3.0


def test_data_that_is_all_negative_is_an_error_that_says_so() -> None:
    model = nn.Sequential(qp.TensorQuantizer(qp.QuantDescriptor(unsigned=True)))
    with pytest.raises(CalibrationError, match=r"only zeros: 0; .*negative values as well.*unsigned=False"):
        qp.calibrate(model, [-torch.rand(8)], progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_an_error_still(value: float) -> None:
    model = nn.Sequential(qp.TensorQuantizer(qp.QuantDescriptor(unsigned=True)))
    with pytest.raises(CalibrationError, match=r"1 of the 3 values .* NaN or infinite"):
        qp.calibrate(model, [torch.tensor([-1.0, value, 1.0])], progress=False)


def test_nothing_is_reported_where_nothing_is_negative_or_numbers_are_signed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qp.calibrate(qp.TensorQuantizer(qp.QuantDescriptor(unsigned=True)), [torch.rand(9)], progress=False)
        qp.calibrate(qp.TensorQuantizer(qp.QuantDescriptor()), [torch.randn(9)], progress=False)


def test_a_range_of_the_tensor_itself_is_that_of_what_it_holds() -> None:
    x = torch.tensor([[-10.0, 1.0, 0.5], [-3.0, 2.0, -7.0]])
    assert torch.equal(fake_quantize(x, None, UINT8), fake_quantize(x, torch.tensor(2.0), UINT8))
    own = torch.tensor([[1.0], [2.0]])
    assert torch.equal(fake_quantize(x, None, UINT8, axis=0), fake_quantize(x, own, UINT8, axis=0))
    blocks = Blocked(Integer(4, unsigned=True), 3)
    assert torch.equal(fake_quantize(x, None, blocks), fake_quantize(x, own, blocks))
