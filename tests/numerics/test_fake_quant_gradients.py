"""Gradients of fake quantization: where they pass, what is kept for them, and under ``torch.func``."""

import functools
import itertools
import math
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from quantpatch.numerics import fake_quant
from quantpatch.numerics.formats import BUILTIN_FORMATS, Blocked, Float, Integer
from quantpatch.numerics.qparams import QParams
from quantpatch.numerics.ranges import reduce_amax

# Both in torch's operations and in kernels of our own.
pytestmark = pytest.mark.parametrize("kernels", [False, True], ids=["operations", "kernels"], indirect=True)

INT8, UINT8 = Integer(8), Integer(8, unsigned=True)
AFFINE = QParams(UINT8, None, zero_point=85)  # half as far below 0 as above


def fake_quantize(x, amax, format, **options):
    """Of a format, or of one with a zero point."""
    if isinstance(format, QParams):
        format, options["zero_point"] = format.format, format.zero_point
    return fake_quant.fake_quantize(x, amax, format, **options)


def ends_of(format):
    """The ends of the grid."""
    if isinstance(format, QParams):
        return format.min(), format.max()
    return format.min, format.max


def name_of(format):
    return "zero point" if isinstance(format, QParams) else format.name


EDGES = [-2.0, -1.0000001, -1.0, -0.3, -0.0, 0.0, 0.3, 1.0, 1.0000001, 2.0, math.inf, -math.inf]


def gradient(x, amax, number_format, axis=None):
    x = x.clone().requires_grad_()
    fake_quantize(x, amax, number_format, axis=axis).backward(torch.full_like(x, 3.0))
    return x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_gradient_passes_inside_the_range_ends_included_and_is_zero_outside(dtype, per_channel):
    x = torch.tensor([EDGES, EDGES], dtype=dtype)
    amax, axis = (torch.ones(2, 1), 0) if per_channel else (torch.tensor(1.0), None)
    inside = x.float().abs() <= 1
    for number_format in (INT8, Float(4, 3)):
        assert torch.equal(gradient(x, amax, number_format, axis), 3.0 * inside)
    assert torch.equal(gradient(x, amax, UINT8, axis), 3.0 * (inside & (x >= 0)))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("zero_point", [1, 37, 128, 254])
def test_with_a_zero_point_the_range_begins_where_the_grid_does(zero_point, per_channel):
    number_format = QParams(INT8, None, zero_point=zero_point)
    amax = torch.tensor(0.7)
    low = amax * (-zero_point / (255 - zero_point))
    edges = torch.stack([low, amax])
    beside = [torch.nextafter(edges, torch.tensor(end)) for end in (-math.inf, math.inf)]
    x = torch.cat([edges, *beside, torch.tensor([0.0, -math.inf, math.inf, math.nan])]).repeat(2, 1)
    expected = 3.0 * ~((x < low) | (x > amax))
    amax = amax.expand(2, 1) if per_channel else amax
    assert torch.equal(gradient(x, amax, number_format, 0 if per_channel else None), expected)
    assert torch.equal(gradient(x, None, number_format), torch.full_like(x, 3.0))


def test_a_half_precision_gradient_compares_with_the_exact_range():
    x = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)  # amax lies between, and rounds to the upper
    assert gradient(x, torch.tensor(1.007), INT8).tolist() == [3, 0]


@pytest.mark.parametrize("name", BUILTIN_FORMATS)
def test_a_dynamic_range_has_nothing_outside(name):
    x = torch.randn(5, 70)
    expected = 3.0 * (x >= 0) if name.startswith("uint") else torch.full_like(x, 3.0)
    assert torch.equal(gradient(x, None, BUILTIN_FORMATS[name]), expected)


def test_the_gradient_is_the_slope_over_a_whole_step_where_one_exists():
    # One step to the right moves the result by one step inside the range, and not at all outside.
    scale = 1 / 127
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64).float()
    x = x[((x.abs() - 1).abs() > 2 * scale)]
    amax = torch.tensor(1.0)
    number_format = Integer(8, narrow_range=True)
    slope = (fake_quantize(x + scale, amax, number_format) - fake_quantize(x, amax, number_format)) / scale
    torch.testing.assert_close(gradient(x, amax, number_format) / 3, slope.round(), rtol=0, atol=0)


