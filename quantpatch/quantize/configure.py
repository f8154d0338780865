"""Set the quantizers of a model by their names: ``configure(model, rules)``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs
from torch import nn

from quantpatch.errors import ArgumentError, listed, near_misses
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.late_ranges import warning_of_late_ranges
from quantpatch.layers.operations import quantizer_name
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.quantize.rules import EDGES, Matcher, Rules, Value, checked_rules, fits, shown_matcher
from quantpatch.recipes.descriptor import EVERY_OPERAND, QuantDescriptor, Recipe
from quantpatch.reports.report import ChangeReport
from quantpatch.torch_tools.class_swap import written_name
from quantpatch.torch_tools.forward import demand_model


@attrs.frozen
class _Place:
    """Where a module has, or a layer could have, a quantizer; one place by whatever name it is found."""

    holder_name: str = attrs.field(eq=False)
    holder: nn.Module = attrs.field(eq=id)
    own_name: str  # that of the quantizer within its holder
    edges: tuple[str, ...] = attrs.field(eq=False)  # which of EDGES its holder is

    @property
    def name(self) -> str:
        return ".".join(filter(None, (self.holder_name, self.own_name)))

    @property
    def quantizer(self) -> TensorQuantizer | None:
        found = self.holder._modules.get(self.own_name)
        return found if isinstance(found, TensorQuantizer) else None

    def descriptor(self, recipe: Recipe) -> QuantDescriptor | None:
        """What a recipe wants here; None for float."""
        if isinstance(self.holder, QuantizedLayer):
            known = _operands(self.holder, recipe)
            if self.own_name in known or self.own_name in _operands(self.holder, EVERY_OPERAND):
                return known.get(self.own_name)
        # One of its own, such as one that prepare() placed behind a ReLU, for the layers that take it.
        return None if recipe.input is None else recipe.input.for_axes(None, -1)


def configure(model: nn.Module, rules: Rules) -> ChangeReport:
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
            which the model holds them. Other modules that hold quantizers, such as those that ``prepare``
            placed, count as layers, whose quantizers are those of inputs. A value is None (float: the
            quantizer is disabled, also for others that share it), a descriptor, a recipe or a recipe's name.
            A quantizer whose descriptor changes loses its range. One descriptor changes the quantizers that
            are there; it makes a new one only where the pattern matches some of a layer's quantizers, not
            all (``"head.output_quantizer"``, ``"*.hidden_*"``).

    Returns:
        Which quantizers were changed, and which were not.

    Raises:
        ArgumentError: A pattern matches nothing (or, unless the value is None, only what is float), stands
            twice with different values, or is malformed. Nothing has changed then.
        ArgumentTypeError: A pattern or a value is of another type.
        UnknownNameError: There is no recipe, or no format, of a name.
    """
    demand_model(model, "configure")
    before = {name: (quantizer, quantizer.disabled) for name, quantizer in named_quantizers(model).items()}
    apply_rules([model], rules)
    changed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for name, quantizer in named_quantizers(model).items():
        same = before.get(name) == (quantizer, quantizer.disabled)
        (skipped if same else changed)[name] = quantizer.extra_repr()
    return ChangeReport(written_name(type(model)), changed, skipped)


def apply_rules(models: Sequence[nn.Module], rules: Rules) -> None:
    """``configure`` for several models, where a pattern has to match something in one of them."""
    places = [place for model in models for place in _places(model)]
    if not places:
        shown = " and ".join(type(model).__name__ for model in models)
        raise ArgumentError(
            f"{shown} holds no quantized layer; build it inside `with quantize_modules():` or convert(model) "
            f"first",
            model=models,
        )
    decided: dict[_Place, Value] = {}
    for matcher, value in checked_rules(rules):
        matched = [p for p in places if _matches(matcher, p) and _is_meant(p, matcher, value)]
        if not matched:
            floats = [
                name
                for model in models
                for name, module in model.named_modules()
                if _named(matcher, name, module)
            ]
            if not floats:
                raise _unmatched(matcher, places)
            if value is not None:
                raise ArgumentError(
                    f"the pattern {shown_matcher(matcher)!r} matches only what is float, such as "
                    f"{floats[0]!r}; a rule makes no quantized layers: build it in a block, or convert it",
                    rules=matcher,
                )
        decided.update(dict.fromkeys(matched, value))
    made: dict[Any, TensorQuantizer] = {}
    new = [(place, _quantizer_for(place, value, made)) for place, value in decided.items()]
    with warning_of_late_ranges(models):
        before = [(place.quantizer, quantizer) for place, quantizer in new]
        for place, quantizer in new:
            _put(place, quantizer)
        _hand_on(before, models)
        for holder in dict.fromkeys(place.holder for place, _ in new):
            if isinstance(holder, QuantizedLayer):
                holder.make_room_for_ranges()


