"""``operations=``: which operations inside forwards are quantized, where, and how."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import attrs
import torch
from torch import nn

from quantpatch.errors import ArgumentError, ArgumentTypeError, ConversionError, listed, near_misses
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.operations import NAMES, PRODUCTS, named
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.layers.with_operations import (
    QuantizedOperations,
    find_operations,
    operand_descriptors,
    take_over_operations,
)
from quantpatch.plugins.entry import Entry
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import registry
from quantpatch.quantize.outcome import Outcome
from quantpatch.quantize.reasons import HiddenOperations
from quantpatch.quantize.resolve import Decision
from quantpatch.recipes.descriptor import QuantDescriptor, Recipe
from quantpatch.torch_tools.class_swap import dotted, own_class

Value = str | Recipe | QuantDescriptor | None
#: What ``operations`` takes.
OperationRules = str | Iterable[str] | Mapping[str | type, str | Iterable[str] | Mapping[str, Value] | None]


@attrs.frozen
class OperationRule:
    """One operation in some layers.

    Attributes:
        where: A glob on the names of modules and of their classes, or a class.
        operation: The operation's name, or ``"products"``.
        value: How its operands are quantized: as the recipe in force says (an empty string), or as another
            recipe or a descriptor; None leaves them float.
    """

    where: str | type
    operation: str
    value: Recipe | QuantDescriptor | str | None

    def matches(self, name: str, layer: nn.Module) -> bool:
        """Whether it is for a layer of a name."""
        if isinstance(self.where, type):
            return isinstance(layer, self.where)
        cls = own_class(layer)
        return any(fnmatch.fnmatchcase(each, self.where) for each in (name, cls.__name__, dotted(cls)))

    def recipe(self, in_force: Recipe) -> Recipe | None:
        """The recipe for the operands."""
        if isinstance(self.value, QuantDescriptor):
            return Recipe(name="rule", input=self.value, weight=self.value)
        return in_force if self.value == "" else self.value  # type: ignore[return-value]

    def __str__(self) -> str:
        where = self.where if isinstance(self.where, str) else self.where.__qualname__
        return f"{where!r}: {self.operation!r}"


@attrs.frozen
class OperationsOption:
    """``operations``, checked.

    Attributes:
        rules: In their order; of several for one operation of a layer the last one is in force.
        demands: Whether a rule that matches nothing is an error.
        given: What the user gave.
    """

    rules: tuple[OperationRule, ...] = ()
    demands: bool = False
    given: Any = attrs.field(default=None, eq=False)

    def __repr__(self) -> str:
        return repr(self.given)

    @classmethod
    def of(cls, given: OperationRules | None) -> OperationsOption | None:
        """What a user gave.

        Raises:
            ArgumentTypeError: A part of it is of another type.
            UnknownNameError: There is no operation, or no recipe, of a name.
        """
        if given is None:
            return None
        if not isinstance(given, Mapping):
            names = _names(given)
            return cls(tuple(OperationRule("*", name, "") for name in names), given=given)
        rules: list[OperationRule] = []
        for where, wanted in given.items():
            if not isinstance(where, (str, type)):
                raise _malformed(where)
            if isinstance(wanted, Mapping):
                pairs = [(name, _value(value)) for name, value in wanted.items()]
            elif wanted is None:
                pairs = [(name, None) for name in NAMES]
            else:
                pairs = [(name, "") for name in _names(wanted)]
            named(name for name, _ in pairs)
            rules += [OperationRule(where, name, value) for name, value in pairs]
        return cls(tuple(rules), demands=True, given=given)

    def for_layer(
        self, name: str, layer: nn.Module, in_force: Recipe
    ) -> tuple[dict[str, Recipe], dict[OperationRule, tuple[str, ...]]]:
        """The recipe for each operation of a layer, and the rules for it, with what each is in force for.

        The last rule for an operation is in force, and those before it that say the same.
        """
        matched = {rule: rule.recipe(in_force) for rule in self.rules if rule.matches(name, layer)}
        last: dict[str, Recipe | None] = {}
        for rule, recipe in matched.items():
            last |= dict.fromkeys(named([rule.operation]), recipe)
        in_force_for = {
            rule: tuple(o for o in named([rule.operation]) if last[o] == recipe)
            for rule, recipe in matched.items()
        }
        return {o: recipe for o, recipe in last.items() if recipe is not None}, in_force_for


def _names(given: Any) -> list[str]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Iterable) or isinstance(names, (bytes, nn.Module)):
        raise _malformed(given)
    found = list(names)
    if not all(isinstance(name, str) for name in found):
        raise _malformed(given)
    named(found)
    return found


def _value(given: Any) -> Recipe | QuantDescriptor | str | None:
    if given is None or isinstance(given, (Recipe, QuantDescriptor)):
        return given
    if isinstance(given, str):
        return registry.recipe(given)
    raise _malformed(given)


def _malformed(given: Any) -> ArgumentTypeError:
    return ArgumentTypeError(
        f"operations takes {PRODUCTS!r}, names of operations, or rules such as "
        f"{{'*.attn': {{'matmul': 'int8'}}, '*': 'products'}}, not {given!r}",
        operations=given,
    )


@attrs.frozen
class _Planned:
    name: str
    layer: Any
    made: type[QuantizedLayer]
    recipes: Mapping[str, Recipe]


def quantize_operations(
    models: Sequence[nn.Module],
    option: OperationsOption,
    recipe: Recipe,
    outcome: Outcome,
    *,
    leave: Callable[[nn.Module], bool] = lambda module: False,
    strict: bool = False,
    used: set[OperationRule] | None = None,
) -> int:
    """Has the layers of models quantize the operands of operations in their forwards.

    Args:
        models: The models.
        option: Which, where, and how.
        recipe: The recipe in force.
        outcome: Counts what became of each layer.
        leave: Whether a module is to stay as it is.
        strict: Whether what may multiply and cannot be followed is an error.
        used: Rules that have matched something in other models; those that do here are added.

    Returns:
        How many layers changed.

    Raises:
        ArgumentError: A rule matches nothing.
        ConversionError: (``strict``) Something may multiply and stays float. Nothing has changed.
    """
    planned: list[_Planned] = []
    hidden: dict[str, tuple[str, ...]] = {}
    used = set() if used is None else used
    in_force: set[OperationRule] = set()
    overruled: set[OperationRule] = set()
    seen: dict[str, nn.Module] = {}
    for model in models:
        scripted: list[str] = []
        for name, module in model.named_modules():
            layer = cast(Any, module)
            seen.setdefault(name, layer)
            if isinstance(module, QuantizedLayer):  # it may have come with operations, as from a file
                present = {inner.operation for inner in layer._inner.values()}
                _, rules = option.for_layer(name, layer, recipe) if present else ({}, {})
                used.update(rule for rule in rules if present & named([rule.operation]))
                continue
            if isinstance(layer, TensorQuantizer) or leave(layer):
                continue
            if any(name.startswith(f"{outer}.") for outer in scripted):
                continue
            recipes, rules = option.for_layer(name, layer, recipe)
            used.update(rule for rule, operations in rules.items() if operations and rule.value is None)
            # Of those for "*" others may leave nothing.
            in_force.update(rule for rule, operations in rules.items() if operations or rule.where == "*")
            overruled.update(r for r, known in rules.items() if len(known) < len(named([r.operation])))
            if not recipes:
                continue
            cls = own_class(layer)
            found = find_operations(layer, cls, frozenset(recipes))
            if isinstance(layer, torch.jit.ScriptModule):
                scripted.append(name)
            if found.hidden:
                hidden[name or cls.__name__] = found.hidden
                outcome.count(Decision(dotted(cls), None, HiddenOperations(found.hidden), cls))
            if found.made is None or not operand_descriptors(found.made, recipes):
                continue
            present = {inner.operation for inner in found.made._inner.values()}
            used.update(rule for rule, operations in rules.items() if not present.isdisjoint(operations))
            planned.append(_Planned(name, layer, found.made, recipes))
    unused = [rule for rule in option.rules if rule not in used and rule not in overruled & in_force]
    if option.demands and unused:
        raise _unmatched(unused[0], seen, unused[0] in overruled)
    if strict and hidden:
        shown = listed(f"{name} ({'; '.join(why)})" for name, why in hidden.items())
        raise ConversionError(
            f"strict=True: {len(hidden)} layers may multiply where it cannot be seen: {shown}. Write a "
            f"replacement for them, leave them float by a rule, operations={{{next(iter(hidden))!r}: None}}, "
            f"or pass strict=False",
            layers=tuple(hidden),
        )
    owners: dict[nn.Module, int] = {}
    for model in models:
        for module in model.modules():
            for child in module.children():
                owners[child] = owners.get(child, 0) + 1
    for plan in planned:
        take_over_operations(plan.layer, plan.made, plan.recipes)
        for name in plan.made._prepared.read_only if plan.made._prepared else ():
            part: Any = plan.layer._modules.get(name)
            if isinstance(part, QuantizedLayer) and owners.get(part) == 1:  # type: ignore[call-overload]
                part.make_float()  # which never sees anything: what holds it reads its weight itself
        target: Any = plan.made.float_class
        entry = Entry(target.__module__, target.__name__, QuantizedOperations, plugin=BUILTIN)
        outcome.covered(Decision(dotted(target), entry, None, target, plan.made))
    return len(planned)


def _unmatched(rule: OperationRule, modules: Mapping[str, nn.Module], is_overruled: bool) -> ArgumentError:
    if is_overruled:
        return ArgumentError(
            f"the rule {rule} of operations contradicts those after it, which are for the same layers: of "
            f"several rules for one operation of a layer the last one counts. Write it behind them, or leave "
            f"it out",
            operations=rule.where,
        )
    matching = [name for name, layer in modules.items() if rule.matches(name, layer)]
    if matching:
        what = f"{listed(name or 'the model' for name in matching)} compute no {rule.operation} in a forward"
    else:
        names = [*filter(None, modules), *dict.fromkeys(type(layer).__name__ for layer in modules.values())]
        where = rule.where if isinstance(rule.where, str) else rule.where.__qualname__
        what = f"no module has such a name or class. {near_misses(where, names)}"
    return ArgumentError(
        f"the rule {rule} of operations matches nothing: {what}".rstrip(),
        operations=rule.where,
    )