def test_a_learned_range_has_the_gradient_of_lsq():
    torch.manual_seed(0)
    x = torch.randn(4, 50, dtype=torch.float64)
    amax = torch.tensor([[0.5], [1.0], [2.0], [4.0]], requires_grad=True)
    upstream = torch.randn(4, 50)
    fake_quantize(x.float(), amax, Integer(4), axis=0).backward(upstream)
    s = amax.detach().double() / 7
    v = x.float().double() / s
    ds = torch.where(v <= -8, -8.0, torch.where(v >= 7, 7.0, v.round() - v))
    expected = 7 * (ds * upstream).sum(1, keepdim=True) / math.sqrt(50 * 7)
    torch.testing.assert_close(amax.grad.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "number_format", [INT8, UINT8, AFFINE, Integer(3), Integer(8, narrow_range=True)], ids=name_of
)
def test_of_a_learned_range_one_rule_decides_both_gradients(number_format):
    # Equations 3 and 5 of LSQ: inside is format.min < v < format.max, without the ends.
    low, high = ends_of(number_format)
    v = torch.tensor([low - 1, low, low + 0.25, low + 0.75, 0.3, high - 0.25, high, high + 1])
    inside = (v > low) & (v < high)
    for value, is_inside in zip(v, inside, strict=True):
        x, amax = value.reshape(1).requires_grad_(), torch.tensor(high, requires_grad=True)
        y = fake_quantize(x, amax, number_format)
        y.sum().backward()
        assert x.grad.item() == is_inside
        slope = y.detach() - x.detach() if is_inside else value.clamp(low, high)
        steps = high if number_format is not AFFINE else max(high, -low)
        torch.testing.assert_close(amax.grad, high * slope.sum() / math.sqrt(steps), rtol=0.01, atol=0)


def test_blocks_learn_ranges_of_their_own():
    x = torch.randn(3, 70)
    amax = (torch.rand(3, 3) + 0.5).requires_grad_()
    (grad,) = torch.autograd.grad(fake_quantize(x, amax, Blocked(Integer(4), 32)).square().sum(), amax)
    for block, part in enumerate(x.split(32, 1)):
        alone = amax.detach()[:, block : block + 1].requires_grad_()
        fake_quantize(part, alone, Integer(4), axis=0).square().sum().backward()
        sizes = math.sqrt(part.numel() / 3) / math.sqrt(x.numel() / 9)
        torch.testing.assert_close(grad[:, block : block + 1], alone.grad * sizes)


def test_a_learned_range_has_the_finite_difference_where_everything_saturates():
    x, amax = torch.full((6,), 10.0), torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, amax, INT8).sum().backward()
    step = 2.0**-6
    wider, narrower = (fake_quantize(x, torch.tensor(1 + d), INT8).sum() for d in (step, -step))
    difference = (wider - narrower) / (2 * step)
    torch.testing.assert_close(amax.grad, 127**2 * difference / math.sqrt(6 * 127))


def lsq(x, scale, number_format, steps):
    """The paper's forward (its appendix A), in operations that have gradients of their own."""
    factor = 1 / math.sqrt(x.numel() * steps)
    scale = (scale - scale * factor).detach() + scale * factor
    v = (x / scale).clamp(*ends_of(number_format))
    return ((v.round() - v).detach() + v) * scale


@pytest.mark.parametrize("z", [None, 0, 40, 128, 250, 254])
def test_gradient_descent_moves_a_range_as_it_moves_the_scale_of_lsq_whatever_the_zero_point(z):
    number_format = INT8 if z is None else QParams(INT8, None, zero_point=z)
    steps = 127 if z is None else max(z - 1, 255 - z)
    low, high = ends_of(number_format)
    x = 2 * torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) + 2 * low / 255
    first = 1.6 / 255  # of 2.0: the range is too short
    scale = torch.tensor(first, dtype=torch.float64, requires_grad=True)
    amax = torch.tensor(first * high, requires_grad=True)
    for _ in range(20):
        lsq(x.double(), scale, number_format, steps).sub(x).square().sum().backward()
        fake_quantize(x, amax, number_format).sub(x).square().sum().backward()
        with torch.no_grad():
            for parameter in (scale, amax):
                parameter -= 2e-5 * parameter.grad
                parameter.grad = None
    assert amax.item() / high == pytest.approx(scale.item(), rel=0.01)
    assert 1.1 < scale.item() / first < 1.5


