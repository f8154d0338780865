"""Formats as values: what they hold, what they refuse, and that rounding hits published grids."""

import math
import pickle

import attrs
import ml_dtypes
import numpy as np
import pytest
import torch

from quantpatch.errors import ArgumentError
from quantpatch.numerics import formats
from quantpatch.numerics.formats import (
    BUILTIN_FORMATS,
    Blocked,
    Float,
    Integer,
    NumberFormat,
    OnnxCodes,
)

ML_DTYPES = {
    (4, 3): ml_dtypes.float8_e4m3fn,
    (5, 2): ml_dtypes.float8_e5m2,
    (2, 3): ml_dtypes.float6_e2m3fn,
    (3, 2): ml_dtypes.float6_e3m2fn,
    (2, 1): ml_dtypes.float4_e2m1fn,
}


def codes_of(pair):
    """Every finite value of a format, sorted, from ml_dtypes' table."""
    bits = 1 + sum(pair)
    values = np.arange(2**bits, dtype=np.uint8).view(ML_DTYPES[pair]).astype(np.float32)
    return np.unique(values[np.isfinite(values)])


def rounded(number_format, values):
    return number_format.round_(torch.tensor(values, dtype=torch.float32)).numpy()


@pytest.mark.parametrize("name", BUILTIN_FORMATS)
def test_a_builtin_format_is_a_value_under_its_own_name(name):
    number_format = BUILTIN_FORMATS[name]
    again = pickle.loads(pickle.dumps(number_format))
    assert number_format.name == str(number_format) == name
    assert again == number_format
    assert hash(again) == hash(number_format)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        number_format.bits = 3


def test_every_format_the_documentation_names_is_built_in():
    integers = {f"{u}int{b}" for u in ("", "u") for b in range(2, 9)}
    floats = {"fp8_e4m3", "fp8_e5m2"}
    mx = {"mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8"}
    assert integers | floats | mx | {"nvfp4", "int4_g32", "int4_g128"} <= set(BUILTIN_FORMATS)


@pytest.mark.parametrize(
    ("number_format", "low", "high"),
    [
        (Integer(8), -128, 127),
        (Integer(8, narrow_range=True), -127, 127),
        (Integer(8, unsigned=True), 0, 255),
        (Integer(2), -2, 1),
        (Integer(4, unsigned=True), 0, 15),
        (Float(4, 3), -448, 448),
        (Float(5, 2), -57344, 57344),
        (Float(2, 1), -6, 6),
        (Float(2, 3), -7.5, 7.5),
        (Float(3, 2), -28, 28),
    ],
)
def test_the_ends_of_the_grid_are_reached_and_not_passed(number_format, low, high):
    assert (number_format.min, number_format.max) == (low, high)
    assert rounded(number_format, [-np.inf, -1e38, 1e38, np.inf]).tolist() == [low, low, high, high]


@pytest.mark.parametrize("pair", ML_DTYPES, ids=str)
def test_every_code_of_a_float_format_rounds_to_itself(pair):
    codes = codes_of(pair)
    np.testing.assert_array_equal(rounded(Float(*pair), codes), codes)


@pytest.mark.parametrize("pair", ML_DTYPES, ids=str)
def test_all_bfloat16_values_round_to_the_bits_of_ml_dtypes_the_sign_of_zero_among_them(pair):
    values = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    values = values[np.isfinite(values)]
    top = Float(*pair).max
    expected = values.clip(-top, top).astype(ML_DTYPES[pair]).astype(np.float32)
    ours = rounded(Float(*pair), values)
    np.testing.assert_array_equal(ours.view(np.int32), expected.view(np.int32))
    assert np.signbit(rounded(Float(*pair), [-0.0, -1e-30])).all()


@pytest.mark.parametrize("pair", ML_DTYPES, ids=str)
def test_midpoints_of_a_float_format_and_their_neighbours_round_as_ml_dtypes_does(pair):
    codes = codes_of(pair)
    middle = (codes[1:] + codes[:-1]) / 2
    assert np.all((codes[:-1] < middle) & (middle < codes[1:]))
    values = np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    np.testing.assert_array_equal(
        rounded(Float(*pair), values), values.astype(ML_DTYPES[pair]).astype(np.float32)
    )


