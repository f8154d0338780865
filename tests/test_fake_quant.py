"""Fake quantization against onnxruntime, ml_dtypes and specifications written out in numpy."""

import functools
import itertools
import math

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch.func import grad, vmap

from quantpatch.errors import DescriptorError, RangeError
from quantpatch.fake_quant import dequantize, fake_quantize, quantize, reduce_amax
from quantpatch.formats import BUILTIN_FORMATS, Blocked, Float, Integer

INT8, UINT8 = Integer(8), Integer(8, unsigned=True)


def bits(t):
    return t.detach().contiguous().view(torch.int32)


def hard_values(scale, high, n, seed=0):
    """float32 with ties, range edges, subnormals and infinities around a normal sample."""
    rng = np.random.default_rng(seed)
    scale = np.float32(scale)
    steps = np.arange(-2 * high - 3, 2 * high + 4, dtype=np.float32) / 2 * scale
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 1e-39, 3.4e38, -3.4e38], dtype=np.float32)
    hard = np.concatenate([steps, np.nextafter(steps, np.inf), np.nextafter(steps, -np.inf), special])
    sample = rng.standard_normal(max(n - hard.size, 0)).astype(np.float32) * scale * np.float32(high / 3)
    return np.concatenate([hard.astype(np.float32), sample])


@functools.cache
def onnx_session(onnx_type, axis=None):
    """A graph of QuantizeLinear and DequantizeLinear, run as written."""
    zero = helper.make_tensor(
        "zero", onnx_type, [] if axis is None else [3], [0] if axis is None else [0] * 3
    )
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **attributes),
    ]
    floats = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    shape = ["n"] if axis is None else [3, "n"]
    inputs = [floats("x", shape=shape), floats("scale", shape=[] if axis is None else [3])]
    graph = helper.make_graph(nodes, "qdq", inputs, [floats("y", shape=shape)], [zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


ONNX_TYPES = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
}


@pytest.mark.parametrize("amax", [1.0, 2.7182817, 1e-6, 1e-36, 333.3])
@pytest.mark.parametrize("name", ONNX_TYPES)
def test_integers_equal_onnxruntime_bit_for_bit(name, amax):
    number_format, amax = BUILTIN_FORMATS[name], torch.tensor(amax)
    scale = (amax / number_format.max).numpy()
    x = hard_values(scale, int(number_format.max), 60_000)  # 20 cases: 1.2 million values
    expected = onnx_session(ONNX_TYPES[name]).run(None, {"x": x, "scale": scale})[0]
    ours = fake_quantize(torch.from_numpy(x), amax, number_format)
    assert torch.equal(bits(ours), bits(torch.from_numpy(expected)))


@pytest.mark.parametrize("name", ["int8", "uint8"])
def test_integers_per_channel_equal_onnxruntime_bit_for_bit(name):
    number_format = BUILTIN_FORMATS[name]
    amax = torch.tensor([[1.0], [3.3], [1e-3]])
    scale = (amax / number_format.max).flatten().numpy()
    x = np.stack([hard_values(s, int(number_format.max), 50_000, seed=i) for i, s in enumerate(scale)])
    expected = onnx_session(ONNX_TYPES[name], axis=0).run(None, {"x": x, "scale": scale})[0]
    ours = fake_quantize(torch.from_numpy(x), amax, number_format, axis=0)
    assert torch.equal(bits(ours), bits(torch.from_numpy(expected)))


@given(
    width=st.integers(2, 8),
    unsigned=st.booleans(),
    amax=st.floats(2.0**-100, 2.0**100, width=32),
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50),
)
@settings(deadline=None, max_examples=100)
def test_every_integer_format_follows_the_formula(width, unsigned, amax, values):
    number_format = Integer(width, unsigned=unsigned)
    x, scale = np.array(values, np.float32), np.float32(amax) / np.float32(number_format.max)
    with np.errstate(over="ignore"):
        expected = np.clip(np.rint(x / scale), number_format.min, number_format.max) * scale
    assert fake_quantize(torch.tensor(x), torch.tensor(amax), number_format).tolist() == expected.tolist()