def test_a_dynamic_range_of_a_signed_format_hands_the_gradient_itself_back():
    x, upstream = torch.randn(50, requires_grad=True), torch.randn(50)
    (grad,) = torch.autograd.grad(fake_quantize(x, None, INT8), x, upstream)
    assert grad.data_ptr() == upstream.data_ptr()


def laid_out(x, layout):
    return {
        "contiguous": lambda x: x,
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        "sliced": lambda x: torch.stack([x, x], 2)[:, :, 0],
        "expanded": lambda x: x[:, :1].expand(x.shape),
    }[layout](x)


@pytest.mark.sweep(7)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2)])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.3])
def test_whatever_lies_outside_the_gradient_is_zero_there_and_passes_elsewhere(layout, axis, share):
    torch.manual_seed(0)
    x = laid_out(torch.randn(4, 6, 9, 8).clamp_(-1.9, 1.9), layout).clone(memory_format=torch.preserve_format)
    amax = torch.full_like(reduce_amax(x, axis=axis), 2.0)
    x = torch.where(torch.rand_like(x) < share, 3.0 * x.sign(), x)
    assert torch.equal(gradient(x, amax, INT8, axis), 3.0 * (x.abs() <= 2))
    assert torch.equal(gradient(x, amax, UINT8, axis), 3.0 * ((x >= 0) & (x <= 2)))
    assert torch.equal(gradient(x.abs(), amax, UINT8, axis), 3.0 * (x.abs() <= 2))
    assert torch.equal(gradient(x, amax, AFFINE, axis), 3.0 * ((x >= -1) & (x <= 2)))
    for few, number_format in ((x, INT8), (x.clamp_min(-1), AFFINE)):
        y = fake_quantize(few.clone().requires_grad_(), amax, number_format, axis=axis)
        # Rounded alike, with a clamp or without.
        assert torch.equal(y, fake_quantize(few, amax, number_format, axis=axis))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.3])
def test_gradients_of_other_dtypes_pass_and_stop_alike(dtype, share):
    torch.manual_seed(0)
    x = torch.randn(40, 64).clamp_(-1.9, 1.9).to(dtype)
    x = torch.where(torch.rand(40, 64) < share, 3.0 * x.sign(), x)
    for amax, axis in ((torch.tensor(2.0), None), (torch.full((40, 1), 2.0), 0)):
        found = gradient(x, amax, INT8, axis)
        assert found.dtype == dtype
        assert torch.equal(found, 3.0 * (x.abs() <= 2).to(dtype))


@pytest.mark.parametrize("share", [0.002, 0.3])
def test_nan_is_inside_and_hides_nothing(share):
    torch.manual_seed(0)
    x = torch.randn(40, 64).clamp_(-1.9, 1.9)
    x = torch.where(torch.rand(40, 64) < share, 3.0 * x.sign(), x)
    x[:, 5] = math.nan
    for amax, axis in ((torch.tensor(2.0), None), (torch.full((40, 1), 2.0), 0)):
        assert torch.equal(gradient(x, amax, INT8, axis), 3.0 * ~(x.abs() > 2))
        assert torch.equal(gradient(x, amax, UINT8, axis), 3.0 * ~((x < 0) | (x > 2)))


