"""Rules in a recipe: applied by name to the models that a block has built, when it ends."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading

import attrs
import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ArgumentError, ArgumentTypeError, QuantPatchWarning, UnknownNameError
from quantpatch.interception.built_modules import Built

EDGES = qp.Recipe(name="edges", rules={"first": None, "last": None})
FOUR = qp.QuantDescriptor(num_bits=4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.body(self.first(x)).mean((2, 3)))


IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def off(model):
    """The layers whose quantizers are all disabled."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, qp.QuantizedLayer)}
    return {name for name, m in layers.items() if all(q.disabled for q in m.quantizers().values())}


def bits(layer):
    return layer.weight_quantizer.format.bits


# --- what is built in a block ----------------------------------------------------------------------


def test_rules_hold_for_the_model_that_was_built_in_the_block():
    with qp.quantize_modules(recipe=EDGES):
        model = Net()
        assert off(model) == set()  # no name is known before the model is complete
    assert off(model) == {"first", "last"}
    rows = {row.module: row.quantized for row in qp.audit(model, IMAGES).rows}
    assert rows == {"first": False, "body.0": True, "body.2": True, "last": False}


def test_converting_gives_the_same_model():
    with qp.quantize_modules(recipe=EDGES):
        built = Net()
    converted = Net()
    qp.convert(converted, recipe=EDGES)
    built.load_state_dict(converted.state_dict())
    assert off(converted) == off(built)
    assert torch.equal(converted(IMAGES), built(IMAGES))


def test_any_value_and_pattern_of_configure_will_do():
    rules = [
        (nn.Conv2d, FOUR),
        ("re:body\\..*", "int8"),
        (lambda name, layer: name == "last", "int4"),
        ("last.input_quantizer", None),
    ]
    with qp.quantize_modules(recipe=qp.Recipe(name="mixed", rules=rules)):
        model = Net()
    assert [bits(layer) for layer in (model.first, model.body[0], model.body[2], model.last)] == [4, 8, 8, 4]
    assert model.last.input_quantizer.disabled
    assert not model.last.weight_quantizer.disabled


def test_a_recipe_with_rules_is_a_value_like_any_other(plugin):
    assert hash(EDGES) == hash(qp.Recipe(name="edges", rules=[("first", None), ("last", None)]))
    assert attrs.evolve(qp.Recipe(name="edges"), rules={"first": None, "last": None}) == EDGES
    plugin(recipes={"edges": EDGES})
    with qp.quantize_modules(recipe="edges"):
        model = Net()
    assert off(model) == {"first", "last"}


def test_names_go_by_the_outermost_module_wherever_it_was_built():
    with qp.quantize_modules(recipe=EDGES):
        body = nn.Sequential(nn.Conv2d(4, 4, 1))  # before the model that it becomes a part of
        model = nn.ModuleDict({"first": nn.Linear(2, 2), "inner": body, "last": nn.Linear(2, 2)})
    assert off(model) == {"first", "last"}


def test_each_of_several_models_is_a_root_and_a_pattern_has_to_match_in_one():
    recipe = qp.Recipe(name="two", rules={"first": None, "2": None})
    with qp.quantize_modules(recipe=recipe):
        models = Net(), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), Net()
    assert [off(model) for model in models] == [{"first"}, {"2"}, {"first"}]


def test_a_layer_that_two_models_share_goes_by_either_name():
    recipe = qp.Recipe(name="shared", rules={"a": FOUR, "b": "int8"})
    with qp.quantize_modules(recipe=recipe):
        layer = nn.Linear(2, 2)
        models = nn.ModuleDict({"a": layer}), nn.ModuleDict({"b": layer})
    assert bits(models[0]["a"]) == 8  # the last match wins


def test_copies_within_a_model_are_part_of_it():
    with qp.quantize_modules(recipe=qp.Recipe(name="copies", rules={"layers.1": None})):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False)
    assert off(model) >= {"layers.1.linear1", "layers.1.linear2", "layers.1.self_attn"}
    assert not any(name.startswith("layers.0") for name in off(model))


def test_a_layer_of_ones_own_class_is_found_too():
    class Mine(nn.Linear):
        pass

    with qp.quantize_modules(recipe=qp.Recipe(name="mine", rules={"0": None}), subclasses=True):
        model = nn.Sequential(Mine(2, 2), Mine(2, 2))
    assert off(model) == {"0"}


def test_modules_built_in_another_thread_with_the_same_context_are_not_mixed_up():
    models = {}

    def work(name):
        with qp.quantize_modules(recipe=EDGES if name else qp.Recipe(name="plain")):
            models[name] = Net()

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (off(models[0]), off(models[1])) == (set(), {"first", "last"})


# --- nesting ---------------------------------------------------------------------------------------


def test_an_inner_block_that_inherits_the_recipe_builds_parts_of_the_outer_ones_models():
    with qp.quantize_modules(recipe=EDGES):
        with qp.quantize_modules(skip=["Conv2d"]):
            model = Net()
        assert off(model) == set()
        with qp.keep_float():
            nn.Linear(1, 1)
    assert type(model.first) is nn.Conv2d  # float already, as its rule asks
    assert off(model) == {"last"}


def test_an_inner_block_with_rules_of_its_own_applies_them_at_its_end():
    inner = qp.Recipe(name="inner", rules={"0": FOUR})
    with qp.quantize_modules(recipe=qp.Recipe(name="outer", rules={"body.1": None})):
        with qp.quantize_modules(recipe=inner):
            body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        assert (bits(body[0]), bits(body[1])) == (4, 8)
        model = nn.ModuleDict({"body": body})
    assert off(model) == {"body.1"}
    assert bits(body[0]) == 4