@pytest.mark.parametrize("pair", ML_DTYPES, ids=str)
def test_random_values_of_every_size_round_as_ml_dtypes_does_and_saturate(pair):
    bits = np.random.default_rng(0).integers(0, 2**32, 400_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    top = Float(*pair).max
    expected = values.clip(-top, top).astype(ML_DTYPES[pair]).astype(np.float32)
    np.testing.assert_array_equal(rounded(Float(*pair), values), expected)


@pytest.mark.parametrize("name", ["int8", "uint4", "fp8_e4m3", "fp4_e2m1"])
def test_nan_stays_nan(name):
    assert np.isnan(rounded(BUILTIN_FORMATS[name], [np.nan])).all()


def test_rounding_is_in_place():
    y = torch.tensor([0.4, 1.5])
    assert Integer(8).round_(y) is y
    assert Float(4, 3).round_(y) is y


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Integer(1), "bits"),
        (lambda: Integer(9), "bits"),
        (lambda: Integer(True), "bits"),
        (lambda: Integer(8, unsigned=True, narrow_range=True), "narrow_range"),
        (lambda: Float(3, 4), "exponent_bits"),
        (lambda: Blocked(Integer(4), 0), "block_size"),
        (lambda: Blocked(Integer(4), 32, "int8"), "scale"),
        (lambda: Blocked(BUILTIN_FORMATS["mxfp4"], 32), "element"),
        (lambda: Blocked("int4", 32), "element"),
    ],
)
def test_impossible_formats_are_refused_and_the_error_names_the_argument(make, argument):
    with pytest.raises(ArgumentError) as error:
        make()
    assert error.value.argument == argument


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda: Integer("8"), True),
        (lambda: Integer(9), False),
        (lambda: Integer(8, unsigned=1), True),
        (lambda: Blocked("int4", 32), True),
        (lambda: Blocked(BUILTIN_FORMATS["mxfp4"], 32), False),
        (lambda: Blocked(Integer(4), 32.0), True),
        (lambda: Blocked(Integer(4), 0), False),
    ],
)
def test_only_a_value_of_a_wrong_type_is_a_type_error(make, wrong):
    with pytest.raises(ArgumentError) as error:
        make()
    assert isinstance(error.value, TypeError) is wrong


def test_blocks_of_unusual_size_are_named_after_it():
    assert Blocked(Integer(4), 48).name == "int4_g48"
    assert Blocked(Float(2, 1), 64, "e8m0").name == "mxfp4_e2m1_g64"


def test_a_format_of_a_plugin_needs_a_name_bits_a_maximum_and_rounding():
    @attrs.frozen
    class Ternary(NumberFormat):
        name = "ternary"
        bits = 2
        max = 1.0

        def round_(self, y):
            return y.round_().clamp_(-1, 1)

    assert (Ternary().min, Ternary().block_size) == (-1.0, None)
    assert Ternary().round_(torch.tensor([-5.0, 0.3])).tolist() == [-1, 0]


def test_what_torch_jit_trace_writes_down_gives_the_same_powers_of_two(monkeypatch):
    patterns = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(0))
    edges = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 2.0**-126, -(2.0**-126), 3.4028235e38]
    y = torch.cat([patterns.to(torch.int32).view(torch.float32), torch.tensor(edges)])
    expected = formats._power_below(y)
    monkeypatch.setattr(torch._C, "_is_tracing", lambda: True)
    assert torch.equal(formats._power_below(y), expected)


@pytest.mark.parametrize(
    ("number_format", "type", "opset"),
    [
        (Integer(8), "INT8", 10),
        (Integer(5, unsigned=True), "UINT8", 10),
        (Integer(4, narrow_range=True), "INT4", 10),
        (Integer(3, unsigned=True), "UINT4", 10),
        (Float(4, 3), "FLOAT8E4M3FN", 19),
        (Float(5, 2), "FLOAT8E5M2", 19),
        (Blocked(Integer(4), 32), "INT4", 21),
        (Blocked(Integer(8, narrow_range=True), 32, "e8m0"), "INT8", 21),
    ],
)
def test_a_format_says_what_holds_its_codes_in_an_onnx_file(number_format, type, opset):
    assert number_format.onnx == OnnxCodes(type, opset=opset)


@pytest.mark.parametrize(
    "number_format",
    [Float(2, 1), Float(3, 2), Blocked(Float(4, 3), 32, "e8m0"), Blocked(Integer(4), 16, "e4m3")],
)
def test_what_onnx_has_no_operators_for_is_in_no_file(number_format):
    assert number_format.onnx is None


def test_a_child_that_rounds_otherwise_does_not_inherit_what_its_parent_is_in_a_file():
    class Down(Integer):
        def round_(self, y):
            return y.floor_()

    class Renamed(Integer):
        pass

    assert Down(8).onnx is None
    assert Renamed(8).onnx == Integer(8).onnx


def test_an_unknown_type_of_codes_is_named():
    with pytest.raises(ArgumentError, match="one of INT4, UINT4, .* got 'int7'"):
        OnnxCodes("int7")
