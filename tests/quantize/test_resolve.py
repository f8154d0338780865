"""What becomes of a class, and why: one answer for blocks, ``convert``, ``explain`` and ``audit``."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import quantpatch as qp
from quantpatch.errors import EntryError
from quantpatch.layers.linear import QuantLinear
from quantpatch.layers.subclass import OwnMembers, WrittenOtherwise
from quantpatch.plugins.registry import registry
from quantpatch.quantize.compose import compose
from quantpatch.quantize.reasons import (
    FloatBase,
    IsPart,
    IsQuantized,
    NoEntry,
    NotByDefault,
    Reason,
    SkippedBy,
    SubclassOf,
)
from quantpatch.quantize.resolve import Table, resolve

HERE = sys.modules[__name__]


class Plain(nn.Linear):
    """A subclass that computes as its base does."""


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class QuantMine(qp.QuantizedLayer, nn.Linear):
    """A replacement of another's."""


class Part(nn.Linear):
    """A layer whose weight another one reads."""


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Part(4, 4)

    def forward(self, input):
        return nn.functional.linear(input, self.inner.weight)


class QuantWhole(qp.QuantizedLayer, Whole):
    inputs = ()
    weights = {"inner_weight": 0}
    parts = {"inner": Part}

    @property
    def inner_weight(self):
        return self.inner.weight

    def forward(self, input):
        weights = self.quantize_weights()
        return nn.functional.linear(input, weights.get("inner_weight", self.inner_weight))


def table(**options) -> Table:
    return compose(registry.entries([]), plugins=[], **options)


@pytest.mark.parametrize(
    ("cls", "options", "reason"),
    [
        (nn.Linear, {"skip": ["Lin*"]}, SkippedBy("Lin*")),
        (nn.Embedding, {}, NotByDefault(("Embedding",))),
        (nn.LazyLinear, {"skip": [nn.Linear]}, SkippedBy(nn.Linear, lazily=True)),
        (Plain, {}, SubclassOf("torch.nn.Linear", None)),
        (Plain, {"subclasses": True, "skip": [Plain]}, SkippedBy(Plain)),
        (Plain, {"skip": ["Linear"]}, FloatBase("torch.nn.Linear", SkippedBy("Linear"))),
        (Doubled, {"subclasses": True}, SubclassOf("torch.nn.Linear", OwnMembers(("forward",)))),
        (Plain, {"custom": [(nn, "Linear", nn.Conv1d)]}, SubclassOf("torch.nn.Linear", WrittenOtherwise())),
        (NonDynamicallyQuantizableLinear, {"subclasses": True}, IsPart("torch.nn.MultiheadAttention")),
        (QuantLinear, {}, IsQuantized("torch.nn.Linear")),
        (QuantMine, {}, IsQuantized("torch.nn.modules.linear.Linear")),
        (nn.ReLU, {}, NoEntry(is_layer=True)),
        (dict, {}, NoEntry(is_layer=False)),
        (torch.relu, {}, NoEntry(is_layer=False)),
    ],
)
def test_why_a_class_stays_float(cls, options, reason) -> None:
    decision = resolve(table(**options), cls)
    assert (decision.reason, decision.replacement) == (reason, None)


def test_what_is_replaced_comes_with_its_replacement() -> None:
    assert resolve(table(), nn.Linear).replacement is QuantLinear
    combined = resolve(table(subclasses=True), Plain)
    assert combined.replacement.__mro__[1:3] == (QuantLinear, qp.QuantizedLayer)
    assert issubclass(combined.replacement, Plain)
    assert combined.reason is None


def test_a_target_that_is_not_imported_is_known_by_its_name() -> None:
    waiting = compose([qp.Entry("far.away", "Layer", "far.quant:QuantLayer")])
    decision = resolve(waiting, "far.away.Layer")
    assert (decision.name, decision.target, decision.reason) == ("far.away.Layer", None, None)
    assert resolve(waiting, "far.away.Other").entry is None


def test_a_replacement_that_cannot_be_used_is_an_error_only_where_it_is_used() -> None:
    broken = qp.Entry("torch.nn", "Linear", "no_such_module:Thing")
    with pytest.raises(EntryError, match="no_such_module"):
        resolve(compose([broken]), nn.Linear)
    with pytest.raises(EntryError, match="no_such_module"):
        resolve(compose([broken], subclasses=True), Plain)
    assert resolve(compose([broken]), Plain).reason == SubclassOf("torch.nn.Linear", None)


@pytest.mark.parametrize("options", [{}, {"skip": ["Linear"]}, {"subclasses": True}])
@pytest.mark.parametrize("cls", [Plain, Doubled])
def test_blocks_convert_and_explain_give_the_same_reason(cls, options) -> None:
    expected = resolve(table(**options), cls).reason
    with qp.quantize_modules(plugins=[], **options) as scope:
        cls(2, 2)
    done = qp.convert(nn.Sequential(cls(2, 2), nn.Conv1d(1, 1, 1)), plugins=[], **options)
    wanted: list[Reason] = [] if expected is None else [expected]
    assert [line.why for line in scope.skipped] == wanted
    assert [line.why for line in done.skipped] == wanted
    assert qp.explain(cls, plugins=[], **options).because == str(expected) or not wanted
    if options == {}:
        (row,) = qp.audit(cls(2, 2), torch.randn(1, 2)).rows
        assert row.reason == f"{cls.__name__} is {expected}"


def test_a_part_that_a_layer_declares_stays_float_and_is_an_operand_of_the_layer(tmp_path) -> None:
    custom = [(HERE, "Whole", QuantWhole)]
    with qp.quantize_modules(custom=custom, subclasses=True) as scope:
        model = nn.Sequential(Whole(), Part(4, 4))
    assert [type(module) for module in (model[0].inner, model[1])] == [Part, Part]
    assert scope.skipped == ()
    assert "without quantizers" in str(qp.summary(model))
    assert qp.summary(model).float_layers == (("1", "Part"),)
    qp.calibrate(model, [torch.randn(2, 4)])
    with torch.no_grad():
        expected = model(torch.randn(1, 4).fill_(0.5))
    qp.save(model, tmp_path / "file.safetensors")
    with qp.quantize_modules(custom=custom):
        loaded = nn.Sequential(Whole(), Part(4, 4))
    qp.load(loaded, tmp_path / "file.safetensors")
    assert torch.equal(loaded(torch.randn(1, 4).fill_(0.5)), expected)


class WholeOfLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.outer = nn.Linear(4, 4)

    def forward(self, input):
        return self.outer(nn.functional.linear(input, self.inner.weight))


class QuantWholeOfLinear(qp.QuantizedLayer, WholeOfLinear):
    inputs = ()
    weights = {}
    parts = {"inner": nn.Linear}


def test_a_part_stays_float_also_where_its_class_is_a_target():
    entry = qp.Entry(__name__, "WholeOfLinear", QuantWholeOfLinear)
    with qp.quantize_modules(custom=[entry]):
        built = nn.Sequential(WholeOfLinear())
    converted = nn.Sequential(WholeOfLinear())
    qp.convert(converted, custom=[entry])
    for model in (built, converted):
        classes = {name: type(module) for name, module in model.named_modules() if "quantizer" not in name}
        assert classes["0"] is QuantWholeOfLinear
        assert (classes["0.inner"], classes["0.outer"]) == (nn.Linear, QuantLinear)
        assert not model[0].inner._modules
