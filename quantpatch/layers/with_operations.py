"""Layers of any class whose forward multiplies: the same class, with the operands in it quantized.

Such a class exists in no module. It is made of the float class, the names of the operations, and what was
found out about a layer of it; pickles and copies of its objects name these, and make it again.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn

from quantpatch.errors import LayerError
from quantpatch.interception.slots import lock
from quantpatch.layers.base import QuantizedLayer, make_replacement, quantized_output
from quantpatch.layers.operations import Asked, Progress, Rewritten, Wanted, plain, rewrite, spelling
from quantpatch.layers.subclass import MADE_OF, reduce_made
from quantpatch.recipes.descriptor import QuantDescriptor, Recipe
from quantpatch.torch_tools.class_swap import change_class, dotted
from quantpatch.torch_tools.fx import leaf_in_fx

Facts = tuple[tuple[str, bool | str], ...]


class QuantizedOperations(QuantizedLayer):
    """Mixin of the classes that are made here; it has no operands but those of operations."""

    inputs = ()
    weights = {}

    @leaf_in_fx
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float class's forward, with quantized operands."""
        forward = type(self)._rewritten or type(self).float_class.forward
        output = forward(self, *args, **kwargs)
        quantizer: Any = self._modules.get("output_quantizer")  # type: ignore[attr-defined]
        return output if quantizer is None else quantized_output(quantizer, output)


@attrs.define
class Found:
    """What was found in a class for layers of the same facts.

    Attributes:
        asked: What its code asks of a layer.
        hidden: What may multiply in it, and could not be followed.
        made: The class with quantized operands; None if it has no such operation.
    """

    asked: Asked
    hidden: tuple[str, ...]
    made: type[QuantizedLayer] | None


# By float class and operations; held as long as the float class is in use.
_found: weakref.WeakKeyDictionary[type, dict[frozenset[str], list[Found]]] = weakref.WeakKeyDictionary()
_made: weakref.WeakValueDictionary[Any, type[QuantizedLayer]] = weakref.WeakValueDictionary()


def find_operations(layer: nn.Module, cls: type[Any], operations: frozenset[str]) -> Found:
    """What a layer multiplies in its own code.

    Args:
        layer: A float layer that is built.
        cls: Its class.
        operations: Names of operations.
    """
    fixed = _fixed(layer, cls, operations)
    # Of what torch multiplies there are quantized layers.
    if fixed is not None or str(cls.__module__).partition(".")[0] == "torch":
        return Found(Asked(None), (fixed,) if fixed else (), None)
    known = _found.setdefault(cls, {}).setdefault(operations, [])
    for found in known:
        if found.asked.has_same(layer):
            return found
    asked = Asked(layer)
    rewritten = rewrite(cls, Wanted.by_name(operations), asked)
    made, taken = None, _taken(layer, cls) if rewritten.operands else ()
    if taken:
        shown = ", ".join(map(repr, taken))
        why = f"it has {shown} of its own, which quantized layers use: call it otherwise"
        rewritten = attrs.evolve(rewritten, hidden=(why,))
    elif rewritten.operands:
        made = _class_of(cls, tuple(sorted(operations)), tuple(sorted(asked.facts.items())), rewritten)
    known.append(Found(asked, rewritten.hidden, made))
    return known[-1]


def _fixed(layer: nn.Module, cls: type[Any], operations: frozenset[str]) -> str | None:
    """Why what a layer computes is not its class's to say, empty if it does not multiply; None if it is."""
    wanted = Wanted.by_name(operations)
    if isinstance(layer, torch.jit.ScriptModule):
        kinds = {f"aten::{spelling(function)}" for function in wanted.operations}
        if any(kind.startswith("aten::conv") for kind in kinds):
            kinds.add("aten::_convolution")  # as traces have them
        graph: Any = layer.inlined_graph if hasattr(layer, "forward") else None
        if graph is None or not any(graph.findAllNodes(kind, True) for kind in kinds):
            return ""
        return "a scripted module, whose code is fixed. Work on the module that it was scripted from"
    if "forward" in vars(layer):
        inner = plain(vars(layer)["forward"])
        multiplies = inner is None or Progress(cls, wanted, Asked(None)).may_multiply(inner)
        return "a forward of the object's own, not of its class. Make it one of a subclass" * multiplies
    return None


