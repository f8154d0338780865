"""Learned ranges in kernels: LSQ's gradients, with torch's bits and to the last digit of float32."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import FORMATS, assert_same_bits, both_ways, cases
from torch import nn

from quantpatch.numerics.backends import numba
from quantpatch.numerics.backends.lsq import divided_by, lsq_slopes
from quantpatch.numerics.backends.scales import spread
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS, Blocked, Integer
from quantpatch.numerics.kernels import buffers, threads
from quantpatch.numerics.qparams import QParams
from quantpatch.numerics.ranges import reduce_amax

pytest.importorskip("numba")

pytestmark = pytest.mark.parametrize("kernels", [True], ids=["kernels"], indirect=True)

LEARNABLE = [f for f in FORMATS if not isinstance(f, Blocked) or f.scale == "float32"]


def assert_exact(found, x, grad, amax, number_format, axis):
    """That a gradient to the range is that of sums in float64, but for its own rounding."""
    x, amax = x.detach(), amax.detach()
    dim = axis % x.dim() if isinstance(number_format, Blocked) else None
    q = QParams(number_format, amax, None, dim)
    _, slope = lsq_slopes(x, amax / number_format.max, q)
    products = slope.double() * grad.double() / divided_by(x, q)
    # Which range is whose, by numbering them.
    which = torch.arange(amax.numel()).view(amax.shape)
    which = spread(which, x, number_format, dim).expand(x.shape).reshape(-1)
    exact, sizes = (
        torch.zeros(amax.numel(), dtype=torch.float64).index_add_(0, which, p.reshape(-1)).view(amax.shape)
        for p in (products, products.abs())
    )
    assert found.shape == amax.shape
    assert found.dtype == torch.float32
    finite = exact.float().isfinite()
    assert torch.equal(found.nan_to_num(7.0)[~finite], exact.float().nan_to_num(7.0)[~finite])
    tolerance = 2.0**-23 * exact.abs() + 2.0**-40 * sizes + 2.0**-149
    assert bool(((found.double() - exact).abs() <= tolerance)[finite].all())


@settings(max_examples=300, deadline=None)
@given(case=cases(LEARNABLE), seed=st.integers(0, 99), part=st.sampled_from([1, 2**18]))
def test_gradients_have_the_bits_of_torchs_operations_and_the_digits_of_float64(case, seed, part):
    x, number_format, axis, amax = case
    x = x.detach().requires_grad_()
    amax.requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)

    def passes():
        y = fake_quantize(x, amax, number_format, axis=axis)
        return y.detach(), *torch.autograd.grad(y, (x, amax), grad)

    numba._PART, before = part, numba._PART
    try:
        (y, to_x, to_range), (same_y, same_to_x, _) = both_ways(passes)
    finally:
        numba._PART = before
    assert_same_bits(y, same_y)
    assert_same_bits(to_x, same_to_x)
    assert_exact(to_range, x, grad, amax, number_format, axis)


def test_a_sum_that_cancels_keeps_its_digits():
    x = torch.full((3_000_001,), 0.3)
    grad = torch.full_like(x, 1e6)
    grad[1::2] = -1e6
    grad[0] += 1e6
    amax = torch.tensor(7.0, requires_grad=True)
    (found,) = torch.autograd.grad(fake_quantize(x, amax, Integer(4)), amax, grad)
    slope = -float(torch.tensor(0.3))
    assert found.item() == pytest.approx(7 * slope * 2e6 / math.sqrt(7 * x.numel()), rel=2**-23)


def laid_out(x, layout):
    return {
        "contiguous": lambda: x,
        "channels last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        "with gaps": lambda: torch.stack([x, x], 2)[:, :, 0],
    }[layout]()


@pytest.mark.sweep(7)
@pytest.mark.parametrize("upstream", ["contiguous", "channels last", "transposed", "with gaps", "one number"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "with gaps"])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_tensors_and_upstream_gradients_lie_as_they_like(layout, upstream, axis):
    torch.manual_seed(0)
    x = laid_out(torch.randn(20, 6, 5, 7), layout).requires_grad_()
    amax = (0.5 * reduce_amax(x, axis=axis)).requires_grad_()
    grad = torch.randn(20, 6, 5, 7)
    grad = grad[:1, :1, :1, :1].expand(grad.shape) if upstream == "one number" else laid_out(grad, upstream)

    def passes():
        return torch.autograd.grad(fake_quantize(x, amax, Integer(8), axis=axis), (x, amax), grad)

    (to_x, to_range), (same_to_x, same_to_range) = both_ways(passes)
    assert torch.equal(to_x, same_to_x)
    if layout == "with gaps":  # which torch's operations see to
        assert torch.equal(to_range, same_to_range)
    else:
        assert_exact(to_range, x, grad, amax, Integer(8), axis)


@pytest.mark.parametrize("layout", ["tensor", "channel", "second axis", "last axis", "blocks"])
def test_threads_give_the_bits_of_one(monkeypatch, layout):
    torch.manual_seed(0)
    x, grad = torch.randn(48, 16, 160), torch.randn(48, 16, 160)
    axis = {"tensor": None, "channel": 0, "second axis": 1, "last axis": -1, "blocks": -1}[layout]
    number_format = BUILTIN_FORMATS["int4_g32" if layout == "blocks" else "int8"]
    amax = x.abs().view(48, 16, 5, 32).amax(3) if layout == "blocks" else reduce_amax(x, axis=axis)
    monkeypatch.setattr(numba, "_PART", 4096)
    used = []

    def passes():
        leaf, learned = x.clone().requires_grad_(), (0.5 * amax).requires_grad_()
        y = fake_quantize(leaf, learned, number_format, axis=axis)
        return torch.autograd.grad(y, (leaf, learned), grad)

    results = []
    submit = threads._threads().submit
    monkeypatch.setattr(threads._threads(), "submit", lambda *a: used.append(a) or submit(*a))
    for count in (1, 2, 3, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append(passes())
    assert len(used) >= 30
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_both_passes_hold_the_result_and_the_gradient_alone():
    x, grad = torch.randn(64, 4000, requires_grad=True), torch.randn(64, 4000)
    amax = reduce_amax(x, axis=0).requires_grad_()

    def passes():
        return torch.autograd.grad(fake_quantize(x, amax, Integer(8), axis=0), (x, amax), grad)

    passes()
    with torch.profiler.profile(profile_memory=True) as profile:
        passes()
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert 2 * x.nbytes <= allocated < 2.05 * x.nbytes


def test_a_weight_with_a_learned_range_has_the_memory_of_the_step_before():
    weight = nn.Parameter(torch.randn(512, 1024))
    amax = nn.Parameter(reduce_amax(weight, axis=0))

    def step():
        y = fake_quantize(weight, amax, Integer(8), axis=0)
        y.sum().backward()
        return y.data_ptr()

    assert step() == step()
    assert weight in buffers._of_parameter
    with torch.no_grad():
        fake_quantize(weight, amax, Integer(8), axis=0)
    assert weight not in buffers._of_parameter
