"""Why an operand was float, and what to write so that it is not."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from quantpatch.audit.operations import FAST_PATHS
from quantpatch.audit.trace import Seen
from quantpatch.layers.base import QuantizedLayer
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
    layer: Any = seen.layer
    cls = type(layer)
    if seen.operator in FAST_PATHS:
        return f"torch's fast path ran {cls.__name__} in one piece and read the weights itself"
    if isinstance(layer, QuantizedLayer):
        off = [name for name, q in layer.quantizers().items() if q.disabled or not q.quantizing]
        if off:
            return f"{' and '.join(off)} of {cls.__name__} {'is' if len(off) == 1 else 'are'} switched off"
        return (
            f"{cls.__name__} has no quantizer for {' and '.join(missing)}: the recipe leaves it float, or it "
            f"is made inside the layer, as a hidden state is"
        )
    if cls in targets:
        by = targets[cls]
        ask = "" if by.entry.default else f", and not by default: include=[{by.entry.name!r}]"
        return f"{cls.__name__} was left float: it was skipped, or built outside a block{ask}"
    base = next((base for base in cls.__mro__ if base in targets), None)
    if base is not None:
        own = " with a forward of its own" if cls.forward is not getattr(base, "forward", None) else ""
        return f"{cls.__name__} is a subclass of {base.__name__}{own}, for which there is no entry"
    return f"a function called in the forward of {cls.__name__}, for which there is no entry"


def skeleton(layer: nn.Module) -> str:
    """The entry and the replacement to start from for a class that nothing covers."""
    cls = type(layer)
    weights = {
        name: (0, 1) if p.dim() == 3 else 0  # of three axes the first counts experts, as a rule
        for name, p in layer.named_parameters(recurse=False)
        if p.dim() >= 2
    }
    parameters = list(inspect.signature(cls.forward).parameters)[1:2]
    lines = [
        f"class Quant{cls.__name__}(quantpatch.QuantizedLayer, {cls.__name__}):",
        f"    inputs = {tuple(parameters)!r}  # parameters of forward that are activations",
        f"    weights = {weights!r}  # by name, with the axis of their output channels",
        "",
        f"with quantpatch.quantize_modules(custom=[({cls.__module__!r}, {cls.__qualname__!r}, "
        f"Quant{cls.__name__})]):",
        "    ...",
    ]
    if not weights:
        lines.insert(
            3, "    # It multiplies activations only: put quantpatch.TensorQuantizer() on them in forward."
        )
    return "\n".join(lines)