def test_narrow_range_leaves_out_the_lowest_value():
    x, amax = torch.tensor([-200.0, -128.0, 128.0]), torch.tensor(127.0)
    assert fake_quantize(x, amax, INT8).tolist() == [-128, -128, 127]
    assert fake_quantize(x, amax, Integer(8, narrow_range=True)).tolist() == [-127, -127, 127]


@pytest.mark.parametrize(
    ("pair", "dtype"), [((4, 3), ml_dtypes.float8_e4m3fn), ((5, 2), ml_dtypes.float8_e5m2)], ids=str
)
def test_float8_equals_ml_dtypes_with_a_scale(pair, dtype):
    number_format, amax = Float(*pair), torch.tensor(3.3)
    scale = (amax / number_format.max).numpy()
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    scaled = (x / scale).clip(-number_format.max, number_format.max)
    expected = scaled.astype(dtype).astype(np.float32) * scale
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(x), amax, number_format).numpy(), expected)


# --- Blocks -----------------------------------------------------------------------------------------------

MX_ELEMENTS = {  # name: (emax of OCP MX 1.0 table 1, largest value, dtype)
    "mxfp8_e4m3": (8, 448.0, ml_dtypes.float8_e4m3fn),
    "mxfp8_e5m2": (15, 57344.0, ml_dtypes.float8_e5m2),
    "mxfp6_e2m3": (2, 7.5, ml_dtypes.float6_e2m3fn),
    "mxfp6_e3m2": (4, 28.0, ml_dtypes.float6_e3m2fn),
    "mxfp4": (2, 6.0, ml_dtypes.float4_e2m1fn),
    "mxint8": (0, 127 / 64, None),
}


def mx_reference(x, name):
    """OCP MX 1.0, section 6.3, a block of 32 at a time, in float64."""
    emax, top, dtype = MX_ELEMENTS[name]
    y = np.empty_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 32):
            block = x[row, start : start + 32].astype(np.float64)
            amax = np.abs(block).max()
            exponent = (math.frexp(amax)[1] - 1 if amax else -1000) - emax
            shared = 2.0 ** min(max(exponent, -127), 127)
            p = np.clip(block / shared, -top, top)
            p = (
                np.rint(p * 64) / 64
                if dtype is None
                else p.astype(np.float32).astype(dtype).astype(np.float64)
            )
            y[row, start : start + 32] = p * shared
    return y


@pytest.mark.parametrize("name", MX_ELEMENTS)
def test_mx_formats_follow_the_ocp_rule(name):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 107)).astype(np.float32)
    x *= np.exp2(rng.integers(-60, 60, (300, 1))).astype(np.float32)
    x[0], x[1, :5], x[2] = 0, [448, 480, 511, 512, 6.5], x[2] * 1e-20
    x[3, :32] = np.float32(3e38)
    ours = fake_quantize(torch.from_numpy(x), None, BUILTIN_FORMATS[name]).numpy()
    np.testing.assert_array_equal(ours, mx_reference(x, name))


@pytest.mark.parametrize("name", MX_ELEMENTS)
@pytest.mark.parametrize("value", [1e-45, 1e-39, 5.9e-39, 2e-38, 3.4e38])
def test_mx_scales_are_clamped_to_what_e8m0_holds(name, value):
    x = np.full((1, 32), value, np.float32)
    _, scale = quantize(torch.from_numpy(x), None, BUILTIN_FORMATS[name])
    unit = 2.0**-6 if name == "mxint8" else 1.0
    assert 2.0**-127 <= scale.item() / unit <= 2.0**127
    ours = fake_quantize(torch.from_numpy(x), None, BUILTIN_FORMATS[name]).numpy()
    np.testing.assert_array_equal(ours, mx_reference(x, name))