def _places(model: nn.Module) -> Iterable[_Place]:
    modules = dict(model.named_modules())
    layers = [module for module in modules.values() if isinstance(module, QuantizedLayer)]
    with_weights = [layer for layer in layers if layer.weight_axes()]
    ends = dict(zip(EDGES, (with_weights[0], with_weights[-1]), strict=True)) if with_weights else {}
    for name, module in modules.items():
        edges = tuple(edge for edge, end in ends.items() if end is module)
        for own_name in _own_names(module):
            yield _Place(name, module, own_name, edges)


def _own_names(holder: nn.Module) -> Iterable[str]:
    """Names of the quantizers that a module has, or could have if it is a quantized layer."""
    could_have = _operands(holder, EVERY_OPERAND) if isinstance(holder, QuantizedLayer) else {}
    has = [name for name, module in holder._modules.items() if isinstance(module, TensorQuantizer)]
    return dict.fromkeys([*could_have, *has])


def _operands(layer: QuantizedLayer, recipe: Recipe) -> dict[str, QuantDescriptor]:
    """The operands of a layer that a recipe quantizes, by the names of their quantizers."""
    return {quantizer_name(name): descriptor for name, descriptor in type(layer).descriptors(layer, recipe)}


def _matches(matcher: Matcher, place: _Place) -> bool:
    if isinstance(matcher, type):
        return isinstance(place.holder, matcher) or isinstance(place.quantizer, matcher)
    if not isinstance(matcher, str):
        return bool(matcher(place.holder_name, place.holder))
    if matcher in EDGES:
        return matcher in place.edges
    # The quantizer, its layer, and every module around them; '' is the model itself.
    parts = place.holder_name.split(".") if place.holder_name else []
    names = [place.name, *(".".join(parts[:n]) for n in range(len(parts) + 1))]
    return any(fits(matcher, name) for name in names if name)


def _is_meant(place: _Place, matcher: Matcher, value: Value) -> bool:
    """Whether a rule for a whole layer speaks of this place in it.

    One descriptor for a layer changes the quantizers that are there. A new one is made only where a recipe
    has a descriptor for it, or the rule matches it and not all others (``"head.output_quantizer"``).
    """
    if place.quantizer is not None or not isinstance(value, QuantDescriptor):
        return True
    if not isinstance(matcher, str) or not fits(matcher, place.name):
        return False
    others = (attrs.evolve(place, own_name=name) for name in _own_names(place.holder))
    return not all(fits(matcher, other.name) for other in others)


def _named(matcher: Matcher, name: str, module: nn.Module) -> bool:
    """Whether a pattern names a module that has no quantizers, and may be meant to have none."""
    if isinstance(matcher, type):
        return isinstance(module, matcher)
    return isinstance(matcher, str) and bool(name) and fits(matcher, name)


def _unmatched(matcher: Matcher, places: list[_Place]) -> ArgumentError:
    given = shown_matcher(matcher)
    names = [place.holder_name for place in places if place.holder_name] + [place.name for place in places]
    hint = near_misses(given, dict.fromkeys(names))
    if not hint:
        layers = list(dict.fromkeys(place.holder_name or "'' (the model)" for place in places))
        hint = f"The quantized layers are {listed(layers)}"
    return ArgumentError(
        f"the pattern {given!r} matches no layer or quantizer. {hint}".rstrip(), rules=matcher
    )


def _quantizer_for(place: _Place, value: Value, made: dict[Any, TensorQuantizer]) -> TensorQuantizer | None:
    """The quantizer that a rule asks for; None for float.

    Args:
        place: Where it is to be.
        value: The rule's.
        made: New ones. Places that share a quantizer go on sharing one where they get the same.
    """
    if value is None:
        return None
    assert not isinstance(value, str)
    if isinstance(value, QuantDescriptor):
        value = Recipe(name="rule", input=value, weight=value, output=value, hidden=value)
    descriptor, known = place.descriptor(value), place.quantizer
    if descriptor is None:
        return None
    if known is not None and known.descriptor == descriptor:
        return known
    return made.setdefault((known or place, descriptor), TensorQuantizer(descriptor))


def _put(place: _Place, quantizer: TensorQuantizer | None) -> None:
    known = place.quantizer
    if quantizer is None:
        if known is not None:
            known.disable()
        return
    quantizer.enable()
    if quantizer is not known:
        quantizer.train(place.holder.training)
        place.holder._modules[place.own_name] = quantizer


def _hand_on(
    replaced: Iterable[tuple[TensorQuantizer | None, TensorQuantizer | None]], models: Sequence[nn.Module]
) -> None:
    """Gives quantizers the tensors of those that they replaced, which an optimizer may have listed."""
    staying = {q for model in models for q in named_quantizers(model).values()}
    for old, new in replaced:
        if old is not None and new is not None and old not in staying:
            staying.add(old)  # of several that replace it one has its tensor
            new.take_tensor_of(old)
