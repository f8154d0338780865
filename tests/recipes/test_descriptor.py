"""``QuantDescriptor`` and ``Recipe``: values that refuse what cannot be."""

from __future__ import annotations

import copy
import pickle

import attrs
import pytest

from quantpatch.errors import ArgumentError, ArgumentTypeError
from quantpatch.numerics.formats import BUILTIN_FORMATS, Float, Integer
from quantpatch.plugins.registry import registry
from quantpatch.recipes.descriptor import CHANNEL, REDUCTION, QuantDescriptor, Recipe

BAD = [
    ({"num_bits": 1}, "1"),
    ({"num_bits": 9}, "9"),
    ({"num_bits": "8"}, r"num_bits='8'\): expected an int from 2 to 8"),
    ({"num_bits": True}, r"num_bits=True\): expected an int"),
    ({"num_bits": 8.0}, "expected an int"),
    ({"num_bits": (4, 3, 1)}, r"expected an int, or \(exponent, mantissa\) bits"),
    ({"num_bits": (4, 9)}, "there is no format Float"),
    ({"num_bits": (4, 3), "unsigned": True}, "float formats are signed"),
    ({"unsigned": True, "narrow_range": True}, "narrow_range"),
    ({"zero_point": 37}, "Write unsigned=True, zero_point=37"),
    ({"unsigned": True, "zero_point": 255}, "an integer from 0 to 254"),
    ({"num_bits": 4, "unsigned": True, "zero_point": 15}, "an integer from 0 to 14"),
    ({"num_bits": (4, 3), "zero_point": 1}, "float formats have none"),
    ({"axis": "row"}, r"axis='row'\): expected an int, a tuple of ints, 'channel', 'reduction' or None"),
    ({"axis": 1.5}, "expected an int, a tuple"),
    ({"axis": True}, "expected an int, a tuple"),
    ({"axis": ()}, "expected an int, a tuple"),
    ({"axis": (0, "1")}, "expected an int, a tuple"),
    ({"amax": -1.0}, r"amax=-1.0\): expected a positive finite number or None"),
    ({"amax": 0}, "positive"),
    ({"amax": float("nan")}, "positive finite"),
    ({"amax": float("inf")}, "positive finite"),
    ({"amax": "1"}, "positive finite"),
    ({"scale_amax": 0.0}, r"scale_amax=0.0\): expected a positive"),
    ({"method": None}, r"method=None\): expected a calibrator's name"),
    ({"format": 8}, r"format=8\): expected a NumberFormat, the name of one, or None"),
    ({"dynamic": True, "amax": 1.0}, "leave out amax or dynamic"),
    ({"dynamic": True, "learn_amax": True}, "leave out learn_amax or dynamic"),
    ({"dynamic": True, "scale_amax": 0.5}, "leave out scale_amax or dynamic"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: repr(value)[:40])
def test_bad_input_is_refused(fields, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        QuantDescriptor(**fields)
    assert caught.value.argument


@pytest.mark.parametrize(
    "fields",
    [
        {"num_bits": "8"},
        {"num_bits": True},
        {"axis": 1.5},
        {"axis": (0, "1")},
        {"groups": 2.0},
        {"amax": "1"},
        {"unsigned": 1},
        {"method": None},
        {"format": 8},
    ],
    ids=repr,
)
def test_a_value_of_a_wrong_type_is_a_type_error_too(fields):
    with pytest.raises(ArgumentTypeError) as caught:
        QuantDescriptor(**fields)
    assert isinstance(caught.value, TypeError)
    assert {caught.value.argument: caught.value.value} == fields


@pytest.mark.parametrize("fields", [{"num_bits": 9}, {"axis": "row"}, {"axis": ()}, {"amax": -1.0}], ids=repr)
def test_a_wrong_value_of_the_right_type_is_not_a_type_error(fields):
    with pytest.raises(ArgumentError) as caught:
        QuantDescriptor(**fields)
    assert not isinstance(caught.value, TypeError)


def test_formats():
    assert QuantDescriptor().number_format == Integer(8)
    assert QuantDescriptor(num_bits=4, unsigned=True).number_format == Integer(4, unsigned=True)
    assert QuantDescriptor(num_bits=4, narrow_range=True).number_format == Integer(4, narrow_range=True)
    affine = QuantDescriptor(unsigned=True, zero_point=37)
    assert affine.number_format == Integer(8, unsigned=True)
    assert registry.format(QuantDescriptor(format="uint8", zero_point=37)) == affine.number_format
    with pytest.raises(ArgumentError, match="Write unsigned=True, zero_point=37"):
        QuantDescriptor(format=Integer(8), zero_point=37)
    assert QuantDescriptor(num_bits=(5, 2)).number_format == Float(5, 2)
    assert QuantDescriptor(num_bits=[5, 2]).number_format == Float(5, 2)
    assert QuantDescriptor(format=BUILTIN_FORMATS["mxfp4"]).number_format is BUILTIN_FORMATS["mxfp4"]
    assert QuantDescriptor(format="mxfp4").number_format is None  # the registry knows


def test_axes_are_filled_in_by_a_layer():
    plain = QuantDescriptor(axis=[0, 1])
    assert plain.axis == (0, 1)
    assert plain.for_axes(3, 4) is plain
    channel, reduction = QuantDescriptor(axis=CHANNEL), QuantDescriptor(axis=REDUCTION)
    assert channel.kept_axes is None
    assert reduction.kept_axes is None
    assert channel.for_axes(1, 0).kept_axes == 1
    assert reduction.for_axes(1, 0).kept_axes == 0
    assert channel.for_axes(None, -1).kept_axes is None
    assert channel.for_axes(1, 0) is channel.for_axes(1, 0)  # made once
    assert [reduction.for_channel_axis(axis).axis for axis in (0, 1, None)] == [1, 0, -1]


def test_they_are_values():
    descriptor = QuantDescriptor(num_bits=4, axis=0)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        descriptor.num_bits = 8
    assert descriptor == QuantDescriptor(num_bits=4, axis=0)
    assert hash(descriptor) == hash(QuantDescriptor(num_bits=4, axis=0))
    for twin in (pickle.loads(pickle.dumps(descriptor)), copy.deepcopy(descriptor), attrs.evolve(descriptor)):
        assert twin == descriptor
        assert twin.number_format == Integer(4)
    with pytest.raises(TypeError):
        QuantDescriptor(8)
    recipe = Recipe(name="mine")
    assert recipe.weight == QuantDescriptor(axis=CHANNEL, narrow_range=True)
    assert recipe.input == QuantDescriptor()
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_of_three_axes_blocks_run_along_the_one_that_is_not_an_output_channel() -> None:
    blocks = QuantDescriptor(format="mxfp8_e4m3", axis=REDUCTION, dynamic=True)
    assert blocks.for_channel_axis((0, 1)).axis == 2
    assert blocks.for_channel_axis((0, 2)).axis == 1
    assert QuantDescriptor(axis=CHANNEL).for_channel_axis((0, 2)).axis == (0, 2)


@pytest.mark.parametrize("operand", ["input", "weight", "output", "hidden"])
def test_a_recipe_holds_descriptors(operand):
    with pytest.raises(ArgumentTypeError, match=rf"Recipe\({operand}='int8'\): expected a QuantDescriptor"):
        Recipe(name="mine", **{operand: "int8"})


def test_one_name_in_include_is_a_list_of_one():
    assert Recipe(name="mine", include="Embedding").include == ("Embedding",)