@pytest.mark.parametrize("share", [0.0, 0.002, 0.3])
def test_an_upstream_gradient_of_other_strides_or_with_infinities_is_taken(share):
    torch.manual_seed(0)
    x = torch.randn(2, 30, 4, 8).clamp_(-1.9, 1.9)
    x = torch.where(torch.rand_like(x) < share, 3.0 * x.sign(), x).requires_grad_()
    y, inside = fake_quantize(x, torch.tensor(2.0), INT8), x.detach().abs() <= 2
    for upstream in (
        torch.full_like(x, math.inf),
        torch.randn(8, 4, 30, 2).permute(3, 2, 1, 0),
        torch.randn(1).expand(x.shape),
        torch.randn_like(x).contiguous(memory_format=torch.channels_last),
    ):
        (found,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
        assert torch.equal(found, upstream.masked_fill(~inside, 0.0))
    batch = torch.randn(3, *x.shape)
    (found,) = torch.autograd.grad(y, x, batch, is_grads_batched=True)
    assert torch.equal(found, batch.masked_fill(~inside, 0.0))


@pytest.mark.parametrize("value", [1.0, 1.9999999, 1.1754944e-38, 1e-45, 3.4e38])
def test_the_mask_of_channels_is_exact_at_the_ends(value):
    amax = torch.tensor([[value], [value]])
    above = torch.nextafter(amax, torch.tensor(math.inf))
    x = torch.cat([amax, -amax, above, -above, amax * 0], 1)
    assert torch.equal(gradient(x, amax, INT8, 0), torch.tensor([3.0, 3, 0, 0, 3]).expand(2, 5))


@pytest.mark.parametrize("share", [0.0, 0.002, 0.3])
def test_gradients_of_gradients_flow_through_the_upstream_gradient(share):
    torch.manual_seed(0)
    x = torch.randn(40, 64).clamp_(-1.9, 1.9)
    x = torch.where(torch.rand_like(x) < share, 3.0 * x.sign(), x).requires_grad_()
    upstream = torch.randn(40, 64, requires_grad=True)
    for amax in (torch.tensor(2.0), torch.full((40, 1), 2.0)):
        y = fake_quantize(x, amax, INT8, axis=0)
        (grad,) = torch.autograd.grad(y, x, upstream, create_graph=True)
        (twice,) = torch.autograd.grad(grad.sum(), upstream)
        assert torch.equal(twice, (x.detach().abs() <= 2).float())


def saved_for_backward(x, amax, number_format, **kwargs):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize(x, amax, number_format, **kwargs)
    return saved


def test_nothing_is_kept_for_backward_where_the_range_is_the_tensors_own():
    x = torch.randn(8, 64, requires_grad=True)
    for name in ("int8", "fp8_e4m3", "mxfp4", "nvfp4", "int4_g32"):
        assert not saved_for_backward(x, None, BUILTIN_FORMATS[name]), name
    assert not saved_for_backward(x.abs(), None, UINT8)


@pytest.mark.sweep(5)
@pytest.mark.parametrize("number_format", [INT8, UINT8, Float(4, 3), Blocked(Integer(4), 32)], ids=str)
@pytest.mark.parametrize("outside", [0, 1, 5, 100, 3000, 2**17])
@pytest.mark.parametrize("per_channel", [False, True])
def test_at_most_a_byte_an_element_is_kept_for_backward_and_nothing_if_all_is_inside(
    kernels, number_format, outside, per_channel
):
    x = torch.rand(64, 2048)
    x.view(-1)[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))[:outside]] = 2.0
    x.requires_grad_()
    blocked = number_format.block_size is not None
    amax = torch.ones(64, 64 if blocked else 1) if per_channel else torch.tensor(1.0)
    axis = None if blocked or not per_channel else 0
    saved = saved_for_backward(x, amax, number_format, axis=axis)
    assert sum(t.nbytes for t in saved) <= min(1, outside) * x.numel() / (8 if kernels else 1)
    (found,) = torch.autograd.grad(fake_quantize(x, amax, number_format, axis=axis).sum(), x)
    assert torch.equal(found, (x <= 1).float())


@pytest.mark.parametrize("share", [0.0, 0.002, 0.3])
def test_the_input_may_be_overwritten_or_freed_before_backward(share):
    torch.manual_seed(0)
    leaf = torch.randn(40, 64).clamp_(-1.9, 1.9)
    leaf = torch.where(torch.rand_like(leaf) < share, 3.0 * leaf.sign(), leaf).requires_grad_()
    x = leaf * 1
    memory = weakref.ref(x.untyped_storage())
    y = fake_quantize(x, torch.tensor(2.0), INT8)
    x.detach().zero_()
    del x
    assert memory() is None
    y.sum().backward()
    assert torch.equal(leaf.grad, (leaf.detach().abs() <= 2).float())


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_learned_range_keeps_the_input_itself_the_range_and_the_scale(per_channel):
    x = torch.randn(8, 64, requires_grad=True) * 1
    amax = torch.ones((8, 1) if per_channel else (), requires_grad=True)
    saved = saved_for_backward(x, amax, INT8, axis=0 if per_channel else None)
    assert [t.data_ptr() for t in saved][:2] == [x.data_ptr(), amax.data_ptr()]
    assert [t.shape for t in saved] == [x.shape, amax.shape, amax.shape]


