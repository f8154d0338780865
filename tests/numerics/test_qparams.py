"""What calibrators see of ranges that have a zero point."""

import math

import pytest
import torch

from quantpatch.errors import ArgumentError
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.numerics.fake_quant import fake_quantize, quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS, Integer
from quantpatch.numerics.qparams import QParams, of_longer_side
from quantpatch.recipes.descriptor import QuantDescriptor


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("zero_point", [1, 85, 128, 254])
def test_magnitudes_are_what_the_longer_side_must_reach(zero_point, as_tensor):
    q = QParams(Integer(8), None, zero_point=zero_point)
    high, side = q.max(), q._replace(zero_point=of_longer_side(zero_point, 8)).max()
    assert side == q.longer_side() == max(q.max(), -q.min())
    scale = 0.1
    values = torch.tensor([q.max(), 1.0, q.min(), -1.0], dtype=torch.bfloat16) * scale
    numbers = q.magnitudes(values)
    if as_tensor:
        q = q._replace(zero_point=torch.tensor(zero_point, dtype=torch.uint8))
    found = q.magnitudes(values)
    assert torch.equal(found, numbers)
    assert (found.dtype, (found >= 0).all()) == (torch.float32, True)
    # Both ends of the range need the whole of the longer side, which leads back to its upper end.
    ends = found[[0, 2]]
    torch.testing.assert_close(ends, torch.full((2,), side * scale), rtol=0.01, atol=0)
    torch.testing.assert_close(q.upper_end(ends), torch.full((2,), high * scale), rtol=0.01, atol=0)


def test_integers_from_0_on_hold_what_is_above_it_be_the_zero_point_a_number_or_a_tensor():
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0])
    for zero_point in (0, torch.tensor(0, dtype=torch.uint8)):
        q = QParams(Integer(8), None, zero_point=zero_point)
        assert q.magnitudes(x).tolist() == [0, 0, 0, 3]
        assert torch.equal(q.upper_end(x), x)
        assert (float(q.min()), float(q.max()), q.lower_end() == 0) == (0, 255, True)


@pytest.mark.parametrize("name", BUILTIN_FORMATS)
def test_formats_without_a_zero_point_are_left_alone(name):
    number_format, x = BUILTIN_FORMATS[name], torch.randn(5)
    # What unsigned ones cannot hold is none of their range's business.
    assert torch.equal(
        QParams(number_format, None).magnitudes(x), x if number_format.min < 0 else x.clamp(min=0)
    )
    assert QParams(number_format, None).upper_end(x) is x


@pytest.mark.parametrize("method", ["max", "mse", "entropy", "percentile", "sqnr", "moving_average"])
@pytest.mark.parametrize("zero_point", [20, 235])
def test_calibrators_find_the_range_of_a_format_with_a_zero_point(zero_point, method):
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)).abs() * 10
    x = torch.where(torch.arange(20000) % 10 == 0, -0.01 * x, x)  # a little below 0, and far above
    x = x if zero_point == 20 else -x
    quantizer = TensorQuantizer(QuantDescriptor(unsigned=True, zero_point=zero_point, method=method))
    quantizer.enable_calib()
    quantizer(x)
    quantizer.load_calib_amax()
    longer = quantizer.amax * max(1.0, -quantizer.qparams.lower_end())
    assert 0.5 * x.abs().max() < longer <= x.abs().max() * 1.0001
    quantizer.disable_calib()
    error = (quantizer(x) - x).square().mean()
    symmetric = TensorQuantizer(QuantDescriptor(amax=longer.item()))
    assert error < 0.5 * (symmetric(x) - x).square().mean()


@pytest.mark.parametrize(
    ("bits", "zero_point", "low", "high"), [(8, 37, -37, 218), (8, 254, -254, 1), (2, 1, -1, 2)]
)
@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_the_grid_has_as_many_steps_below_0_as_the_zero_point_says(bits, zero_point, low, high, kind):
    q = QParams(Integer(bits), None, zero_point=kind(zero_point))
    assert (float(q.min()), float(q.max())) == (low, high)
    ends = q.round_(torch.tensor([-math.inf, -1e38, 1e38, math.inf]))
    assert ends.tolist() == [low, low, high, high]


def test_with_128_as_the_zero_point_the_grid_is_that_of_int8():
    values = torch.linspace(-200, 200, 4001)
    expected = Integer(8).round_(values.clone())
    assert torch.equal(QParams(Integer(8), None, zero_point=128).round_(values), expected)


@pytest.mark.parametrize("zero_point", [255, -1, 3.0, True])
def test_impossible_ones_are_refused_and_the_error_names_the_field(zero_point):
    for function in (fake_quantize, quantize):
        with pytest.raises(ArgumentError, match="an integer from 0 to 254") as error:
            function(torch.ones(3), torch.tensor(1.0), Integer(8), zero_point=zero_point)
        assert error.value.argument == "zero_point"
        assert isinstance(error.value, TypeError) is (type(zero_point) is not int)


@pytest.mark.parametrize("name", ["fp8_e4m3", "int4_g32"])
def test_formats_other_than_integers_have_none(name):
    for amax in (torch.tensor(1.0), None):
        with pytest.raises(ArgumentError, match="only Integer formats have zero points"):
            fake_quantize(torch.ones(3), amax, BUILTIN_FORMATS[name], zero_point=torch.tensor(3))


@pytest.mark.parametrize("amax", [torch.tensor(0.8), torch.tensor([[0.8], [0.3]]), None])
@pytest.mark.parametrize("zero_point", [0, 1, 37, 128, 254])
def test_a_tensor_that_nobody_reads_gives_the_bits_of_the_number(zero_point, amax):
    x = torch.randn(2, 90, generator=torch.Generator().manual_seed(0))
    axis = None if amax is None or not amax.dim() else 0
    held = torch.tensor(zero_point, dtype=torch.uint8)

    def results(zero_point):
        leaf = x.clone().requires_grad_()
        y = fake_quantize(leaf, amax, Integer(8), axis=axis, zero_point=zero_point)
        return y, *torch.autograd.grad(y.sum(), leaf)

    expected = results(zero_point)
    assert all(map(torch.equal, results(held), expected))
    function = torch.vmap(
        lambda z: fake_quantize(x, amax, Integer(8), axis=axis, zero_point=z), randomness="same"
    )
    y = function(torch.stack([held, torch.full_like(held, 99)]))
    assert torch.equal(y[0], expected[0])
    assert not torch.equal(y[1], expected[0])


@pytest.mark.parametrize("zero_point", [0, 60, 250])
def test_a_learned_range_has_the_gradients_of_the_number_where_it_is_a_tensor(zero_point):
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))

    def gradients(x, amax, zero_point):
        def loss(x, amax):
            return fake_quantize(x, amax, Integer(8), zero_point=zero_point).square().sum()

        return torch.func.grad(loss, (0, 1))(x, amax)

    amax = torch.tensor(0.8)
    one, other = (gradients(x, amax, z) for z in (zero_point, torch.tensor(zero_point)))
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1])
