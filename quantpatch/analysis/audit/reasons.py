"""Why an operand was float."""

from __future__ import annotations

from typing import Any

from torch.jit import ScriptModule

from quantpatch.analysis.audit.trace import Seen
from quantpatch.dataflow import FAST_PATHS
from quantpatch.errors import EntryError
from quantpatch.layers.base import QuantizedLayer, quantizer_name, quantizers_of
from quantpatch.layers.subclass import why_float
from quantpatch.plugins.plugin import Offer
from quantpatch.plugins.registry import registry
from quantpatch.quantize.targets import slot_of
from quantpatch.torch_tools.class_swap import own_class, written_name

__all__ = ["BY_RECIPE", "Targets", "known_targets", "reason_for"]

#: How a reason starts that is a choice.
BY_RECIPE = "the recipe leaves"

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
    if seen.quantized:
        return ""
    missing = [operand.role for operand in seen.operands if operand.quantizer is None]
    if seen.of_weight:
        return "a weight is made of it, the same for every input: not counted"
    layer: Any = seen.layer
    cls = own_class(layer)
    name = written_name(cls)
    if seen.operator in FAST_PATHS:
        return f"torch's fast path ran {name} in one piece and read the weights itself"
    if isinstance(layer, QuantizedLayer):
        off = [
            name
            for name, several in quantizers_of(layer).items()
            if any(q.disabled or not q.quantizing for q in several)
        ]
        if off:
            return f"{' and '.join(off)} of {name} {'is' if len(off) == 1 else 'are'} switched off"
        if missing == ["hidden"]:
            return (
                f"the hidden state of {name} stays in torch's fused kernel; Recipe(hidden=...) has "
                f"it quantized at each step"
            )
        return _about_layer(layer, missing)
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


def _about_layer(layer: Any, missing: list[str]) -> str:
    """Why operands of a quantized layer are float whose quantizers, if it has them, are all on."""
    name = written_name(own_class(layer))
    could_have = {*layer.inputs, *layer.weight_axes(), *layer._inner}
    left = [role for role in missing if role in could_have and not layer._modules.get(quantizer_name(role))]
    inside = [role for role in missing if role not in left]
    parts = [f"{BY_RECIPE} {'it' if len(missing) == 1 else ' and '.join(left)} float"] if left else []
    if inside:
        parts.append(f"{' and '.join(inside)} {'is' if len(inside) == 1 else 'are'} made inside {name}")
    return "; ".join(parts)


def _reading(seen: Seen) -> str:
    """A clause on the layers whose weights a product reads itself, if there are any."""
    own = {name for name, _ in seen.layer.named_parameters(recurse=False)}
    names = (o.parameter for o in seen.operands if o.parameter is not None)
    others = dict.fromkeys(name for name in names if name.removeprefix(f"{seen.module}.") not in own)
    layers = [name.rpartition(".")[0] or name for name in others]
    if not layers:
        return ""
    return f", which reads the weight of {' and '.join(layers)} itself"


def _about_subclass(cls: type, base: type, offer: Offer) -> str:
    try:
        replacement = offer.entry.load_replacement()
    except EntryError:
        replacement = None
    return why_float(replacement, cls, base.__name__, wanted=False)