def nvfp4_reference(x, amax):
    """E2M1 elements, an E4M3 scale for 16 of them, a float32 scale for the tensor; in float32."""
    y = np.zeros_like(x)
    tensor_scale = np.float32(amax) / np.float32(6 * 448)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 16):
            block = x[row, start : start + 16]
            wanted = np.abs(block).max() / np.float32(6) / tensor_scale
            stored = np.minimum(wanted, np.float32(448)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            scale = stored * tensor_scale
            if scale:
                p = np.clip(block / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
                y[row, start : start + 16] = p * scale
    return y


@pytest.mark.parametrize("share", [None, 1.0, 0.25])
def test_nvfp4_follows_its_two_level_rule(share):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((300, 75)).astype(np.float32) * np.exp2(rng.integers(-14, 3, (300, 1)))
    x = x.astype(np.float32)
    x[0] = 0
    amax = np.abs(x).max() * np.float32(share or 1)
    ours = fake_quantize(
        torch.from_numpy(x), None if share is None else torch.tensor(amax), BUILTIN_FORMATS["nvfp4"]
    )
    np.testing.assert_array_equal(ours.numpy(), nvfp4_reference(x, amax))


@given(rows=st.integers(1, 3), columns=st.integers(0, 150), axis=st.sampled_from([-1, 0, 1]))
@settings(deadline=None, max_examples=50)
def test_groups_equal_each_group_quantized_alone_tails_included(rows, columns, axis):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    ours = fake_quantize(x, None, Blocked(Integer(4), 32), axis=axis)
    groups = [fake_quantize(g, None, Integer(4), axis=1 - axis % 2) for g in x.split(32, axis)]
    assert torch.equal(ours, torch.cat(groups, axis))


def test_short_axes_are_blocks_of_their_own_length_and_are_not_padded():
    x = torch.randn(64, 64, 3, 3)
    for axis in (-1, 1):
        with torch.profiler.profile(profile_memory=True) as profile:
            y = fake_quantize(x, None, BUILTIN_FORMATS["mxfp4"], axis=axis)
        allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
        assert allocated < 8 * x.nbytes
        moved = x.movedim(axis, -1).contiguous()
        assert torch.equal(y, fake_quantize(moved, None, BUILTIN_FORMATS["mxfp4"]).movedim(-1, axis))


def test_given_ranges_of_groups_are_used():
    x, amax = torch.randn(4, 64), torch.rand(4, 2) + 0.5
    ours = fake_quantize(x, amax, Blocked(Integer(4), 32))
    expected = torch.cat([fake_quantize(x[:, :32], amax[:, :1], Integer(4), axis=0),
                          fake_quantize(x[:, 32:], amax[:, 1:], Integer(4), axis=0)], 1)  # fmt: skip
    assert torch.equal(ours, expected)


# --- Ranges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1), (-1, 0), (0, 1, 2)])
def test_the_kept_axes_have_ranges_of_their_own(axis):
    x = torch.randn(3, 4, 5)
    kept = () if axis is None else tuple(a % 3 for a in np.atleast_1d(axis))
    expected = torch.as_tensor(
        np.abs(x.numpy()).max(axis=tuple(d for d in range(3) if d not in kept), keepdims=axis is not None)
    )
    amax = reduce_amax(x, axis)
    assert amax.dtype == torch.float32
    assert amax.shape == expected.shape
    assert torch.equal(amax, expected)
    assert torch.equal(fake_quantize(x, None, INT8, axis=axis), fake_quantize(x, amax, INT8, axis=axis))


@pytest.mark.parametrize("name", BUILTIN_FORMATS)
def test_a_dead_tensor_gives_zeros(name):
    assert torch.equal(fake_quantize(torch.zeros(2, 40), None, BUILTIN_FORMATS[name]), torch.zeros(2, 40))
    dead = fake_quantize(torch.randn(2, 40), torch.tensor(0.0), Integer(8))
    assert torch.equal(bits(dead), bits(torch.zeros(2, 40)))


def test_zeros_of_floats_keep_their_sign_and_those_of_integers_are_positive():
    x = torch.tensor([-0.0, -1e-20, 0.0])
    for name in ("fp8_e4m3", "fp4_e2m1"):
        assert fake_quantize(x, torch.tensor(1.0), BUILTIN_FORMATS[name]).signbit().tolist() == [1, 1, 0]
    for amax in (torch.tensor(1.0), torch.ones(3)):
        assert not fake_quantize(x, amax, INT8, axis=0).signbit().any()


def test_a_dead_channel_gives_zeros_and_leaves_the_others_alone():
    x, amax = torch.randn(2, 50), torch.tensor([[0.0], [1.0]])
    y = fake_quantize(x, amax, INT8, axis=0)
    assert not y[0].any()
    assert torch.equal(y[1], fake_quantize(x[1], torch.tensor(1.0), INT8))


@pytest.mark.parametrize("name", BUILTIN_FORMATS)
@given(value=st.floats(0, 2.0**-120, width=32))
@settings(deadline=None, max_examples=20)
def test_tiny_ranges_stay_finite(name, value):
    x = torch.tensor([[value, -value, 0.0, value / 2] * 10])
    assert fake_quantize(x, None, BUILTIN_FORMATS[name]).isfinite().all()


@pytest.mark.parametrize("name", BUILTIN_FORMATS)
def test_nan_stays_nan_and_never_becomes_a_number(name):
    x = torch.ones(1, 40)
    x[0, 3] = math.nan
    assert fake_quantize(x, None, BUILTIN_FORMATS[name])[0, 3].isnan()
    if BUILTIN_FORMATS[name].block_size is None:
        fixed = fake_quantize(x, torch.tensor(2.0), BUILTIN_FORMATS[name])
        assert fixed.isnan().sum() == 1


@pytest.mark.parametrize(
    ("shape", "axis"), [((4,), 1), ((1, 4), 0), ((3, 1), None), ((2, 1, 1), 0), ((3, 4), 0)]
)
def test_a_range_that_does_not_fit_is_refused(shape, axis):
    with pytest.raises(RangeError, match="does not fit"):
        fake_quantize(torch.randn(2, 4), torch.ones(shape), INT8, axis=axis)


@pytest.mark.parametrize("shape", [(3, 4), (70,), (2, 3), (3, 3, 1), (1, 70)])
def test_a_range_that_does_not_fit_the_blocks_is_refused_and_the_error_says_what_does(shape):
    with pytest.raises(RangeError, match=r"expected \(\) or \(3, 3\)"):
        fake_quantize(torch.randn(3, 70), torch.ones(shape), Blocked(Integer(4), 32))


def test_impossible_arguments_are_refused():
    for call in (lambda x: fake_quantize(x, None, INT8), lambda x: quantize(x, None, INT8), reduce_amax):
        with pytest.raises(TypeError, match="floating point"):
            call(torch.arange(3))
    with pytest.raises(RangeError, match="axis 2"):
        reduce_amax(torch.randn(2, 4), 2)
    with pytest.raises(DescriptorError, match="one axis"):
        fake_quantize(torch.randn(2, 4), None, BUILTIN_FORMATS["mxfp4"], axis=(0, 1))
    with pytest.raises(RangeError, match="whole tensor"):
        fake_quantize(torch.randn(2, 32), torch.ones(2, 2), BUILTIN_FORMATS["nvfp4"])
    with pytest.raises(DescriptorError, match="learned"):
        fake_quantize(torch.randn(2, 32), torch.tensor(1.0, requires_grad=True), BUILTIN_FORMATS["mxfp4"])


# --- Dtypes, layouts, sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["int8", "uint8", "fp8_e4m3", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("fixed", [False, True])
def test_other_dtypes_are_computed_in_float32_and_cast_once(dtype, name, fixed):
    x = torch.randn(7, 40).to(dtype).requires_grad_()
    amax = torch.tensor(1.2345) if fixed else None
    y = fake_quantize(x, amax, BUILTIN_FORMATS[name])
    assert y.dtype == dtype
    reference = x.detach().float().requires_grad_()
    expected = fake_quantize(reference, amax, BUILTIN_FORMATS[name])
    assert torch.equal(y, expected.to(dtype))
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, reference.grad.to(dtype))


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "mxfp4"])
@pytest.mark.parametrize("size", [64, 37])
def test_channels_last_stays_channels_last(name, axis, size):
    x = torch.randn(2, size, 5, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    y = fake_quantize(last, None, BUILTIN_FORMATS[name], axis=axis)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, fake_quantize(x, None, BUILTIN_FORMATS[name], axis=axis))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_large_tensors_of_any_strides_equal_small_ones(monkeypatch, dtype, axis, layout):
    x = torch.randn(6, 10, 14).to(dtype)
    x = {
        "contiguous": x,
        "transposed": x.transpose(0, 2),
        "sliced": x[::2, :, 1:],
        "expanded": x[:1].expand(6, 10, 14),
    }[layout]
    amax = reduce_amax(x, axis) * 0.7
    whole = fake_quantize(x, amax, INT8, axis=axis)
    monkeypatch.setattr("quantpatch._rounding._PIECE", 16)
    monkeypatch.setattr("quantpatch._rounding._WHOLE", 16)
    assert torch.equal(fake_quantize(x, amax, INT8, axis=axis), whole)


