"""Why an operand was float, and what to write so that it is not."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from quantpatch.audit.operations import FAST_PATHS
from quantpatch.audit.trace import Seen
from quantpatch.classes import own_class
from quantpatch.errors import EntryError
from quantpatch.layers.base import QuantizedLayer, quantizers_of
from quantpatch.layers.subclass import why_float
from quantpatch.plugins import Offer
from quantpatch.registry import registry
from quantpatch.table import slot_of

__all__ = ["Targets", "reason_for", "skeleton"]

#: Classes that the active plugins have entries for.
Targets = dict[type, Offer]


def known_targets() -> Targets:
    """Every imported class that an entry of an active plugin replaces."""
    found: Targets = {}
    for offer in registry.offers():
        slot = slot_of(offer)
        if slot is not None and isinstance(slot.target, type):
            found[slot.target] = offer
    return found


def reason_for(seen: Seen, targets: Targets) -> str:
    """Why some operand of a product did not come out of a quantizer; empty if all did."""
    missing = [
        role for (role, _), name in zip(seen.product.operands, seen.quantizers, strict=True) if name is None
    ]
    if not missing:
        return ""
    if seen.of_weight:
        return "a weight is made of it, the same for every input: not counted"
    layer: Any = seen.layer
    cls = own_class(layer)
    if seen.operator in FAST_PATHS:
        return f"torch's fast path ran {cls.__name__} in one piece and read the weights itself"
    if isinstance(layer, QuantizedLayer):
        off = [
            name
            for name, several in quantizers_of(layer).items()
            if any(q.disabled or not q.quantizing for q in several)
        ]
        if off:
            return f"{' and '.join(off)} of {cls.__name__} {'is' if len(off) == 1 else 'are'} switched off"
        if missing == ["hidden"] or (isinstance(layer, nn.RNNBase) and missing == ["left"]):
            return (
                f"the hidden state of {cls.__name__} stays in torch's fused kernel; Recipe(hidden=...) has "
                f"it quantized at each step"
            )
        return (
            f"{cls.__name__} has no quantizer for {' and '.join(missing)}: the recipe leaves it float, or it "
            f"is made inside the layer"
        )
    if isinstance(layer, ScriptModule):
        return (
            f"{layer.original_name} is a scripted module, whose code is fixed; quantize it before scripting"
        )
    if cls in targets:
        by = targets[cls]
        ask = "" if by.entry.default else f", and not by default: include=[{by.entry.name!r}]"
        return f"{cls.__name__} was left float: it was skipped, or built outside a block{ask}"
    base = next((base for base in cls.__mro__ if base in targets), None)
    if base is not None:
        return f"{cls.__name__} is {_about_subclass(cls, base, targets[base])}"
    ask = registry.advice(layer) or "for which there is no entry"
    return f"a function called in the forward of {cls.__name__}{_reading(seen)}, {ask}"


def _reading(seen: Seen) -> str:
    """A clause on the layers whose weights a product reads itself, if there are any."""
    own = {name for name, _ in seen.layer.named_parameters(recurse=False)}
    names = (w for w in seen.weights if w is not None and w.removeprefix(f"{seen.module}.") not in own)
    layers = [name.rpartition(".")[0] or name for name in dict.fromkeys(names)]
    if not layers:
        return ""
    return f", which reads the weight of {' and '.join(layers)} itself"


def _about_subclass(cls: type, base: type, offer: Offer) -> str:
    try:
        replacement = offer.entry.load_replacement()
    except EntryError:
        replacement = None
    return why_float(replacement, cls, base.__name__, wanted=False)


def skeleton(layer: nn.Module) -> str:
    """The code to start from for a class that nothing covers: its replacement, and a block that uses it."""
    cls = own_class(layer)
    weights = {
        name: (0, 1) if p.dim() == 3 else 0  # of three axes the first counts experts, as a rule
        for name, p in layer.named_parameters(recurse=False)
        if p.dim() >= 2
    }
    own = f"Quant{cls.__name__}"
    lines = ["import quantpatch"]
    if cls.__qualname__ != cls.__name__:
        lines.append(
            f"# {cls.__qualname__} is defined inside other code: move it to the top of {cls.__module__}."
        )
    if cls.__module__ != "__main__":
        lines.append(f"from {cls.__module__} import {cls.__name__}")
    lines += ["", "", f"class {own}(quantpatch.QuantizedLayer, {cls.__name__}):"]
    lines += [
        f"    inputs = {_activations(cls)!r}  # parameters of forward that are activations",
        f"    weights = {weights!r}  # by name, with the axis of their output channels",
    ]
    if not weights:
        lines += [
            "    # It has no weights of its own: it multiplies activations. Let its forward call modules of",
            "    # quantpatch.layers.operands for that (MatMul, ScaledDotProductAttention ...), which are",
            "    # quantized like any layer; then it needs no replacement.",
        ]
    entry = f"({cls.__module__!r}, {cls.__name__!r}, {own})"
    lines += [
        "",
        "",
        f"with quantpatch.quantize_modules(custom=[{entry}]):",
        "    ...  # build the model here",
    ]
    return "\n".join(lines)


def _activations(cls: type[nn.Module]) -> tuple[str, ...]:
    """The first parameter of a class's forward, if it has a name to be passed by."""
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:2]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
