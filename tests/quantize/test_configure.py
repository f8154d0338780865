"""``configure``: ordered rules on the names of quantizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ArgumentError, ArgumentTypeError, UnknownNameError
from quantpatch.layers.placed import quantize_output_of

INT4 = qp.QuantDescriptor(num_bits=4)


@pytest.fixture
def model():
    with qp.quantize_modules():
        built = nn.Sequential()
        built.stem = nn.Conv2d(3, 4, 1)
        built.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        built.head = nn.Linear(4, 2)
        return built


def states(model):
    return {row.name: (row.format, row.state) for row in qp.summary(model).rows}


def formats(model):
    return {row.name: row.format for row in qp.summary(model).rows if row.state != "disabled"}


def disabled(model):
    return {row.name for row in qp.summary(model).rows if row.state == "disabled"}


def test_a_glob_on_a_modules_name_takes_all_its_quantizers(model):
    qp.configure(model, {"body": None})
    assert disabled(model) == {f"body.{i}.{o}_quantizer" for i in (0, 1) for o in ("input", "weight")}


def test_a_glob_on_a_quantizers_name_takes_it_alone(model):
    qp.configure(model, {"*.0.input_quantizer": None})
    assert disabled(model) == {"body.0.input_quantizer"}


def test_a_regular_expression_matches_the_whole_name(model):
    qp.configure(model, {r"re:body\.\d\.weight_quantizer": None})
    assert disabled(model) == {"body.0.weight_quantizer", "body.1.weight_quantizer"}


def test_the_first_and_the_last_layer_are_those_with_weights(model):
    around = nn.Sequential()
    with qp.quantize_modules():
        around.pool_before = nn.AvgPool2d(1)
    around.model = model
    with qp.quantize_modules():
        around.pool_after = nn.AvgPool2d(1)
    qp.configure(around, {":first": None, ":last": "int4"})
    assert disabled(around) == {"model.stem.input_quantizer", "model.stem.weight_quantizer"}
    bits4 = {name for name, format in formats(around).items() if format.startswith("int4")}
    assert bits4 == {"model.head.input_quantizer", "model.head.weight_quantizer"}


def test_the_only_layer_is_the_first_and_the_last():
    with qp.quantize_modules(recipe=qp.Recipe(name="edges float", rules={":last": None})) as scope:
        only = nn.Linear(2, 2)
    assert scope.replaced[0].count == 1
    assert disabled(only) == {"input_quantizer", "weight_quantizer"}
    qp.configure(only, {":first": "int8"})
    assert disabled(only) == set()


def test_another_word_with_a_colon_is_refused(model):
    with pytest.raises(ArgumentError, match="':frist' is not a pattern; write ':first' or ':last'"):
        qp.configure(model, {":frist": None})


def test_a_model_without_such_a_layer_has_no_first_one():
    with qp.quantize_modules():
        pool = nn.Sequential(nn.AvgPool2d(1))
    with pytest.raises(ArgumentError, match="':first' matches no layer"):
        qp.configure(pool, {":first": None})


def test_a_class_takes_its_layers(model):
    qp.configure(model, {nn.Conv2d: None})
    assert disabled(model) == {"stem.input_quantizer", "stem.weight_quantizer"}


def test_a_function_sees_name_and_layer(model):
    qp.configure(model, [(lambda name, layer: getattr(layer, "out_features", 0) == 2, None)])
    assert disabled(model) == {"head.input_quantizer", "head.weight_quantizer"}


def test_the_last_match_wins(model):
    qp.configure(model, [("*", None), ("head", INT4), ("head.weight_quantizer", None)])
    assert formats(model) == {"head.input_quantizer": "int4"}


def test_a_recipe_gives_each_operand_its_own_descriptor(model):
    qp.configure(model, {"head": "int4"})
    assert formats(model)["head.weight_quantizer"] == "int4_narrow"
    assert model.head.weight_quantizer.descriptor.axis == 0
    assert formats(model)["stem.input_quantizer"] == "int8"


def test_an_operand_that_the_recipe_leaves_float_is_disabled(model):
    qp.configure(model, {"head": "int8-weight-only"})
    assert disabled(model) == {"head.input_quantizer"}


def test_a_quantizer_that_is_missing_is_added(model):
    with qp.quantize_modules(recipe="int8-weight-only"):
        layer = nn.Linear(2, 2)
    qp.configure(layer, {"input_quantizer": INT4})
    assert formats(layer)["input_quantizer"] == "int4"


class Own(nn.Module):
    """A module with a quantizer that no quantized layer has."""

    def __init__(self):
        super().__init__()
        self.mine = qp.TensorQuantizer()


@pytest.mark.parametrize("pattern", ["own", "own.mine", "*.mine", Own, lambda name, layer: name == "own"])
def test_quantizers_that_no_layer_has_are_set_as_well(model, pattern):
    model.own = Own()
    qp.configure(model, {pattern: None})
    assert disabled(model) == {"own.mine"}
    qp.configure(model, {pattern: INT4})
    assert (formats(model)["own.mine"], formats(model)["head.input_quantizer"]) == ("int4", "int8")
    qp.configure(model, {pattern: "fp8"})
    assert formats(model)["own.mine"] == "fp8_e4m3"
    qp.configure(model, {pattern: "int8-weight-only"})
    assert disabled(model) == {"own.mine"}


def test_a_quantizer_that_a_user_gave_a_layer_is_set_by_a_recipe_as_an_input_is(model):
    model.head.mine = qp.TensorQuantizer()
    qp.configure(model, {"head": "fp8"})
    assert formats(model)["head.mine"] == "fp8_e4m3"


@pytest.mark.parametrize("training", [True, False])
def test_a_new_quantizer_is_in_the_mode_of_its_layer(model, training):
    model.train(training)
    before = model.head.weight_quantizer
    qp.configure(model, {"head": "int4"})
    assert model.head.weight_quantizer is not before
    assert model.head.weight_quantizer.training is training


def test_the_class_of_quantizers_takes_all_of_them(model):
    model.own = Own()
    qp.configure(model, {qp.TensorQuantizer: None})
    assert disabled(model) == set(states(model))


def test_a_quantizer_that_is_placed_and_shared_stays_shared_and_on_where_a_rule_is_for_all():
    with qp.quantize_modules():
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU()).eval()
    shared = model[2].input_quantizer
    quantize_output_of(model[1], shared)
    qp.configure(model, {"1": None})
    assert shared.disabled
    qp.configure(model, {"*": "int4"})
    assert model[1].output_quantizer is model[2].input_quantizer is not shared
    assert formats(model)["1.output_quantizer"] == "int4"
    qp.configure(model, {"1.output_quantizer": "int8"})
    assert model[2].input_quantizer.format.name == "int4"
    assert model[1].output_quantizer.format.name == "int8"


def test_an_output_quantizer_can_be_added(model):
    qp.configure(model, {"head.output_quantizer": INT4})
    assert formats(model)["head.output_quantizer"] == "int4"
    assert "body.0.output_quantizer" not in formats(model)


def test_a_range_is_kept_unless_the_descriptor_changes(model):
    model.head.input_quantizer.amax = 3.0
    model.body[0].input_quantizer.amax = 3.0
    qp.configure(model, {"head": qp.QuantDescriptor(), "body": INT4})
    assert model.head.input_quantizer.amax == 3.0
    assert model.body[0].input_quantizer.amax is None


def test_a_disabled_quantizer_is_enabled_again_with_its_range(model):
    model.head.input_quantizer.amax = 3.0
    qp.configure(model, {"head": None})
    qp.configure(model, {"head": "int8"})
    assert model.head.input_quantizer.state == "calibrated"


def test_a_pattern_that_matches_nothing_is_an_error_with_near_misses_and_changes_nothing(model):
    before = states(model)
    with pytest.raises(ArgumentError, match=r"'haed'.*'head'") as caught:
        qp.configure(model, {"body": None, "haed": None})
    assert caught.value.value == "haed"
    assert states(model) == before


def test_a_rule_may_make_a_layer_float_that_is_float_already(model):
    model.extra = nn.Linear(4, 4)
    qp.configure(model, {"extra": None})
    with pytest.raises(ArgumentError, match="'extra' matches only what is float"):
        qp.configure(model, {"extra": "int8"})


def test_a_new_quantizer_can_be_named_by_a_glob_but_not_by_one_for_all(model):
    qp.configure(model, {"*.output_*": INT4})
    assert {row.name for row in qp.summary(model).rows if "output" in row.name} == {
        f"{name}.output_quantizer" for name in ("stem", "body.0", "body.1", "head")
    }
    with qp.quantize_modules():
        other = nn.Linear(2, 2)
    qp.configure(other, {"*": INT4})
    assert list(other.quantizers()) == ["input_quantizer", "weight_quantizer"]


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ([("head", None), ("head", "int8")], ArgumentError, "contradict"),
        ([("re:(", None)], ArgumentError, "not a regular expression"),
        ([("head", 8)], ArgumentTypeError, "a value is None"),
        ([(3, None)], ArgumentTypeError, "a pattern is"),
        (["head"], ArgumentTypeError, "is not a rule"),
    ],
)
def test_malformed_rules_are_errors_and_change_nothing(model, rules, error, message):
    before = states(model)
    with pytest.raises(error, match=message):
        qp.configure(model, rules)
    assert states(model) == before


def test_an_unknown_recipe_is_an_error_with_near_misses(model):
    with pytest.raises(UnknownNameError, match="int8"):
        qp.configure(model, {"head": "int88"})


def test_a_float_model_is_an_error(model):
    with pytest.raises(ArgumentError, match="no quantized layer"):
        qp.configure(nn.Linear(2, 2), {"*": None})


def test_what_is_set_is_what_runs(model):
    x = torch.randn(2, 4)
    qp.configure(model.head, {"*": None})
    with torch.no_grad():
        assert torch.equal(model.head(x), nn.functional.linear(x, model.head.weight, model.head.bias))


def test_the_report_names_what_was_changed_and_what_was_not() -> None:
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    report = qp.configure(model, {"0.input_quantizer": "int4", "1": None, "0.weight_quantizer": "int8"})
    assert report.changed == {
        "0.input_quantizer": "int4, dynamic (not calibrated)",
        "1.input_quantizer": "int8, disabled",
        "1.weight_quantizer": "int8_narrow, axis=0, disabled",
    }
    assert report.skipped == {"0.weight_quantizer": "int8_narrow, axis=0, dynamic (not calibrated)"}
    assert list(qp.configure(model, {"1": None, "0.output_quantizer": "int8"}).changed) == []
    again = qp.configure(model, {"1": "int8", "0.output_quantizer": qp.QuantDescriptor()})
    assert list(again.changed) == ["0.output_quantizer", "1.input_quantizer", "1.weight_quantizer"]
