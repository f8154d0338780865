"""The code to paste for a class that nothing covers: found by trying it on what the class was called with."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from quantpatch.analysis.audit.trace import Seen, Trace, tracing
from quantpatch.errors import LayerError
from quantpatch.layers.base import QuantizedLayer, make_replacement
from quantpatch.layers.call_sites import Operations, rewrite
from quantpatch.layers.subclass import attributes_used
from quantpatch.recipes.builtin import active_recipe
from quantpatch.recipes.descriptor import Axis
from quantpatch.torch_tools.class_swap import change_class, own_class
from quantpatch.torch_tools.forward import evaluating

_TWO = ("left", "right")
# What multiplies, as code spells it, with names for its operands.
_SPELLINGS: dict[str, tuple[str | None, ...]] = {
    **{f"torch.{name}": _TWO for name in ("matmul", "bmm", "mm", "mv", "dot", "vdot", "inner", "tensordot")},
    **{f"torch.{name}": (None, *_TWO) for name in ("addmm", "addmv", "addbmm", "baddbmm")},
    "torch.einsum": (None, *_TWO, "third"),
    "torch.linalg.matmul": _TWO,
    "torch.conv_tbc": ("input", "weight"),
    "F.linear": ("input", "weight"),
    "F.bilinear": ("input1", "input2", "weight"),
    **{f"F.conv{n}d": ("input", "weight") for n in (1, 2, 3)},
    **{f"F.conv_transpose{n}d": ("input", "weight") for n in (1, 2, 3)},
    "F.scaled_dot_product_attention": ("query", "key", "value"),
}
_NAMESPACES = {"torch": torch, "F": F, "linalg": torch.linalg}
_MODULES_FOR_IT = (
    "Let its forward call modules of quantpatch.layers for them (MatMul, ScaledDotProductAttention "
    "...), which are quantized like any layer"
)


@attrs.frozen
class Proposal:
    """What to write for a class that nothing covers.

    Attributes:
        code: A replacement that quantizes more of what the class multiplies, and a block that uses it; empty
            if none does.
        share: The share of the class's own multiply-accumulates that it quantizes.
        why_not: Why there is none.
    """

    code: str
    share: float
    why_not: str = ""


@attrs.frozen
class _Declared:
    """What a replacement declares."""

    inputs: tuple[str, ...] = ()
    weights: Mapping[str, Axis] = attrs.field(factory=dict)
    operations: Operations = attrs.field(factory=dict)

    def only(self, used: set[str]) -> _Declared:
        """The same, without what no product came out of; inputs are the first parameters, without a gap."""
        last = max((n for n, name in enumerate(self.inputs, 1) if name in used), default=0)
        places = {name.rstrip("0123456789").removesuffix("_") for name in used} | used
        operations = {
            operation: tuple(name if name in places else None for name in names)
            for operation, names in self.operations.items()
        }
        return _Declared(
            self.inputs[:last],
            {name: axis for name, axis in self.weights.items() if name in used},
            {operation: _without_end(names) for operation, names in operations.items() if any(names)},
        )


def _without_end(names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Names of operands, but for None at the end."""
    while names and names[-1] is None:
        names = names[:-1]
    return names


#: A layer, and arguments that it was called with.
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def propose(seen: Sequence[Seen], call: Call | None) -> Proposal:
    """The replacement that quantizes most of what a class multiplies itself.

    Candidates are tried on a copy of the layer, with the arguments that it got.

    Args:
        seen: The products of layers of the class.
        call: One of the layers, and arguments that it was called with; None if its forward was not.
    """
    if call is None:
        return Proposal("", 0.0, f"it was not called as a module is, but in pieces. {_MODULES_FOR_IT}")
    layer = call[0]
    cls = own_class(layer)
    inputs, weights = _inputs_of(cls, call), _weights_of(layer, seen)
    operations, problems = _operations_of(
        cls, {*inputs, *weights, *dict(layer.named_parameters(recurse=False))}
    )
    try:
        before = _try(call, None)
        best = _try(call, _Declared(inputs, weights))
        if best.quantized < best.macs and operations:
            more = _try(call, _Declared(inputs, weights, operations))
            best = max(best, more, key=lambda trial: trial.quantized)
        if best.quantized > before.quantized:
            best = _try(call, best.declared.only(best.used))
    except Exception as error:  # code of others, which runs here on what it may not expect
        return Proposal("", 0.0, f"trying a replacement failed ({type(error).__name__}: {error})")
    if best.quantized <= before.quantized:
        why = "; ".join(problems) or "its forward names no function that multiplies float operands"
        return Proposal("", 0.0, f"{why}. {_MODULES_FOR_IT}")
    return Proposal(_code(cls, best), best.quantized / best.macs)


