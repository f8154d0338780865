"""Fake quantization against onnxruntime, ml_dtypes and specifications written out in numpy."""

import functools
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

from quantpatch.errors import ArgumentError, ArgumentTypeError, RangeError
from quantpatch.numerics.fake_quant import dequantize, fake_quantize, quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS, Blocked, Float, Integer
from quantpatch.numerics.ranges import reduce_amax

# Both in torch's operations and in kernels of our own.
pytestmark = pytest.mark.parametrize("kernels", [False, True], ids=["operations", "kernels"], indirect=True)

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
def onnx_session(onnx_type, axis=None, zero_point=0):
    """A graph of QuantizeLinear and DequantizeLinear, run as written."""
    count = 1 if axis is None else 3
    zero = helper.make_tensor("zero", onnx_type, [] if axis is None else [3], [zero_point] * count)
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


@functools.cache
def whole_quantizer():
    """QuantizeLinear to uint8 and DequantizeLinear, whose zero point is an input."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy")
    scale = helper.make_tensor_value_info("scale", TensorProto.FLOAT, [])
    zero = helper.make_tensor_value_info("zero", TensorProto.UINT8, [])
    q = helper.make_tensor_value_info("q", TensorProto.UINT8, ["n"])
    graph = helper.make_graph(nodes, "qdq", [x, scale, zero], [y, q])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@given(
    zero_point=st.integers(0, 254),
    amax=st.floats(2.0**-100, 2.0**100, width=32),
    values=st.lists(st.floats(width=32, allow_nan=False), max_size=20),
    one_each=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_every_zero_point_equals_onnxruntime_bit_for_bit(zero_point, amax, values, one_each):
    number_format = Integer(8)
    scale = np.float32(amax) / np.float32(255 - zero_point)
    with np.errstate(over="ignore"):  # values near the largest float
        x = np.concatenate([hard_values(scale, 255, 2000), np.array(values, np.float32)])
    feed = {"x": x, "scale": np.array(scale), "zero": np.array(zero_point, np.uint8)}
    theirs, their_codes = map(torch.from_numpy, whole_quantizer().run(None, feed))
    range_ = torch.full((1,) if one_each else (), amax)
    ours = fake_quantize(torch.from_numpy(x), range_, number_format, zero_point=zero_point)
    codes, own_scale = quantize(torch.from_numpy(x), range_, number_format, zero_point=zero_point)
    assert torch.equal(bits(ours), bits(theirs))
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, their_codes)
    back = dequantize(codes, own_scale, number_format, zero_point=zero_point)
    assert torch.equal(bits(back), bits(theirs))


@pytest.mark.sweep(7)
@pytest.mark.parametrize("shift", [-9.0, -1.0, -0.2, 0.0, 0.5, 9.0])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("zero_point", [1, 37, 128, 200, 254])
def test_a_range_of_its_own_with_a_zero_point_clips_nothing_and_is_the_smallest(zero_point, axis, shift):
    number_format = Integer(8)
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)) + shift
    codes, scale = quantize(x, None, number_format, axis=axis, zero_point=zero_point)
    error = (fake_quantize(x, None, number_format, axis=axis, zero_point=zero_point) - x).abs()
    assert (error <= scale * 0.50001).all()
    ends = codes if axis == 0 else codes.reshape(1, -1)
    assert ((ends.amin(1) == 0) | (ends.amax(1) == 255)).all()


@given(
    width=st.integers(2, 8),
    kind=st.sampled_from([{}, {"unsigned": True}, {"narrow_range": True}]),
    amax=st.floats(2.0**-100, 2.0**100, width=32),
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50),
)
@settings(deadline=None, max_examples=100)
def test_every_integer_format_follows_the_formula(width, kind, amax, values):
    number_format = Integer(width, **kind)
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


@given(
    rows=st.integers(1, 3),
    columns=st.integers(0, 300),
    axis=st.sampled_from([-1, 0, 1]),
    size=st.sampled_from([32, 128]),
)
@settings(deadline=None, max_examples=60)
def test_groups_equal_each_group_quantized_alone_tails_included(rows, columns, axis, size):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    ours = fake_quantize(x, None, Blocked(Integer(4), size), axis=axis)
    groups = [fake_quantize(g, None, Integer(4), axis=1 - axis % 2) for g in x.split(size, axis)]
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
    amax = reduce_amax(x, axis=axis)
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
        with pytest.raises(ArgumentTypeError, match="floating-point"):
            call(torch.arange(3))
    with pytest.raises(RangeError, match="axis 2"):
        reduce_amax(torch.randn(2, 4), axis=2)
    with pytest.raises(ArgumentError, match="one axis"):
        fake_quantize(torch.randn(2, 4), None, BUILTIN_FORMATS["mxfp4"], axis=(0, 1))
    with pytest.raises(RangeError, match="whole tensor"):
        fake_quantize(torch.randn(2, 32), torch.ones(2, 2), BUILTIN_FORMATS["nvfp4"])
    with pytest.raises(ArgumentError, match="learned"):
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


@pytest.mark.parametrize("axis", [None, 1, -4])
@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "mxfp4", "nvfp4"])
def test_so_do_channels_last_in_three_dimensions_and_transposed_tensors(name, axis):
    x = torch.randn(2, 8, 3, 4, 5)
    expected = fake_quantize(x, None, BUILTIN_FORMATS[name], axis=axis)
    y = fake_quantize(
        x.contiguous(memory_format=torch.channels_last_3d), None, BUILTIN_FORMATS[name], axis=axis
    )
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(y, expected)
    transposed = x.transpose(1, 4).contiguous().transpose(1, 4)
    y = fake_quantize(transposed, None, BUILTIN_FORMATS[name], axis=axis)
    assert y.stride() == transposed.stride()
    assert torch.equal(y, expected)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_tensors_of_any_strides_are_rounded_as_their_contiguous_copies(dtype, axis, layout):
    x = torch.randn(6, 10, 14).to(dtype)
    x = {
        "contiguous": x,
        "transposed": x.transpose(0, 2),
        "sliced": x[::2, :, 1:],
        "expanded": x[:1].expand(6, 10, 14),
    }[layout]
    amax = reduce_amax(x, axis=axis) * 0.7
    copied = fake_quantize(x.contiguous(), amax, INT8, axis=axis)
    assert torch.equal(fake_quantize(x, amax, INT8, axis=axis), copied)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("ranges", [[1.0, 2.7182817, 1e-6, 6.5e4], [1e30, 0.0, 1.17e-38, 3.3e-37]], ids=str)
def test_channels_are_rounded_bit_for_bit_as_the_formula_says(narrow, needs_grad, outside, ranges):
    generator = torch.Generator().manual_seed(0)
    number_format = Integer(8, narrow_range=narrow)
    amax = torch.tensor(ranges)[:, None]
    scale = amax / 127
    ties = (torch.randint(-260, 260, (4, 4096), generator=generator) / 2) * scale
    near = torch.stack([torch.nextafter(ties, torch.full_like(ties, end)) for end in (-math.inf, math.inf)])
    patterns = torch.randint(-(2**31), 2**31 - 1, (4, 8192), generator=generator).int().view(torch.float32)
    x = torch.cat([ties, *near, patterns, torch.tensor([0.0, -0.0, math.inf, -math.inf]).expand(4, 4)], 1)
    x = x.where(~x.isnan(), 0.0)
    x = x if outside else torch.minimum(torch.maximum(x, -amax), amax)
    expected = (x / scale.where(scale > 0, 1.0)).round().clamp(number_format.min, number_format.max)
    expected = expected.mul(scale).add(0.0)
    for values, ends, axis in ((x, amax, 0), (x.T.contiguous().T, amax, 0), (x.T.contiguous(), amax.T, 1)):
        y = fake_quantize(values.clone().requires_grad_(needs_grad), ends, number_format, axis=axis)
        y = y.detach() if axis == 0 else y.detach().T
        assert torch.equal(y.contiguous().view(torch.int32), expected.view(torch.int32))


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


@pytest.mark.sweep(4)
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
