"""``fit_zero_points``: ranges of activations that need not be symmetric around 0.

A symmetric range spends half of its integers on either side, however little lies there. Where data shows that
one side needs less, a zero point moves integers to the other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantpatch.errors import CalibrationError, listed
from quantpatch.layers.base import weight_quantizers
from quantpatch.layers.late_ranges import warning_of_late_ranges
from quantpatch.layers.quantizer import TensorQuantizer, in_float, named_quantizers
from quantpatch.reports.report import ZeroPointReport
from quantpatch.torch_tools.class_swap import written_name
from quantpatch.torch_tools.distributed import Ranks
from quantpatch.torch_tools.forward import demand_model, evaluating, run_over
from quantpatch.torch_tools.sharded import whole

#: Of a range that is symmetric but for the noise of a few batches nothing is to be had.
LEAST_GAIN = 1.1


def fit_zero_points(
    model: nn.Module,
    data: Iterable[Any] | Callable[[nn.Module], Any],
    *,
    least_gain: float = LEAST_GAIN,
    group: dist.ProcessGroup | None = None,
    progress: bool = True,
) -> ZeroPointReport:
    """Gives zero points to signed ranges of activations, where data needs less on one side of 0.

    For a model that is calibrated already: ``calibrate(model, batches, zero_points=True)`` does both in one
    pass over the data.

    The longer side of a range stays what calibration found. The shorter one becomes as long as the data
    needs, so that as many integers lie closer together; where nothing is negative the zero point is 0, as
    ``QuantDescriptor(unsigned=True)`` has it. What comes later and lies beyond is clipped. Ranges of weights,
    those with several scales, dynamic ones and unsigned ones are left alone, so calling it again with the
    same data changes nothing. With ``torch.distributed`` initialised every rank must call it.

    Args:
        model: A calibrated model; changed in place. It runs in float and in eval mode.
        data: Batches, each a tensor, a tuple of arguments or a dict of keywords; or a function that gets
            the model and runs it.
        least_gain: How many times as fine a range has to become to be changed; 1 changes all that gain.
        group: The ranks that hold this model; None for all.
        progress: Whether to show a progress bar (on a terminal or in a notebook only).

    Returns:
        The zero points, by the names of the quantizers that got one, and why others did not.

    Raises:
        CalibrationError: There is no batch, no quantizer saw any, one saw NaN or infinity, or another rank
            failed. Nothing was changed.
        ArgumentTypeError: The first argument is not a model, or the data not batches.
        InputError: The data is on another device.
    """
    demand_model(model, "fit_zero_points")
    found = {name: q for name, q in to_fit(model).items() if q.amax is not None}
    with Ranks(group) as ranks:
        with in_float(model), watching_ends(found) as seen, evaluating(model), torch.no_grad():
            run_over(model, data, progress=progress)
        ends = ends_on_all(ranks, seen)
    if found and not ends:
        raise CalibrationError("the data reached none of the quantizers", quantizers=tuple(found))
    zero_points: dict[str, int] = {}
    skipped = dict.fromkeys(to_fit(model), "without a range")
    with warning_of_late_ranges([model]):
        for name, quantizer in found.items():
            own = quantizer.own_range
            assert own is not None
            skipped[name] = "its symmetric range is as good" if name in ends else "saw no data"
            fit = fitted(own.item(), ends[name], quantizer.format.bits, least_gain) if name in ends else None
            if fit is not None:
                quantizer.use_zero_point(*fit)
                zero_points[name] = fit[0]
                del skipped[name]
    return ZeroPointReport(written_name(type(model)), zero_points, skipped)


def to_fit(model: nn.Module) -> dict[str, TensorQuantizer]:
    """The quantizers of a model that may get a zero point: of activations, symmetric, by name."""
    of_weights = weight_quantizers(model)
    return {
        name: quantizer
        for name, quantizer in named_quantizers(model).items()
        if quantizer.is_symmetric and quantizer not in of_weights and not quantizer.disabled
    }


@contextlib.contextmanager
def without_those_found(quantizers: Mapping[str, TensorQuantizer]) -> Iterator[set[str]]:
    """A block in which zero points that were found in data are gone, so that others can be found.

    Args:
        quantizers: By name.

    Yields:
        The names of those whose zero points are to come back when it ends: all of those that lost one, if
        it raises; code that gives one a new range takes its name away.
    """
    before = {
        name: (q.zero_point, None if q.amax is None else q.amax.detach().clone())
        for name, q in quantizers.items()
        if q.zero_point_is_found
    }
    back = set(before)
    try:
        for name in before:
            quantizers[name].forget_zero_point()
        yield back
    except BaseException:
        back = set(before)
        raise
    finally:
        for name, (zero_point, amax) in before.items():
            if name in back and zero_point is not None:
                quantizers[name].use_zero_point(zero_point, amax)


@contextlib.contextmanager
def watching_ends(quantizers: Mapping[str, TensorQuantizer]) -> Iterator[dict[str, Tensor]]:
    """A block that finds how far to either side of 0 goes what each quantizer sees in it.

    Args:
        quantizers: By name.

    Yields:
        For those that saw data so far, the smallest value, negated, and the largest; ``(2,)``, float32.
    """
    seen: dict[str, Tensor] = {}

    def watching(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not (args and isinstance(args[0], Tensor) and args[0].numel()):
                return
            low, high = torch.aminmax(whole(args[0].detach()))
            reach = torch.stack((-low, high)).float()
            known = seen.get(name)
            seen[name] = reach if known is None else torch.maximum(known, reach.to(known.device))

        return watch

    handles = [q.register_forward_pre_hook(watching(name)) for name, q in quantizers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def ends_on_all(ranks: Ranks, seen: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value that quantizers saw on any rank, by name.

    Args:
        ranks: They all call this.
        seen: By ``watching_ends`` on this one.

    Raises:
        CalibrationError: Some are NaN or infinity, or another rank failed.
    """
    bad = tuple(name for name, reach in seen.items() if not reach.isfinite().all())
    if bad:
        raise CalibrationError(f"{listed(bad)} saw NaN or infinity: nothing was changed", quantizers=bad)
    ends: dict[str, tuple[float, float]] = {}
    for others in ranks.gather({name: reach.tolist() for name, reach in seen.items()}):
        for name, (below, above) in others.items():
            low, high = ends.get(name, (math.inf, -math.inf))
            ends[name] = min(low, -below), max(high, above)
    return ends


