"""Set the quantizers of a model by their names: ``configure(model, rules)``."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from quantpatch.descriptor import QuantDescriptor, Recipe
from quantpatch.errors import RuleError, near_misses
from quantpatch.layers.base import QuantizedLayer, quantizer_name
from quantpatch.quantizer import TensorQuantizer
from quantpatch.registry import registry
from quantpatch.running import demand_model

__all__ = ["Rules", "apply_rules", "checked_rules", "configure"]

Matcher = str | type | Callable[[str, nn.Module], bool]
Value = QuantDescriptor | Recipe | str | None
#: Patterns for the first and the last quantized layer that has weights.
EDGES = (":first", ":last")
# A mapping of strings alone is no Mapping[Matcher, ...]: the type of keys is invariant.
Rules = Mapping[str, Value] | Mapping[Matcher, Value] | Iterable[tuple[Matcher, Value]]


@attrs.frozen
class _Operand:
    """A place where a layer has, or could have, a quantizer; the same by whatever name the layer is found."""

    layer_name: str = attrs.field(eq=False)
    layer: QuantizedLayer = attrs.field(eq=id)
    name: str
    edges: tuple[str, ...] = attrs.field(eq=False)  # which of EDGES its layer is

    @property
    def quantizer_name(self) -> str:
        return ".".join(filter(None, (self.layer_name, quantizer_name(self.name))))


def configure(model: nn.Module, rules: Rules) -> None:
    r"""Changes the quantizers of a model by ordered rules; for each quantizer the last match wins.

    ::

        configure(model, {
            "encoder.*": "int4",                         # a recipe
            "re:.*\.out_proj\.input_quantizer": QuantDescriptor(unsigned=True),
            nn.LSTM: None,                               # float
            "head": None,
            ":last": "int8",                             # the last layer
        })

    Args:
        model: Holds quantized layers.
        rules: Pairs of a pattern and a value. A pattern is a glob on the qualified name of a module
            (and then of all quantizers in it) or of a quantizer, a regular expression for either
            (``"re:..."``, matched whole), a class of layers, a function of a layer's name and the
            layer, or ``":first"`` or ``":last"``: of the quantized layers with weights, in the order in
            which the model holds them. A value is None (float: the quantizer is disabled), a descriptor, a
            recipe or a recipe's name. A quantizer whose descriptor changes loses its range. One descriptor
            changes the quantizers that are there; it makes a new one only where the pattern tells its name
            from others (``"head.output_quantizer"``, ``"*.hidden_*"``).

    Raises:
        RuleError: A pattern matches nothing (or, unless the value is None, only what is float), stands twice
            with different values, or is malformed; a value is none of these. Nothing has changed then.
        UnknownNameError: There is no recipe, or no format, of a name.
    """
    demand_model(model, "configure")
    apply_rules([model], rules)


def apply_rules(models: Sequence[nn.Module], rules: Rules) -> None:
    """``configure`` for several models, where a pattern has to match something in one of them."""
    operands = [operand for model in models for operand in _operands(model)]
    if not operands:
        shown = " and ".join(type(model).__name__ for model in models)
        raise RuleError(
            f"{shown} holds no quantized layer; build it inside `with quantize_modules():` or convert(model) "
            f"first"
        )
    decided: dict[_Operand, Value] = {}
    for matcher, value in checked_rules(rules):
        matched = [o for o in operands if _matches(matcher, o) and _is_meant(o, matcher, value)]
        if not matched:
            floats = [
                name
                for model in models
                for name, module in model.named_modules()
                if _named(matcher, name, module)
            ]
            if not floats:
                raise _unmatched(matcher, operands)
            if value is not None:
                raise RuleError(
                    f"the pattern {_shown(matcher)!r} matches only what is float, such as {floats[0]!r}; a "
                    f"rule makes no quantized layers: build it in a block, or convert it",
                    rule=matcher,
                )
        decided.update(dict.fromkeys(matched, value))
    new = [(operand, _quantizer_for(operand, value)) for operand, value in decided.items()]
    for operand, quantizer in new:
        _put(operand, quantizer)


_EVERYTHING = Recipe(name="everything", output=QuantDescriptor(), hidden=QuantDescriptor())


def _operands(model: nn.Module) -> Iterable[_Operand]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    with_weights = [layer for layer in layers.values() if layer.weight_axes()]
    ends = dict(zip(EDGES, (with_weights[0], with_weights[-1]), strict=True)) if with_weights else {}
    for name, layer in layers.items():
        yield from _of_layer(name, layer, tuple(edge for edge, end in ends.items() if end is layer))


def _of_layer(name: str, layer: QuantizedLayer, edges: tuple[str, ...] = ()) -> list[_Operand]:
    return [_Operand(name, layer, operand, edges) for operand, _ in layer.descriptors(_EVERYTHING)]


def checked_rules(rules: Rules) -> list[tuple[Matcher, Value]]:
    """The rules, with recipes in the place of their names.

    Raises:
        RuleError: One is malformed, or two contradict each other.
        UnknownNameError: There is no recipe of a name.
    """
    checked: list[tuple[Matcher, Value]] = []
    for pair in rules.items() if isinstance(rules, Mapping) else rules:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise RuleError(f"{pair!r} is no rule; write ('encoder.*', 'int8') or ('head', None)", rule=pair)
        matcher, value = pair
        if not (isinstance(matcher, (str, type)) or callable(matcher)):
            raise RuleError(
                f"rule {pair!r}: a pattern is a glob, 're:' and a regular expression, a class or a function "
                f"of a layer's name and the layer",
                rule=pair,
            )
        if isinstance(value, str):
            value = registry.recipe(value)
        if not (value is None or isinstance(value, (QuantDescriptor, Recipe))):
            raise RuleError(
                f"rule {pair!r}: a value is None (float), a QuantDescriptor, a Recipe or a recipe's name",
                rule=pair,
            )
        if isinstance(value, Recipe) and value.rules:
            raise RuleError(
                f"rule {pair!r}: the recipe {value.name!r} has rules of its own, which cannot be part of "
                f"a rule; write attrs.evolve(recipe, rules=())",
                rule=pair,
            )
        if isinstance(matcher, str) and matcher.startswith(":") and matcher not in EDGES:
            raise RuleError(f"{matcher!r} is no pattern; write ':first' or ':last'", rule=pair)
        if isinstance(matcher, str):
            _fits(matcher, "")  # so that a malformed one is told even if there is nothing to match
        for earlier, other in checked:
            if earlier == matcher and other != value:
                raise RuleError(
                    f"two rules for {matcher!r} contradict each other: {other!r} and {value!r}", rule=pair
                )
        checked.append((matcher, value))
    return checked


def _matches(matcher: Matcher, operand: _Operand) -> bool:
    layer: Any = operand.layer
    if isinstance(matcher, type):
        return isinstance(layer, matcher)
    if not isinstance(matcher, str):
        return bool(matcher(operand.layer_name, layer))
    if matcher in EDGES:
        return matcher in operand.edges
    # The quantizer, its layer, and every module around them; '' is the model itself.
    parts = operand.layer_name.split(".") if operand.layer_name else []
    names = [operand.quantizer_name, *(".".join(parts[:n]) for n in range(len(parts) + 1))]
    return any(_fits(matcher, name) for name in names if name)


def _fits(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise RuleError(f"{pattern!r} is no regular expression: {error}", rule=pattern) from error


def _is_meant(operand: _Operand, matcher: Matcher, value: Value) -> bool:
    """Whether a rule for a whole layer speaks of this operand.

    One descriptor for a layer changes the quantizers that are there. A new one is made only where a recipe
    has a descriptor for it, or the rule tells its name from others (``"head.output_quantizer"``).
    """
    if operand.layer.quantizer(operand.name) is not None or not isinstance(value, QuantDescriptor):
        return True
    if not isinstance(matcher, str) or not _fits(matcher, operand.quantizer_name):
        return False
    return not all(
        _fits(matcher, other.quantizer_name) for other in _of_layer(operand.layer_name, operand.layer)
    )


def _named(matcher: Matcher, name: str, module: nn.Module) -> bool:
    """Whether a pattern names a module that has no quantizers, and may be meant to have none."""
    if isinstance(matcher, type):
        return isinstance(module, matcher)
    return isinstance(matcher, str) and bool(name) and _fits(matcher, name)


def _shown(matcher: Matcher) -> str:
    return matcher if isinstance(matcher, str) else str(getattr(matcher, "__qualname__", repr(matcher)))


def _unmatched(matcher: Matcher, operands: list[_Operand]) -> RuleError:
    given = _shown(matcher)
    names = [o.layer_name for o in operands if o.layer_name] + [o.quantizer_name for o in operands]
    hint = near_misses(given, dict.fromkeys(names))
    if not hint:
        layers = list(dict.fromkeys(operand.layer_name or "'' (the model)" for operand in operands))
        hint = f"The quantized layers are {', '.join(layers[:6])}{' …' * (len(layers) > 6)}"
    return RuleError(f"the pattern {given!r} matches no layer or quantizer. {hint}".rstrip(), rule=matcher)


def _quantizer_for(operand: _Operand, value: Value) -> TensorQuantizer | None:
    """The quantizer that a rule asks for; None for float."""
    if value is None:
        return None
    assert not isinstance(value, str)
    if isinstance(value, QuantDescriptor):
        value = Recipe(name="rule", input=value, weight=value, output=value, hidden=value)
    descriptor = dict(operand.layer.descriptors(value)).get(operand.name)
    if descriptor is None:
        return None
    known = operand.layer.quantizer(operand.name)
    if known is not None and known.descriptor == descriptor:
        return known
    return TensorQuantizer(descriptor)


def _put(operand: _Operand, quantizer: TensorQuantizer | None) -> None:
    layer: Any = operand.layer
    known = operand.layer.quantizer(operand.name)
    if quantizer is None:
        if known is not None:
            known.disable()
        return
    quantizer.enable()
    if quantizer is not known:
        quantizer.train(layer.training)
        layer._modules[quantizer_name(operand.name)] = quantizer