@pytest.mark.parametrize("number_format", [INT8, AFFINE, Float(4, 3)], ids=name_of)
def test_where_a_range_is_learned_gradients_of_gradients_and_batched_ones_are_those_of_single_ones(
    number_format,
):
    def close(a, b):  # but for the rounding of sums
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))

    torch.manual_seed(0)
    x, amax = torch.randn(40, 64, requires_grad=True), torch.rand(40, 1, requires_grad=True)
    upstream = torch.randn(3, 40, 64, requires_grad=True)
    y = fake_quantize(x, amax, number_format, axis=0)
    single = [torch.autograd.grad(y, (x, amax), u, retain_graph=True) for u in upstream.detach()]
    batched = torch.autograd.grad(y, (x, amax), upstream.detach(), retain_graph=True, is_grads_batched=True)
    for several, *ones in zip(batched, *single, strict=True):
        close(several, torch.stack(ones))
    recorded = torch.autograd.grad(y, (x, amax), upstream[0], create_graph=True)
    for ours, one in zip(recorded, single[0], strict=True):
        close(ours, one)
    weights = [torch.randn_like(t) for t in recorded]
    (twice,) = torch.autograd.grad(recorded, upstream, weights)
    # Linear in the upstream gradient: what it is at another one follows from its own gradient.
    elsewhere = sum((w * g).sum() for w, g in zip(weights, single[1], strict=True))
    close((twice[0] * upstream[1]).sum(), elsewhere)


@pytest.mark.sweep(7)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_learned_ranges_gradients_are_the_same_where_operations_are_recorded(layout, axis, dtype):
    torch.manual_seed(0)
    x = laid_out(torch.randn(4, 6, 9, 8, dtype=dtype), layout).requires_grad_()
    amax = (0.5 * reduce_amax(x, axis=axis)).requires_grad_()
    y, upstream = (
        fake_quantize(x, amax, INT8, axis=axis),
        torch.randn(8, 9, 6, 4, dtype=dtype).permute(3, 2, 1, 0),
    )
    plain = torch.autograd.grad(y, (x, amax), upstream, retain_graph=True)
    recorded = torch.autograd.grad(y, (x, amax), upstream, create_graph=True)
    assert torch.equal(plain[0], recorded[0])
    assert plain[1].dtype == recorded[1].dtype
    torch.testing.assert_close(plain[1], recorded[1], rtol=1e-4, atol=1e-3)


def test_a_part_seen_by_a_mode_may_be_computed_again_without_it():
    x = torch.randn(40, 40, requires_grad=True)
    with FlopCounterMode(display=False):
        y = checkpoint(lambda x: fake_quantize(x, torch.tensor(1.0), INT8), x, use_reentrant=False)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, (x.abs() <= 1.0).float())


@pytest.mark.parametrize("share", [0.0, 0.002, 0.3])
def test_activation_checkpoints_and_hooks_on_saved_tensors_see_all_that_is_kept(share):
    torch.manual_seed(0)
    x = torch.randn(40, 640).clamp_(-1.9, 1.9)
    x = torch.where(torch.rand_like(x) < share, 3.0 * x.sign(), x).requires_grad_()
    amax, inside = torch.tensor(2.0), (x.detach().abs() <= 2).float()

    def function(x):
        return fake_quantize(x * 1, amax, INT8)

    (found,) = torch.autograd.grad(checkpoint(function, x, use_reentrant=False).sum(), x)
    assert torch.equal(found, inside)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        y = function(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, inside)


@pytest.mark.parametrize("number_format", [INT8, UINT8, AFFINE, Float(4, 3)], ids=name_of)
@pytest.mark.parametrize("axis", [None, 0])
def test_without_a_gradient_nothing_but_the_result_is_allocated(number_format, axis):
    x = torch.randn(50, 2000)
    amax = torch.tensor(1.0) if axis is None else torch.ones(50, 1)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        fake_quantize(x, amax, number_format, axis=axis)
    allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    steps = x.nbytes if isinstance(number_format, Float) else 0  # each element has one of its own
    assert x.nbytes <= allocated < 1.03 * x.nbytes + steps