def fitted(
    amax: float, ends: tuple[float, float], bits: int, least_gain: float = LEAST_GAIN
) -> tuple[int, float | None] | None:
    """The zero point and range for what lies between two ends; None if the symmetric one is as good.

    Args:
        amax: The symmetric range, whose longer side stays.
        ends: The smallest and the largest value.
        bits: Of the integers.
        least_gain: How many times as fine the range has to become.

    Returns:
        The zero point, and the upper end of the range if that is no longer ``amax``.
    """
    low, high = ends
    if low >= 0:
        return (0, None) if high > 0 else None
    shorter = min(amax, max(0.0, high) if -low > high else -low)
    if 2 * amax < least_gain * (amax + shorter):
        return None
    return fitted_zero_point(*((-amax, shorter) if -low > high else (-shorter, amax)), bits)


def fitted_zero_point(low: float, high: float, bits: int) -> tuple[int, float]:
    """The zero point and the upper end of the range that fits an interval best.

    ``scale = (high - low) / (2**bits - 1)``, and the zero point is ``-low / scale``, rounded: so an end lies
    at most half a step outside of the range, and what is there rounds to the grid as it would otherwise.

    Args:
        low: 0 or negative.
        high: 0 or positive.
        bits: Of the integers.

    Returns:
        The zero point, and ``amax``.
    """
    steps = 2**bits - 1
    if low == 0:
        return 0, high
    scale = (high - low) / steps
    zero_point = round(-low / scale)
    if zero_point == steps:  # a range has a step above 0
        zero_point = steps - 1
        scale = -low / zero_point
    return zero_point, scale * (steps - zero_point)