# --- what there is to declare --------------------------------------------------------------------------


def _inputs_of(cls: type[Any], call: Call) -> tuple[str, ...]:
    """The first parameters of forward, up to the last that got a floating-point tensor."""
    layer, args, kwargs = call
    try:
        bound = inspect.signature(cls.forward).bind(layer, *args, **kwargs)
    except (TypeError, ValueError):
        return ()
    names: list[str] = []
    last = 0
    for parameter in list(bound.signature.parameters.values())[1:]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            break
        names.append(parameter.name)
        value = bound.arguments.get(parameter.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            last = len(names)
    return tuple(names[:last])


def _weights_of(layer: nn.Module, seen: Sequence[Seen]) -> dict[str, Axis]:
    """Parameters of the class's own that it multiplies, with the axes of their output channels."""
    found: dict[str, Axis] = {}
    for product in seen:
        for operand in product.operands:
            holder, _, name = (operand.parameter or "").rpartition(".")
            parameter = layer._parameters.get(name) if holder == product.module else None
            if parameter is not None and parameter.dim() >= 2 and found.get(name) is None:
                found[name] = operand.channels
    guess = {name: (0, 1) if layer._parameters[name].dim() == 3 else 0 for name in found}  # type: ignore[union-attr]
    return {name: guess[name] if axis is None else axis for name, axis in found.items()}


def _operations_of(cls: type[Any], taken: set[str]) -> tuple[Operations, list[str]]:
    """What forward, or a method it calls, calls to multiply, with names for operands not in ``taken``."""
    found: dict[Callable[..., Any], tuple[str | None, ...]] = {}
    problems: dict[str, None] = {}
    taken = set(taken)
    for operation, names in _candidates(cls):
        if operation in found:
            continue
        try:
            if not rewrite(cls, {operation: names}, demand=False).functions:
                continue
        except LayerError as error:
            problems[str(error)] = None
            continue
        found[operation] = tuple(f"{operation.__name__}_{n}" if n in taken else n for n in names)
        taken.update(filter(None, found[operation]))
    return found, list(problems)


def _candidates(cls: type[Any]) -> Iterator[tuple[Callable[..., Any], tuple[str | None, ...]]]:
    for spelling, names in _SPELLINGS.items():
        yield _meaning(spelling), names
    for function in _helpers(cls):
        parameters = inspect.signature(function).parameters.values()
        positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        if positional:
            yield function, positional


def _meaning(spelling: str) -> Any:
    first, *rest = spelling.split(".")
    value: Any = _NAMESPACES[first]
    for name in rest:
        value = getattr(value, name)
    return value


def _helpers(cls: type[Any]) -> Iterator[types.FunctionType]:
    """Functions written in Python, not torch's, that the forward of a class may call by their names."""
    used = attributes_used(cls, "forward")
    for name in sorted(used):
        method = inspect.unwrap(getattr(cls, name, None))  # type: ignore[arg-type]
        if not isinstance(method, types.FunctionType):
            continue
        around = [method.__globals__.get(other) for other in sorted(used)]
        around += [
            getattr(m, n, None) for m in around if isinstance(m, types.ModuleType) for n in sorted(used)
        ]
        for value in around:
            if isinstance(value, types.FunctionType) and not value.__module__.startswith("torch."):
                yield value


# --- trying --------------------------------------------------------------------------------------------


@attrs.frozen
class _Trial:
    """What a replacement does to a class's own products."""

    declared: _Declared
    macs: int
    quantized: int
    used: set[str]
    left: tuple[str, ...]


def _try(call: Call, declared: _Declared | None) -> _Trial:
    """Runs a copy of a layer, as one of a replacement's if one is given."""
    layer, args, kwargs = call
    # With the layer's own parameters, which nothing here changes; buffers and caches may be written to.
    twin: Any = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    running: list[Trace] = []
    if declared is not None:
        cls = own_class(layer)
        members = {
            "inputs": declared.inputs,
            "weights": declared.weights,
            "operations": declared.operations,
            "quantize_operand": _but_for_weights(running, declared.weights),
            "__module__": cls.__module__,
        }
        change_class(twin, make_replacement(f"Quant{cls.__name__}", (QuantizedLayer, cls), members))
        twin.add_quantizers(active_recipe())
    args, kwargs = tree_map(_own_copy, (args, kwargs))
    with evaluating(twin), torch.no_grad(), torch.random.fork_rng(devices=[]), tracing(twin) as trace:
        running.append(trace)
        twin(*args, **kwargs)
    own = [product for product in trace.seen if product.layer is twin and not product.of_weight]
    used = {
        operand.quantizer.removesuffix("_quantizer")
        for p in own
        for operand in p.operands
        if operand.quantizer
    }
    return _Trial(
        declared or _Declared(),
        sum(product.macs for product in own),
        sum(product.macs for product in own if product.quantized),
        used,
        tuple(dict.fromkeys(_shown(product) for product in own if not product.quantized)),
    )


def _shown(product: Seen) -> str:
    floats = " and ".join(operand.role for operand in product.operands if operand.quantizer is None)
    return f"{product.operation} ({floats})"


def _but_for_weights(running: list[Trace], weights: Mapping[str, Axis]) -> Callable[[Any, str, Any], Any]:
    """``quantize_operand`` that leaves alone what the quantizer of a weight has quantized already."""

    def quantize_operand(self: Any, operand: str, value: Any) -> Any:
        origin = running[0].origin_of(value) if isinstance(value, Tensor) else None
        if origin is not None and origin.removesuffix("_quantizer") in weights:
            return value
        return QuantizedLayer.quantize_operand(self, operand, value)

    return quantize_operand


def _own_copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever it is; most forwards only read it
        return value


# --- the code ------------------------------------------------------------------------------------------


def _code(cls: type[Any], trial: _Trial) -> str:
    """A replacement, and a block that uses it."""
    declared = trial.declared
    spelled = {_meaning(spelling): spelling for spelling in reversed(_SPELLINGS)}
    roots = {
        spelling.partition(".")[0]
        for operation, spelling in spelled.items()
        if operation in declared.operations
    }
    helpers = [operation for operation in declared.operations if operation not in spelled]
    own = f"Quant{cls.__name__}"
    lines = ["import quantpatch"]
    lines += ["import torch"] * ("torch" in roots)
    lines += ["from torch.nn import functional as F"] * ("F" in roots)
    if cls.__qualname__ != cls.__name__:
        lines.append(
            f"# {cls.__qualname__} is defined inside other code: move it to the top of {cls.__module__}."
        )
    things: list[Any] = [cls, *helpers]
    for thing in things:
        if thing.__module__ != "__main__":
            lines.append(f"from {thing.__module__} import {thing.__name__}")
    lines += ["", "", f"class {own}(quantpatch.QuantizedLayer, {cls.__name__}):"]
    if declared.operations:
        lines.append("    operations = {  # what its forward multiplies, with names for what to quantize")
        lines += [
            f"        {spelled.get(operation) or operation.__name__}: {names!r},"
            for operation, names in declared.operations.items()
        ]
        lines.append("    }")
    if declared.inputs or not declared.operations:
        lines.append(f"    inputs = {declared.inputs!r}  # parameters of forward that are activations")
    if declared.weights or not declared.operations:
        lines.append(
            f"    weights = {dict(declared.weights)!r}  # by name, with the axis of their output channels"
        )
    lines += [f"    # Stays float: {left}." for left in trial.left]
    if trial.left and F.scaled_dot_product_attention in declared.operations:
        lines += [
            "    # quantpatch.layers.ScaledDotProductAttention, as a module that forward calls,",
            "    # quantizes the probabilities as well.",
        ]
    lines += [
        "",
        "",
        f"with quantpatch.quantize_modules(custom=[({cls.__module__!r}, {cls.__name__!r}, {own})]):",
        "    ...  # build the model here",
    ]
    return "\n".join(lines)