# Names of quantized layers that a float class may use for something of its own. On its objects they mean
# that; the library asks the class, as ``type(layer).quantizers(layer)``.
_YIELDING = (
    *("inputs", "weights", "operations", "parts", "feature_axis"),
    *("quantizer", "quantizers", "descriptors"),
)
_METHODS = tuple(
    name
    for name in vars(QuantizedLayer)
    if not name.startswith("__") and not hasattr(nn.Module, name) and name not in _YIELDING
)


def _taken(layer: nn.Module, cls: type[Any]) -> tuple[str, ...]:
    """Methods of quantized layers whose names a float layer uses for something else."""
    own = {*layer.__dict__, *layer._modules, *layer._parameters, *layer._buffers}
    return tuple(n for n in _METHODS if n in own or hasattr(cls, n))


class _Own:
    """What a class has as a quantized one; its objects may have something of their own under the name.

    Args:
        name: The name.
        declared: What the class declares.
        below: The float class.
    """

    def __init__(self, name: str, declared: Any, below: type[Any]) -> None:
        self._name = name
        self._declared = declared
        self._below = below

    def __get__(self, layer: Any, owner: type[Any]) -> Any:
        if layer is None:
            return self._declared
        for held in (layer._parameters, layer._buffers, layer._modules):
            if self._name in held:
                return held[self._name]
        found = inspect.getattr_static(self._below, self._name, _Own)
        found = self._declared if found is _Own else found
        return found.__get__(layer, owner) if hasattr(found, "__get__") else found


def with_operations(cls: type[Any], operations: tuple[str, ...], facts: Facts) -> type[QuantizedLayer]:
    """The class with quantized operands of operations, as it was made of a layer before.

    Args:
        cls: The float class.
        operations: Names of operations.
        facts: What was found out about the layer.

    Raises:
        LayerError: Its code cannot be read here.
    """
    known = _made.get((cls, operations, facts))
    if known is not None:
        return known
    rewritten = rewrite(cls, Wanted.by_name(operations), Asked(None, dict(facts)))
    if not rewritten.operands:
        why = "; ".join(rewritten.hidden) or "it has none of them here"
        raise LayerError(
            f"{dotted(cls)} had quantized operations, which cannot be made again: {why}", layer=cls
        )
    return _class_of(cls, operations, facts, rewritten)


def _class_of(
    cls: type[Any], operations: tuple[str, ...], facts: Facts, rewritten: Rewritten
) -> type[QuantizedLayer]:
    key = (cls, operations, facts)
    with lock:
        known = _made.get(key)
        if known is None:
            members = {
                "__module__": cls.__module__,
                "__doc__": f"``{cls.__name__}`` with quantized operands: {', '.join(rewritten.operands)}.",
                "__reduce_ex__": reduce_made,
                MADE_OF: (QuantizedOperations, with_operations, key),
                "_prepared": rewritten,
                **{name: _Own(name, getattr(QuantizedOperations, name), cls) for name in _YIELDING},
            }
            known = make_replacement(f"Quant{cls.__name__}", (QuantizedOperations, cls), members)
            _made[key] = known
        return known


def take_over_operations(
    layer: Any, made: type[QuantizedLayer], recipes: Mapping[str, Recipe]
) -> dict[str, QuantDescriptor]:
    """Makes a float layer that exists one of its class with quantized operands: the same object.

    Args:
        layer: The layer.
        made: The class.
        recipes: How to quantize, by operation.

    Returns:
        Its operands that got quantizers, with their descriptors.
    """
    descriptors = operand_descriptors(made, recipes)
    change_class(layer, made)
    layer.put_quantizers(descriptors.items())
    for name in type(layer).quantizers(layer):
        layer._modules[name].train(layer.training)
    return descriptors


def operand_descriptors(
    made: type[QuantizedLayer], recipes: Mapping[str, Recipe]
) -> dict[str, QuantDescriptor]:
    """The operands that recipes quantize in a layer of a class, with their descriptors."""
    found: dict[str, QuantDescriptor] = {}
    for name, inner in made._inner.items():
        recipe = recipes.get(inner.operation)
        descriptor = None if recipe is None else inner.descriptor(recipe, made.feature_axis)
        if descriptor is not None:
            found[name] = descriptor
    return found


def operations_of(cls: type[Any]) -> tuple[str, ...]:
    """The operations that a class was made for; none for any other class."""
    _, maker, arguments = vars(cls).get(MADE_OF, (None, None, ()))
    return arguments[1] if maker is with_operations else ()
