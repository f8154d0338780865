"""Fake quantization under ``torch.compile`` and ``torch.export``."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import quantpatch as qp
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS, Integer

INT8 = Integer(8)


def bits(t):
    return t.detach().contiguous().view(torch.int32)


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("int8", True),
        ("int8", False),
        ("uint8", False),
        ("uint8 z37", True),
        ("uint8 z37", False),
        ("fp8_e4m3", True),
        ("mxfp4", False),
        ("nvfp4", False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_compiled_with_dynamic_shapes_it_equals_eager_bit_for_bit(name, fixed):
    name, _, zero_point = name.partition(" z")
    number_format = BUILTIN_FORMATS[name]
    zero_point = torch.tensor(int(zero_point)) if zero_point else None
    amax = torch.tensor(1.1) if fixed else None

    def function(x):
        return fake_quantize(x * 2, amax, number_format, zero_point=zero_point) + 1

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in (3, 6):
        x = torch.randn(rows, 70, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)  # an error if it had to be specialised
        eager, fused = function(x), compiled(x)
        assert torch.equal(bits(eager), bits(fused))
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (eager, fused)]
        assert torch.equal(*grads)
    if name == "int8":  # of inductor's C++ code the gradients are compared below
        compiled = torch.compile(function, fullgraph=True)
    ties = torch.arange(-300, 301) / 4 * (1.1 / 127)  # of int8, as far as float32 holds them
    with torch.no_grad():
        for rows in (3, 6):
            x = ties.repeat(rows, 1)
            torch._dynamo.mark_dynamic(x, 0)
            assert torch.equal(bits(compiled(x)), bits(function(x)))


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("first", "second"),
    [("fp8_e4m3", "fp8_e5m2"), ("fp6_e3m2", "fp4_e2m1")],
)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_two_quantizers_train_in_one_graph_of_dynamic_shapes(first, second):
    first, second = BUILTIN_FORMATS[first], BUILTIN_FORMATS[second]
    amax = torch.tensor(1.0)

    def function(x, w):
        return fake_quantize(x + 1, amax, first) @ fake_quantize(w, None, second)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    x, w = torch.randn(4, 48, requires_grad=True), torch.randn(48, 40, requires_grad=True)
    grads = [torch.autograd.grad(f(x, w).square().sum(), (x, w)) for f in (function, compiled)]
    assert torch.equal(function(x, w), compiled(x, w))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_learned_range_trains_compiled():
    number_format = Integer(4)

    def function(x, amax):
        return fake_quantize(x, amax, number_format, axis=0)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, grads = torch.randn(4, 50, requires_grad=True), []
    for f in (function, compiled):
        amax = torch.full((4, 1), 1.5, requires_grad=True)
        grads.append(torch.autograd.grad(f(x, amax).square().sum(), (x, amax)))
    torch.testing.assert_close(grads[1], grads[0])


class Model(torch.nn.Module):
    def __init__(self, number_format):
        super().__init__()
        self.number_format = number_format
        self.register_buffer("amax", torch.tensor(1.1))

    def forward(self, x):
        return fake_quantize(fake_quantize(x, self.amax, self.number_format), None, BUILTIN_FORMATS["mxfp4"])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_it_exports_with_dynamic_shapes(strict):
    x, model = torch.randn(4, 64), Model(INT8)
    rows = torch.export.Dim("rows", min=2, max=512)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},), strict=strict)
    x = torch.randn(9, 64)
    assert torch.equal(program.module()(x), model(x))


# --- The C++ code -----------------------------------------------------------------------------------------


class ConvolutionsAndProduct(torch.nn.Module):
    """Two convolutions and a product, with what comes between such."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.second = torch.nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.third = torch.nn.Linear(16, 32)

    def forward(self, x):
        return self.third(self.second(torch.relu(self.first(x))).mean((2, 3)))


def counts(model, x):
    """What there is how often in the code of the forward pass, and of the backward pass."""
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    _, codes = run_and_get_code(lambda: compiled(x).square().sum().backward())
    return [
        {
            "calls": len(re.findall(r"^ +cpp_fused\w+\(", code, re.MULTILINE)),
            "passes": len(re.findall(r"\bfor\(int64_t x0=", code)),
            "bools": len(re.findall(r"'bool\*'", code)),
            "stored singly": len(re.findall(r"\] = tmpbuf\[", code)),
        }
        for code in codes
    ]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_on_a_cpu_quantization_fuses_into_its_neighbours():
    torch.manual_seed(0)
    model, x = ConvolutionsAndProduct(), torch.randn(2, 16, 8, 8)
    forward, backward = counts(model, x)
    qp.convert(model)
    qp.calibrate(model, [x * 0.8], progress=False)
    model.second.input_quantizer.use_zero_point(0)  # after a ReLU
    model.third.input_quantizer.use_zero_point(100)
    model.zero_grad()
    ours_forward, ours_backward = counts(model, x)
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    # A convolution's weight is put in order in any case, in the pass that quantizes it; its scales, one for
    # each channel, are put down for that. The product's weight takes a pass. Activations take none.
    assert ours_forward["calls"] == forward["calls"]
    assert ours_forward["passes"] <= forward["passes"] + 3
    # The gradient of each of the three weights takes one, without a neighbour after the last product.
    assert ours_backward["calls"] <= backward["calls"] + 1
    assert ours_backward["passes"] <= backward["passes"] + 3
    # Of bools, which are slow, there are those of the ReLU alone; older compilers write some more.
    if torch.__version__ >= "2.12":
        assert ours_forward["bools"] + ours_backward["bools"] <= 1
    assert ours_forward["stored singly"] + ours_backward["stored singly"] == 0
