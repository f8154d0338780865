"""What a search chooses for: the quantized layers of a model, in groups that share a format."""

from __future__ import annotations

import fnmatch
import glob
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from quantpatch.dataflow import BATCHNORM, Dataflow, Operator, Value, traits
from quantpatch.errors import ArgumentError, ArgumentTypeError, near_misses
from quantpatch.layers.base import QuantizedLayer, weight_quantizers
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.recipes.descriptor import EVERY_OPERAND

Groups = Sequence[tuple[str, ...]]

# What stands between a layer and an addition without making another tensor of it.
_PASSED = BATCHNORM | {
    "aten::relu",
    "aten::relu_",
    "aten::hardtanh",
    "aten::hardtanh_",
    "aten::native_dropout",
}


def own_quantizers(module: nn.Module) -> dict[str, TensorQuantizer]:
    """The quantizers that a module holds itself, by their names in it."""
    return {name: q for name, q in module._modules.items() if isinstance(q, TensorQuantizer)}


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that has, or could have, quantizers of its own, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if own_quantizers(module)
        or (isinstance(module, QuantizedLayer) and any(type(module).descriptors(module, EVERY_OPERAND)))
    }


def pattern(name: str, module: nn.Module) -> str:
    """The pattern by which ``configure`` finds a layer's own quantizers, not those of layers inside."""
    if any(map(own_quantizers, list(module.modules())[1:])):
        return "re:" + (re.escape(f"{name}.") if name else "") + r"[^.]+_quantizer"
    return glob.escape(name) or "*"


def given_groups(groups: Iterable[Iterable[str] | str], layers: Iterable[str]) -> list[tuple[str, ...]]:
    """The groups that a user gave, as names and globs; every other layer is one of its own.

    Raises:
        ArgumentTypeError: They are not groups of names.
        ArgumentError: A name matches no layer, or a layer is in two groups.
    """
    names = list(layers)
    found: list[tuple[str, ...]] = []
    if isinstance(groups, (str, Mapping)) or not isinstance(groups, Iterable):
        raise ArgumentTypeError(
            f"groups={groups!r}: expected groups of names, such as [('q', 'k', 'v'), ('blocks.*.fc1',)]",
            groups=groups,
        )
    for group in groups:
        patterns = (group,) if isinstance(group, str) else tuple(group)
        members: dict[str, None] = {}
        for each in patterns:
            matched = fnmatch.filter(names, each) if isinstance(each, str) else []
            if not matched:
                raise ArgumentError(
                    f"groups: {each!r} matches no layer searched. {near_misses(str(each), names)}".strip(),
                    groups=each,
                )
            members.update(dict.fromkeys(matched))
        for name in members:
            if any(name in other for other in found):
                raise ArgumentError(
                    f"groups: {name!r} is in two groups; put what shares a format into one",
                    groups=group,
                )
        found.append(tuple(name for name in names if name in members))
    grouped = {name for group in found for name in group}
    return _in_order([*found, *((name,) for name in names if name not in grouped)], names)


def found_groups(flow: Dataflow, layers: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """The layers that share a format, as a run of the model shows.

    These are layers that read one tensor, as the projections to queries, keys and values do; the layers whose
    results an addition takes directly; and those that share a quantizer or a weight.

    Args:
        flow: The run.
        layers: Those to group, by name.
    """
    joined = {name: name for name in layers}

    def root(name: str) -> str:
        while joined[name] != name:
            name = joined[name]
        return name

    def join(names: Iterable[str]) -> None:
        first, *others = dict.fromkeys(map(root, names))
        for other in others:
            joined[other] = first

    for readers in (_by_tensor_read(flow, layers), _by_part(layers)):
        for names in readers:
            join(names)
    for operator in flow.named("add", "sub"):
        sides = [_producer(value, layers) for value in operator.inputs if not _is_constant(value)]
        makers = [side for side in sides if side is not None]
        if len(makers) == len(sides) == 2:
            join((*makers, operator.module) if operator.module in layers else makers)
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(root(name), []).append(name)
    return _in_order(map(tuple, groups.values()), list(layers))


def _in_order(groups: Iterable[tuple[str, ...]], names: list[str]) -> list[tuple[str, ...]]:
    return sorted(groups, key=lambda group: names.index(group[0]))


def _by_tensor_read(flow: Dataflow, layers: Mapping[str, nn.Module]) -> Iterable[list[str]]:
    """The layers that read each tensor."""
    of_weights = {q for layer in layers.values() for q in weight_quantizers(layer)}
    owners = {q: name for name, layer in layers.items() for q in own_quantizers(layer).values()}
    readers: dict[int, list[str]] = {}

    def reads(name: str, value: Value) -> None:
        if not _is_constant(value):
            readers.setdefault(id(_origin(value)), []).append(name)

    for quantizer, values in flow.quantized.items():
        if quantizer in owners and quantizer not in of_weights:
            for value in values:
                reads(owners[quantizer], value)
    for operator in flow.operators:
        if operator.module in layers:
            for product in operator.products:
                for _, operand in product.operands:
                    if operand is not None and not _made_in(operand, operator.module):
                        reads(operator.module, operand)
    return readers.values()


def _by_part(layers: Mapping[str, nn.Module]) -> Iterable[list[str]]:
    """The layers that hold each quantizer and each parameter."""
    holders: dict[int, list[str]] = {}
    for name, layer in layers.items():
        for part in (*own_quantizers(layer).values(), *layer._parameters.values()):
            if part is not None:
                holders.setdefault(id(part), []).append(name)
    return holders.values()


def _is_constant(value: Value) -> bool:
    return _origin(value).is_constant


def _is_passed(operator: Operator) -> bool:
    """Whether an operator gives its (first) argument, quantized or in another shape."""
    if operator.name == "quantizer":
        return True
    if not traits(operator.name).moves:
        return False
    return all(math.prod(x.shape) == math.prod(operator.inputs[0].shape) for x in operator.outputs[:1])


def _origin(value: Value) -> Value:
    """The tensor that a value is, whatever its shape was made to be and whether it was quantized."""
    while value.maker is not None and value.maker.inputs and _is_passed(value.maker):
        value = value.maker.inputs[0]
    return value


def _made_in(value: Value, module: str) -> bool:
    maker = _origin(value).maker
    return maker is not None and maker.module == module


def _producer(value: Value, layers: Mapping[str, nn.Module]) -> str | None:
    """The layer whose result a value is, whatever was normalized or cut off on the way; None if none is."""
    while (maker := _origin(value).maker) is not None:
        if maker.products:
            return maker.module if maker.module in layers else None
        if maker.name in ("aten::add", "aten::add_"):  # of a bias
            others = [x for x in maker.inputs if not _is_constant(x)]
            if len(others) != 1:
                return None
            value = others[0]
        elif maker.name in _PASSED:
            value = maker.inputs[0]
        else:
            return None
    return None
