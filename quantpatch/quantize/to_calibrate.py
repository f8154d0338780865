"""Which quantizers of a model are to be calibrated, and what to say where none is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from quantpatch.errors import ArgumentError, CalibrationError, listed
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.sharded import sharding_of

Existing = Literal["error", "keep", "overwrite"]


def checked_existing(existing: Existing) -> Existing:
    """The same.

    Raises:
        ArgumentError: It is not one of the three.
    """
    if existing not in get_args(Existing):
        raise ArgumentError(
            f"existing={existing!r}: expected 'error', 'keep' (keep the ranges that are known and find the "
            f"missing ones) or 'overwrite' (find all of them again)",
            existing=existing,
        )
    return existing


def patterns(model: nn.Module, names: Iterable[str]) -> Iterable[str]:
    """The names by which ``configure`` leaves quantizers float: a layer's if they are all that it has."""
    names = dict.fromkeys(names)
    others = {name.rpartition(".")[0] for name in named_quantizers(model) if name not in names}
    layers = (name.rpartition(".")[0] for name in names)
    own = "" if others else "*"  # of a model that is a layer itself, and holds no other
    return dict.fromkeys(
        name if layer in others else layer or own or name for name, layer in zip(names, layers, strict=True)
    )


def to_calibrate(model: nn.Module, existing: Existing) -> dict[str, TensorQuantizer]:
    """The quantizers to find the ranges of, by name; there may be none.

    Args:
        model: Holds the quantizers.
        existing: As in :func:`quantpatch.calibrating`.

    Raises:
        CalibrationError: There is no quantizer, ranges are known already, or the model is in no state for it.
    """
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise CalibrationError(
            "nn.DataParallel runs copies of the quantizers, whose statistics are lost: calibrate model.module"
        )
    found = named_quantizers(model)
    if not found:
        raise CalibrationError(
            f"{type(model).__name__} holds no quantizer; build it inside `with quantize_modules():`"
        )
    wanted = {
        name: q
        for name, q in found.items()
        if not q.disabled and not q.descriptor.dynamic and q.descriptor.amax is None
    }
    busy = [name for name, q in wanted.items() if q.calibrating]
    if busy:
        raise CalibrationError(
            f"these quantizers are being calibrated already: {listed(busy)}; end that calibration first",
            quantizers=tuple(busy),
        )
    learned = [name for name, q in wanted.items() if q.descriptor.learn_amax and q.held is None]
    sharding = sharding_of(model.modules()) if learned else ""
    if sharding:
        raise CalibrationError(
            f"the shape of these learned ranges shows only with data, so that they become parameters when "
            f"they are calibrated, too late for {sharding} to average their gradients: {listed(learned)}. "
            f"Calibrate the model first, then wrap it",
            quantizers=tuple(learned),
        )
    known = [name for name, q in wanted.items() if q.amax is not None]
    missing = {name: q for name, q in wanted.items() if q.amax is None}
    if known and existing == "error":
        rest = f"existing='keep' to find the ranges of the {len(missing)} others, or " if missing else ""
        raise CalibrationError(
            f"{len(known)} quantizers have a range already: {listed(known)}. Pass "
            f"{rest}existing='overwrite' to calibrate again from scratch",
            quantizers=tuple(known),
        )
    return missing if existing == "keep" else wanted


def why_none(model: nn.Module) -> str:
    """Says why no range of a model is to be found, which is all right."""
    quantizers = named_quantizers(model)
    off = sum(q.disabled for q in quantizers.values())
    dynamic = sum(q.descriptor.dynamic and not q.disabled for q in quantizers.values())
    counts = {
        "takes its range from each tensor, as formats with scales of their own do": dynamic,
        "has a range already": len(quantizers) - off - dynamic,
        "is disabled": off,
    }
    why = "; ".join(f"{count} of {len(quantizers)}: {reason}" for reason, count in counts.items() if count)
    return f"nothing to calibrate in the quantizers of {type(model).__name__} ({why})"
