"""Which quantizers of a model are to be calibrated, and what to say where none is."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from quantpatch.errors import CalibrationError, listed
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.sharded import sharding_of

__all__ = ["patterns", "to_calibrate"]

_LOGGER = logging.getLogger("quantpatch")


def patterns(model: nn.Module, names: Iterable[str]) -> Iterable[str]:
    """What to tell ``configure`` to leave quantizers float: a layer's name, if they are all that it has."""
    names = dict.fromkeys(names)
    others = {name.rpartition(".")[0] for name in named_quantizers(model) if name not in names}
    layers = (name.rpartition(".")[0] for name in names)
    return dict.fromkeys(
        name if layer in others else layer or "*" for name, layer in zip(names, layers, strict=True)
    )


def to_calibrate(model: nn.Module, overwrite: bool, only_missing: bool) -> dict[str, TensorQuantizer]:
    """The quantizers to find the ranges of, by name; where there is none the log says why.

    Args:
        model: Holds the quantizers.
        overwrite: As in :func:`quantpatch.quantize.calibrate.calibrating`.
        only_missing: As there.

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
    if not wanted:
        return _nothing_in(model, found)
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
    if only_missing and not missing:
        return _nothing_in(model, found)
    if known and not (overwrite or only_missing):
        rest = f"only_missing=True to find the ranges of the {len(missing)} others, or " if missing else ""
        raise CalibrationError(
            f"{len(known)} quantizers have a range already: {listed(known)}. Pass {rest}overwrite=True to "
            f"calibrate again from nothing",
            quantizers=tuple(known),
        )
    return missing if only_missing else wanted


def _nothing_in(model: nn.Module, quantizers: Mapping[str, TensorQuantizer]) -> dict[str, TensorQuantizer]:
    """Says why no range is to be found, which is all right; returns the quantizers to calibrate: none."""
    off = sum(q.disabled for q in quantizers.values())
    dynamic = sum(q.descriptor.dynamic and not q.disabled for q in quantizers.values())
    counts = {
        "takes its range from each tensor, as formats with scales of their own do": dynamic,
        "has a range already": len(quantizers) - off - dynamic,
        "is disabled": off,
    }
    why = "; ".join(f"{count} of {len(quantizers)}: {reason}" for reason, count in counts.items() if count)
    # By logging: a warning would stop those who make warnings errors, and one script serves all formats.
    _LOGGER.warning("nothing to calibrate in the quantizers of %s (%s)", type(model).__name__, why)
    return {}
