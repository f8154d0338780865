"""Zero points: which one fits, and what calibrators see of ranges that have one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.numerics.affine import fitted_zero_point, longer_side, magnitudes, upper_end
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS, Integer
from quantpatch.recipes.descriptor import QuantDescriptor


@given(
    low=st.one_of(st.just(0.0), st.floats(-1e6, -1e-6)),
    high=st.one_of(st.just(0.0), st.floats(1e-6, 1e6)),
    bits=st.integers(2, 8),
)
def test_a_fitted_range_reaches_both_ends_within_half_a_step_and_has_the_steps_for_them(low, high, bits):
    zero_point, amax = fitted_zero_point(low, high, bits)
    number_format = Integer(bits, unsigned=True, zero_point=zero_point)
    scale = amax / number_format.max
    assert number_format.max * scale >= high - 0.5001 * scale
    assert number_format.min * scale <= low + 0.5001 * scale
    # One step more than the interval has, where that lies below 0 alone.
    assert scale <= (high - low) / (2**bits - 2) * 1.0001
    if high - low:
        ends = torch.tensor([low, high])
        error = fake_quantize(ends, torch.tensor(amax), number_format) - ends
        assert error.abs().max() <= 0.501 * scale


def test_the_usual_cases():
    assert fitted_zero_point(0.0, 7.0, 8) == (0, 7.0)
    assert fitted_zero_point(-1.0, 1.0, 8)[0] == 128  # of two that are as good the even one
    assert fitted_zero_point(-85.0, 170.0, 8) == (85, 170.0)
    assert fitted_zero_point(-254.0, 0.0, 8) == (254, 1.0)
    assert fitted_zero_point(0.0, 0.0, 8) == (0, 0.0)


@pytest.mark.parametrize("zero_point", [1, 85, 128, 254])
def test_magnitudes_are_what_the_longer_side_must_reach(zero_point):
    number_format = Integer(8, unsigned=True, zero_point=zero_point)
    side = longer_side(number_format)
    assert side.max == max(number_format.max, -number_format.min)
    scale = 0.1
    values = torch.tensor([number_format.max, 1.0, number_format.min, -1.0], dtype=torch.bfloat16) * scale
    found = magnitudes(values, number_format)
    assert (found.dtype, (found >= 0).all()) == (torch.float32, True)
    # Both ends of the range need the whole of the longer side, which leads back to its upper end.
    ends = found[[0, 2]]
    torch.testing.assert_close(ends, torch.full((2,), side.max * scale), rtol=0.01, atol=0)
    torch.testing.assert_close(
        upper_end(ends, number_format), torch.full((2,), number_format.max * scale), rtol=0.01, atol=0
    )


@pytest.mark.parametrize("name", BUILTIN_FORMATS)
def test_formats_without_a_zero_point_are_left_alone(name):
    number_format, x = BUILTIN_FORMATS[name], torch.randn(5)
    assert longer_side(number_format) is number_format
    # What unsigned ones cannot hold is none of their range's business.
    assert torch.equal(magnitudes(x, number_format), x if number_format.min < 0 else x.clamp(min=0))
    assert upper_end(x, number_format) is x


@pytest.mark.parametrize("method", ["max", "mse", "entropy", "percentile", "sqnr", "moving_average"])
@pytest.mark.parametrize("zero_point", [20, 235])
def test_calibrators_find_the_range_of_a_format_with_a_zero_point(zero_point, method):
    number_format = Integer(8, unsigned=True, zero_point=zero_point)
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)).abs() * 10
    x = torch.where(torch.arange(20000) % 10 == 0, -0.01 * x, x)  # a little below 0, and far above
    x = x if zero_point == 20 else -x
    quantizer = TensorQuantizer(QuantDescriptor(unsigned=True, zero_point=zero_point, calib_method=method))
    quantizer.enable_calib()
    quantizer(x)
    quantizer.load_calib_amax()
    longer = quantizer.amax * max(1.0, -number_format.lower_end)
    assert 0.5 * x.abs().max() < longer <= x.abs().max() * 1.0001
    quantizer.disable_calib()
    error = (quantizer(x) - x).square().mean()
    symmetric = TensorQuantizer(QuantDescriptor(amax=longer.item()))
    assert error < 0.5 * (symmetric(x) - x).square().mean()