@pytest.mark.parametrize("name", ["int8", "uint4", "fp8_e5m2", "mxfp8_e4m3", "nvfp4", "int4_g128"])
@pytest.mark.parametrize("shape", [(0,), (0, 40), (3, 0), (2, 0, 5)])
def test_empty_tensors_come_back_empty(name, shape):
    x = torch.empty(shape, requires_grad=True)
    y = fake_quantize(x, None, BUILTIN_FORMATS[name])
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert fake_quantize(x, torch.tensor(1.0), BUILTIN_FORMATS[name]).shape == shape


def test_a_0_dim_tensor_is_quantized():
    assert fake_quantize(torch.tensor(0.5), torch.tensor(127.0), INT8).item() == 0
    assert fake_quantize(torch.tensor(0.7), None, INT8).shape == ()
    for name in ("mxfp4", "nvfp4", "int4_g32"):
        number_format, x = BUILTIN_FORMATS[name], torch.tensor(0.7)
        expected = fake_quantize(x.reshape(1), None, number_format).squeeze()
        assert torch.equal(fake_quantize(x, None, number_format), expected)
        assert torch.equal(dequantize(*quantize(x, None, number_format), number_format), expected)


@pytest.mark.parametrize("name", BUILTIN_FORMATS)
def test_meta_tensors_have_the_right_shape(name):
    x = torch.empty(3, 40, device="meta", dtype=torch.bfloat16)
    y = fake_quantize(x, None, BUILTIN_FORMATS[name])
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("name", BUILTIN_FORMATS)
def test_codes_and_scale_give_the_same_values_back(name, axis):
    number_format, x = BUILTIN_FORMATS[name], torch.randn(40, 70)
    codes, scale = quantize(x, None, number_format, axis=axis)
    assert codes.shape == x.shape
    if "int" in name:
        assert codes.dtype == (torch.uint8 if name.startswith("uint") else torch.int8)
    assert torch.equal(
        dequantize(codes, scale, number_format, axis=axis), fake_quantize(x, None, number_format, axis=axis)
    )


