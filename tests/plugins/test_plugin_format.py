"""A number format of a plugin serves wherever a built-in one does."""

import attrs
import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.calibrators import BUILTIN_CALIBRATORS
from quantpatch.errors import UnknownNameError
from quantpatch.numerics.fake_quant import dequantize, fake_quantize, quantize
from quantpatch.numerics.formats import Blocked, NumberFormat


@attrs.frozen
class PowersOfTwo(NumberFormat):
    """0 and +-2**-3 .. 2**0, each standing for what is nearest to it on a scale of logarithms."""

    name = "powers_of_two"
    bits = 4
    max = 1.0

    def round_(self, y):
        exponent = torch.log2(y.abs().clamp_min(2.0**-20)).round_().clamp_(-3.0, 0.0)
        rounded = torch.exp2(exponent).copysign(y)
        rounded.masked_fill_(y.abs() < 2.0**-4, 0.0)
        return y.copy_(torch.where(y.isnan(), y, rounded))


FORMAT = PowersOfTwo()
DESCRIPTOR = qp.QuantDescriptor(format="powers_of_two")
RECIPE = qp.Recipe(
    name="log",
    input=DESCRIPTOR,
    weight=attrs.evolve(DESCRIPTOR, axis="channel"),
)


@pytest.fixture
def offered(plugin):
    return plugin("logarithms", formats={"powers_of_two": FORMAT}, recipes={"log": RECIPE})


def on_the_grid(x, scale):
    v = (x / scale).abs()
    return bool(((v == 0) | ((v.log2().round() - v.log2()).abs() < 1e-5) & (v > 0.12) & (v < 1.01)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_it_rounds_and_has_the_straight_through_gradient(dtype, axis):
    x = torch.randn(6, 40).to(dtype).requires_grad_()
    y = fake_quantize(x, torch.tensor(1.0), FORMAT, axis=axis)
    assert y.dtype == dtype
    assert on_the_grid(y.detach().float(), 1.0)
    y.sum().backward()
    assert torch.equal(x.grad, (x.detach().abs() <= 1).to(dtype))
    codes, scale = quantize(x.detach(), None, FORMAT, axis=axis)
    again = dequantize(codes, scale, FORMAT, axis=axis)
    assert torch.equal(again.to(dtype), fake_quantize(x.detach(), None, FORMAT, axis=axis))


def test_it_is_the_element_of_blocks():
    x = torch.randn(3, 70)
    ours = fake_quantize(x, None, Blocked(FORMAT, 32))
    parts = [fake_quantize(part, None, FORMAT, axis=0) for part in x.split(32, 1)]
    assert torch.equal(ours, torch.cat(parts, 1))


def built():
    torch.manual_seed(0)
    with qp.quantize_modules(recipe="log"):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize("method", BUILTIN_CALIBRATORS)
def test_every_calibrator_gives_it_ranges_and_the_model_trains(method):
    model, x = built(), torch.randn(4, 3, 8, 8)
    qp.calibrate(model, [x], method=method, progress=False)
    weight = model[0].weight_quantizer(model[0].weight).detach()
    assert on_the_grid(weight, model[0].weight_quantizer.amax)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.usefixtures("offered")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_it_compiles_in_one_graph():
    model, x = built(), torch.randn(4, 3, 8, 8)
    qp.calibrate(model, [x], method="max", progress=False)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_a_name_that_no_plugin_offers_is_an_error_with_what_there_is():
    with pytest.raises(UnknownNameError, match="powers_of_two"):
        qp.TensorQuantizer(DESCRIPTOR)