# --- torch.func -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch: clamp_ is batched by a loop
@pytest.mark.parametrize("name", ["int8", "uint8", "fp8_e4m3", "mxfp4", "nvfp4", "int4_g32"])
@pytest.mark.parametrize("no_grad", [True, False])
def test_vmap_equals_a_loop(name, no_grad):
    x = torch.randn(3, 5, 70)
    ranges = [None, torch.tensor(1.0)]
    with torch.set_grad_enabled(not no_grad):
        for amax, dim in itertools.product(ranges, (0, 2)):
            f = functools.partial(fake_quantize, amax=amax, format=BUILTIN_FORMATS[name])
            assert torch.equal(vmap(f, dim)(x), torch.stack([f(t) for t in x.unbind(dim)]))


def test_vmap_over_ranges_equals_a_loop():
    x, static = torch.randn(3, 5, 70), torch.rand(3)

    def f(x, amax):
        return fake_quantize(x, amax, INT8)

    for amax in (static, torch.rand(3, 5, 1)):
        looped = torch.stack([f(t, a) for t, a in zip(x, amax, strict=True)])
        assert torch.equal(vmap(f)(x, amax), looped)
    assert torch.equal(vmap(f, (None, 0))(x[0], static), torch.stack([f(x[0], a) for a in static]))
    groups, blocked = torch.rand(3, 5, 3), Blocked(Integer(4), 32)
    looped = torch.stack([fake_quantize(t, a, blocked) for t, a in zip(x, groups, strict=True)])
    assert torch.equal(vmap(lambda t, a: fake_quantize(t, a, blocked))(x, groups), looped)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("shape", [(), (1, 1), (5, 1)])
def test_gradients_of_each_sample_equal_a_loop(shape):
    x, amax = torch.randn(4, 5, 20), torch.rand(shape) + 0.5
    for argument in (0, 1):
        g = grad(lambda t, a: fake_quantize(t, a, INT8).square().sum(), argument)
        looped = torch.stack([g(t, amax) for t in x])
        torch.testing.assert_close(vmap(g, (0, None))(x, amax), looped)
    # The other order: the gradient of the batch is the sum of its members'.
    batch = grad(lambda a: vmap(lambda t: fake_quantize(t, a, INT8).square().sum())(x).sum())
    torch.testing.assert_close(batch(amax), looped.sum(0))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("format", [INT8, Integer(4), Blocked(Integer(4), 4)], ids=name_of)
def test_a_learned_range_that_a_function_refers_to_has_the_gradients_of_lsq(format):
    """Which are others at the ends of the range: inside is what rounds to less than the ends of the grid."""
    amax = torch.tensor(1.0, requires_grad=True)
    x = torch.tensor([[-2.0, -1.005, -1.0, -0.5, 0.0, 0.5, 1.0, 1.005]])
    leaf = x.clone().requires_grad_()
    fake_quantize(leaf, amax, format).square().sum().backward()
    through = grad(lambda t: fake_quantize(t, amax.abs(), format).square().sum())
    assert torch.equal(through(x), leaf.grad)
    assert torch.equal(vmap(through)(x), leaf.grad)
    fixed = grad(lambda t: fake_quantize(t, amax.detach(), format).square().sum())
    assert not torch.equal(through(x), fixed(x))


# --- Forward mode -----------------------------------------------------------------------------------------


# Of torch's own doing when forward mode is used first.
ignore_jit = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


@ignore_jit
@pytest.mark.parametrize("format", [Integer(4), UINT8, AFFINE], ids=name_of)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_forward_mode_agrees_with_reverse_mode(format, per_row, learned):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    amax = torch.tensor([[0.5], [1.0], [1.5]]) if per_row else torch.tensor(1.0)
    amax.requires_grad_(learned)

    def of_x(x):
        return fake_quantize(x, amax, format, axis=0 if per_row else None)

    def of_range(amax):
        return fake_quantize(x, amax, format, axis=0 if per_row else None)

    assert torch.equal(jacfwd(of_x)(x), jacrev(of_x)(x))
    torch.testing.assert_close(jacfwd(of_range)(amax), jacrev(of_range)(amax))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(of_x(forward_ad.make_dual(x, torch.ones(3, 5)))).tangent
    x.requires_grad_()
    of_x(x).sum().backward()
    assert torch.equal(tangent, x.grad)


@ignore_jit
def test_in_its_own_range_a_tangent_passes_as_it_is():
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    direction = torch.arange(5.0)
    _, tangent = jvp(lambda x: fake_quantize(x, None, Integer(8)), (x,), (direction,))
    assert torch.equal(tangent, direction)