def test_the_input_is_left_alone():
    x, amax = torch.randn(3, 64), torch.tensor(1.0)
    before = x.clone()
    for number_format in BUILTIN_FORMATS.values():
        fake_quantize(x, None, number_format)
        fake_quantize(x, amax, number_format)
    assert torch.equal(x, before)
    assert amax.item() == 1


# --- Gradients --------------------------------------------------------------------------------------------

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
    expected = (ds * upstream).sum(1, keepdim=True) / 7 / math.sqrt(50 * 7)
    torch.testing.assert_close(amax.grad.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("number_format", [INT8, UINT8, Integer(3), Integer(8, narrow_range=True)], ids=str)
def test_of_a_learned_range_one_rule_decides_both_gradients(number_format):
    # Equations 3 and 5 of LSQ: inside is format.min < v < format.max, without the ends.
    low, high = number_format.min, number_format.max
    v = torch.tensor([low - 1, low, low + 0.25, low + 0.75, 0.3, high - 0.25, high, high + 1])
    inside = (v > low) & (v < high)
    for value, is_inside in zip(v, inside, strict=True):
        x, amax = value.reshape(1).requires_grad_(), torch.tensor(high, requires_grad=True)
        y = fake_quantize(x, amax, number_format)
        y.sum().backward()
        assert x.grad.item() == is_inside
        slope = y.detach() - x.detach() if is_inside else value.clamp(low, high)
        torch.testing.assert_close(amax.grad, slope.sum() / high / math.sqrt(high))


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
    difference = (wider - narrower) / (2 * step) / math.sqrt(6 * 127)
    torch.testing.assert_close(amax.grad, difference)


def test_a_dynamic_range_of_a_signed_format_hands_the_gradient_itself_back():
    x, upstream = torch.randn(50, requires_grad=True), torch.randn(50)
    (grad,) = torch.autograd.grad(fake_quantize(x, None, INT8), x, upstream)
    assert grad.data_ptr() == upstream.data_ptr()


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
@pytest.mark.parametrize("axis", [0, 1, (0, 2)])
def test_channels_have_their_own_ranges_in_backward_too(monkeypatch, layout, axis):
    monkeypatch.setattr("quantpatch._rounding._PIECE", 100)
    x = torch.randn(4, 6, 9, 5)
    if layout != "contiguous":
        x = x.transpose(1, 3) if layout == "transposed" else x.contiguous(memory_format=torch.channels_last)
    amax = reduce_amax(x, axis) * 0.4
    assert torch.equal(gradient(x, amax, INT8, axis), 3.0 * (x.abs() <= amax))
    assert torch.equal(gradient(x, amax, UINT8, axis), 3.0 * ((x >= 0) & (x <= amax)))


@pytest.mark.parametrize("value", [1.0, 1.9999999, 1.1754944e-38, 1e-45, 3.4e38])
def test_the_mask_of_channels_is_exact_at_the_ends(value):
    amax = torch.tensor([[value], [value]])
    above = torch.nextafter(amax, torch.tensor(math.inf))
    x = torch.cat([amax, -amax, above, -above, amax * 0], 1)
    assert torch.equal(gradient(x, amax, INT8, 0), torch.tensor([3.0, 3, 0, 0, 3]).expand(2, 5))


def test_gradients_of_gradients_flow_through_the_upstream_gradient():
    x = (torch.randn(4, 9) * 2).requires_grad_()
    upstream = torch.randn(4, 9, requires_grad=True)
    for amax in (torch.tensor(1.0), torch.ones(4, 1)):
        y = fake_quantize(x, amax, INT8, axis=0)
        (grad,) = torch.autograd.grad(y, x, upstream, create_graph=True)
        (twice,) = torch.autograd.grad(grad.sum(), upstream)
        assert torch.equal(twice, (x.detach().abs() <= 1).float())


def saved_for_backward(x, amax, number_format, **kwargs):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize(x, amax, number_format, **kwargs)
    return [t for t in saved if t.numel() > 4]


def test_nothing_is_kept_for_backward_where_the_range_is_the_tensors_own():
    x = torch.randn(8, 64, requires_grad=True)
    for name in ("int8", "fp8_e4m3", "mxfp4", "nvfp4", "int4_g32"):
        assert not saved_for_backward(x, None, BUILTIN_FORMATS[name]), name


@pytest.mark.parametrize("leaf", [True, False])
def test_no_new_memory_is_kept_for_backward_with_a_fixed_or_learned_range(leaf):
    x = torch.randn(8, 64, requires_grad=True)
    x = x if leaf else x * 1
    for amax in (torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)):
        saved = saved_for_backward(x, amax, INT8)
        assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_without_a_gradient_nothing_but_the_result_is_allocated():
    x, amax = torch.randn(100_000), torch.tensor(1.0)
    for number_format in (INT8, UINT8):
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            fake_quantize(x, amax, number_format)
        allocated = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
        assert 400_000 <= allocated < 410_000


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


# --- Compilation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        ("int8", True),
        ("int8", False),
        ("uint8", False),
        ("fp8_e4m3", True),
        ("mxfp4", False),
        ("nvfp4", False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_compiled_with_dynamic_shapes_it_equals_eager_bit_for_bit(name, fixed):
    number_format, amax = BUILTIN_FORMATS[name], torch.tensor(1.1) if fixed else None
    backend = "inductor" if name == "int8" else "aot_eager"

    def function(x):
        return fake_quantize(x * 2, amax, number_format) + 1

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for rows in (3, 6):
        x = torch.randn(rows, 70, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)  # an error if it had to be specialised
        eager, fused = function(x), compiled(x)
        assert torch.equal(bits(eager), bits(fused))
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (eager, fused)]
        assert torch.equal(*grads)
    with torch.no_grad():
        assert torch.equal(bits(compiled(x)), bits(function(x)))


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