def test_an_inner_block_with_another_recipe_keeps_its_models_out_of_it():
    with qp.quantize_modules(recipe=EDGES):
        with qp.quantize_modules(recipe="int8"):
            other = Net()
        model = Net()
    assert (off(other), off(model)) == (set(), {"first", "last"})


def test_blocks_that_end_in_another_order_each_apply_their_own_rules():
    outer, inner = (qp.quantize_modules(recipe=qp.Recipe(name=n, rules={n: None})) for n in ("first", "last"))
    outer.__enter__()
    first = Net()
    inner.__enter__()
    second = Net()
    outer.__exit__(None, None, None)
    assert (off(first), off(second)) == ({"first"}, set())
    inner.__exit__(None, None, None)
    assert (off(first), off(second)) == ({"first"}, {"last"})


def test_an_enclosing_block_without_rules_does_not_matter():
    with qp.quantize_modules():
        with qp.quantize_modules(recipe=EDGES):
            model = Net()
        assert off(model) == {"first", "last"}


# --- other ways to use a scope ---------------------------------------------------------------------


def test_a_decorated_function_returns_its_model_with_the_rules_applied():
    @qp.quantize_modules(recipe=EDGES)
    def build():
        return Net()

    assert off(build()) == off(build()) == {"first", "last"}

    @qp.quantize_modules(recipe=EDGES)
    async def build_async():
        await asyncio.sleep(0)
        return Net()

    assert off(asyncio.run(build_async())) == {"first", "last"}


def test_start_and_stop():
    scope = qp.quantize_modules(recipe=EDGES).start()
    model = Net()
    assert off(model) == set()
    scope.stop()
    assert off(model) == {"first", "last"}


def test_the_same_scope_can_be_entered_again():
    scope = qp.quantize_modules(recipe=EDGES)
    for _ in range(2):
        with scope:
            model = Net()
        assert off(model) == {"first", "last"}


# --- what cannot be --------------------------------------------------------------------------------


def test_a_rule_that_matches_nothing_is_an_error_with_near_misses_after_the_block():
    models = []
    recipe = qp.Recipe(name="typo", rules={"last": None, "frist": None})
    told = pytest.raises(ArgumentError, match=r"'frist' matches no.*Did you mean 'first'")
    with told as caught, qp.quantize_modules(recipe=recipe):
        models.append(Net())
    assert "the rules of recipe 'typo' were not applied to Net" in str(caught.value)
    assert caught.value.value == "frist"
    assert off(models[0]) == set()  # nothing half done
    assert type(nn.Linear(1, 1)) is nn.Linear


def test_the_same_when_converting_and_the_model_is_as_it_was():
    model = Net()
    before = [(name, type(m), list(m._modules)) for name, m in model.named_modules()]
    with pytest.raises(ArgumentError, match="'frist'"):
        qp.convert(model, recipe=qp.Recipe(name="typo", rules={"frist": None}))
    assert [(name, type(m), list(m._modules)) for name, m in model.named_modules()] == before


def test_the_exception_of_the_body_is_never_masked():
    recipe = qp.Recipe(name="typo", rules={"frist": None})
    with pytest.raises(ZeroDivisionError), qp.quantize_modules(recipe=recipe):
        model = Net()
        raise ZeroDivisionError
    assert off(model) == set()


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"first": 8}, ArgumentTypeError, "a value is None"),
        ([("first", None), ("first", "int8")], ArgumentError, "contradict"),
        ({"re:(": None}, ArgumentError, "not a regular expression"),
        ({"first": "int88"}, UnknownNameError, "int88"),
        ({"first": EDGES}, ArgumentError, "rules of its own"),
        (["first"], ArgumentTypeError, "is not a rule"),
    ],
)
def test_malformed_rules_are_refused_when_the_block_is_entered(rules, error, message):
    with pytest.raises(error, match=message), qp.quantize_modules(recipe=qp.Recipe(name="bad", rules=rules)):
        pytest.fail("the block was entered")


def test_a_model_that_is_gone_by_the_end_is_reported():
    @qp.quantize_modules(recipe=EDGES)
    def build():
        model = copy.deepcopy(Net())
        gc.collect()
        return model

    with pytest.warns(QuantPatchWarning, match=r"recipe 'edges' were applied to nothing.*configure"):
        model = build()
    assert off(model) == set()


def test_a_block_that_builds_nothing_has_nothing_to_say():
    with qp.quantize_modules(recipe=EDGES):
        pass


# --- the modules built -----------------------------------------------------------------------------


def test_modules_are_not_kept_alive():
    built = Built()
    built.add(nn.Linear(1, 1))
    gc.collect()
    assert built.roots() == []
    assert built.count == 1


def test_roots_are_what_no_other_module_contains():
    inner, outer, alone = nn.Linear(1, 1), nn.Sequential(nn.Sequential()), nn.Linear(1, 1)
    outer[0].append(inner)  # through a container that was not noted
    built = Built()
    for module in (inner, outer, alone):
        built.add(module)
    assert built.roots() == [outer, alone]


def test_a_block_that_watches_nothing_leaves_module_itself_alone():
    before = vars(nn.Module)["__init__"]
    with qp.keep_float():
        assert vars(nn.Module)["__init__"] is before
    with qp.quantize_modules(recipe=EDGES):
        assert vars(nn.Module)["__init__"] is not before
    assert vars(nn.Module)["__init__"] is before
