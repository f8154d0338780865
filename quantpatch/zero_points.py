"""``fit_zero_points``: ranges of activations that need not be symmetric around 0.

A symmetric range spends half of its integers on either side, however little lies there. Where data shows that
one side needs less, a zero point moves integers to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantpatch.affine import fitted_zero_point
from quantpatch.calibration import run_over, weight_quantizers
from quantpatch.errors import CalibrationError
from quantpatch.quantizer import TensorQuantizer, named_quantizers
from quantpatch.ranks import Ranks
from quantpatch.running import demand_model, evaluating

__all__ = ["fit_zero_points"]

# Of a range that is symmetric but for the noise of a few batches nothing is to be had.
_LEAST_GAIN = 1.1


def fit_zero_points(
    model: nn.Module,
    data: Iterable[Any] | Callable[[nn.Module], Any],
    *,
    least_gain: float = _LEAST_GAIN,
    group: dist.ProcessGroup | None = None,
    progress: bool = False,
) -> Mapping[str, int]:
    """Gives zero points to signed ranges of activations, where data needs less on one side of 0.

    ::

        calibrate(model, batches)
        fit_zero_points(model, batches)

    The longer side of a range stays what calibration found. The shorter one becomes as long as the data
    needs, so that as many integers lie closer together; where nothing is negative the zero point is 0, as
    ``QuantDescriptor(unsigned=True)`` has it. What comes later and lies beyond is clipped. Ranges of weights,
    those with several scales, dynamic ones and unsigned ones are left alone, so calling it again with the
    same data changes nothing. With ``torch.distributed`` initialised every rank must call it.

    Args:
        model: A calibrated model; changed in place. It runs quantized, as it is, in eval mode.
        data: Batches, each a tensor, a tuple of arguments or a dict of keywords; or a function that gets
            the model and runs it.
        least_gain: How many times as fine a range has to become to be changed; 1 changes all that gain.
        group: The ranks that hold this model; None for all.
        progress: Whether to show a progress bar (on a terminal only).

    Returns:
        The zero points, by the names of the quantizers that got one.

    Raises:
        CalibrationError: There is no batch, no quantizer saw any, one saw NaN or infinity, or another rank
            failed. Nothing was changed.
        InputError: The first argument is no model, or the data no batches or on another device.
    """
    demand_model(model, "fit_zero_points")
    found = _to_fit(model)
    with Ranks(group) as ranks:
        own = _ends(model, found, lambda: run_over(model, data, progress=progress))
        seen: dict[str, tuple[float, float]] = {}
        for others in ranks.gather(own):
            seen |= {name: _union(ends, seen.get(name)) for name, ends in others.items()}
    if found and not seen:
        raise CalibrationError("the data reached none of the quantizers", quantizers=tuple(found))
    bad = tuple(name for name, ends in seen.items() if not all(map(math.isfinite, ends)))
    if bad:
        raise CalibrationError(
            f"{', '.join(bad[:10])} saw NaN or infinity: nothing was changed", quantizers=bad
        )
    fitted = {}
    for name, quantizer in found.items():
        new = _fitted(quantizer, *seen[name], least_gain) if name in seen else None
        if new is not None:
            fitted[name], amax = new
            quantizer.use_zero_point(fitted[name], amax)
    return fitted


def _to_fit(model: nn.Module) -> dict[str, TensorQuantizer]:
    of_weights = weight_quantizers(model)
    return {
        name: quantizer
        for name, quantizer in named_quantizers(model).items()
        if quantizer.is_symmetric
        and quantizer.amax is not None
        and quantizer not in of_weights
        and not quantizer.disabled
        and quantizer.quantizing
    }


def _fitted(
    quantizer: TensorQuantizer, low: float, high: float, least_gain: float
) -> tuple[int, float | None] | None:
    """The zero point and range for what lies between two ends; None if the symmetric one is as good."""
    own = quantizer.own_range
    assert own is not None
    longer = own.item()
    if low >= 0:
        return 0, None
    shorter = min(longer, max(0.0, high) if -low > high else -low)
    if 2 * longer < least_gain * (longer + shorter):
        return None
    ends = (-longer, shorter) if -low > high else (-shorter, longer)
    return fitted_zero_point(*ends, quantizer.format.bits)


def _ends(
    model: nn.Module, found: Mapping[str, TensorQuantizer], run: Callable[[], None]
) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value that each quantizer sees."""
    seen: dict[str, tuple[float, float]] = {}

    def watching(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].numel():
                low, high = (float(end) for end in torch.aminmax(args[0].detach()))
                seen[name] = _union((low, high), seen.get(name))

        return watch

    handles = [quantizer.register_forward_pre_hook(watching(name)) for name, quantizer in found.items()]
    try:
        with evaluating(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _union(ends: tuple[float, float], others: tuple[float, float] | None) -> tuple[float, float]:
    return ends if others is None else (min(ends[0], others[0]), max(ends[1], others[1]))
