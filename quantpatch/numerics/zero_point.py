"""Zero points: the one that fits a range, and what calibrators see of a range that has one.

With a zero point ``z`` integers are unsigned: ``z`` of them stand for what is below 0, and ``255 - z`` of 8
bits for what is above. Such a range is known by its upper end, as every other is; where it begins follows
from the zero point.
"""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from quantpatch.errors import ArgumentError, ArgumentTypeError
from quantpatch.numerics.division import float32, quotient
from quantpatch.numerics.formats import Integer, NumberFormat
from quantpatch.numerics.qparams import QParams


def check_zero_point(zero_point: Any, format: NumberFormat) -> None:
    """Checks that a format has such a zero point.

    Args:
        zero_point: A number; or a tensor, whose value is not looked at.
        format: The number format.

    Raises:
        ArgumentError: It has not.
    """
    if type(format) is not Integer:
        raise ArgumentError(
            f"only Integer formats have zero points, and {format.name} is a "
            f"{type(format).__name__}; use QuantDescriptor(unsigned=True)",
            zero_point=zero_point,
        )
    if isinstance(zero_point, Tensor):
        return
    highest = 2**format.bits - 2
    is_int = isinstance(zero_point, int) and not isinstance(zero_point, bool)
    if not is_int or not 0 <= zero_point <= highest:
        raise (ArgumentError if is_int else ArgumentTypeError)(
            f"the zero point of {format.bits} bits is an integer from 0 to {highest}, so that 0 and "
            f"something above it are on the grid; got {zero_point!r}",
            zero_point=zero_point,
        )


def check_given(zero_point: Any, format: NumberFormat) -> None:
    """Checks a zero point that stands beside a format in a descriptor.

    Raises:
        ArgumentError: The format has none such, or is one of signed integers, for which it is found.
    """
    check_zero_point(zero_point, format)
    if zero_point and isinstance(format, Integer) and not format.unsigned:
        raise ArgumentError(
            f"signed integers have the zero point 0; a zero point says which unsigned one stands for 0. "
            f"Write unsigned=True, zero_point={zero_point}.",
            zero_point=zero_point,
        )


def of_longer_side(zero_point: int, bits: int) -> int:
    """The zero point that has the steps of a range's longer side above it.

    Calibrators know magnitudes, and count the steps that there are for them.
    """
    other: int = 2**bits - 1 - zero_point
    return min(zero_point, other)


@overload
def bottom(amax: float | None, lower_end: float) -> float: ...
@overload
def bottom(amax: Tensor | float | None, lower_end: float) -> Tensor | float: ...
def bottom(amax: Tensor | float | None, lower_end: float) -> Tensor | float:
    """Where a range begins that ends at ``amax``: float32, as the product of the two.

    Args:
        amax: The upper end; None: there is none, nor a lower one but 0 if that is the format's.
        lower_end: Of a range that ends at 1.
    """
    if lower_end == 0.0:
        return 0.0
    if amax is None:
        return -math.inf
    if lower_end == -1.0:
        return -amax
    return amax * lower_end if isinstance(amax, Tensor) else float32(amax * float32(lower_end))


def magnitudes(x: Tensor, q: QParams) -> Tensor:
    """What calibrators get of a tensor: how far the longer side of a range must reach to hold each element.

    Without a zero point the magnitude of ``x`` says that, so it is ``x``; of formats that hold nothing
    negative it is what is above 0, since no range would hold the rest.

    Args:
        x: Floating point, any shape.
        q: The format and the zero point.

    Returns:
        Of ``x``'s shape; float32 and not negative with a zero point.
    """
    zero_point = q.zero_point
    if zero_point is None:
        return x.clamp(min=0) if q.format.lower_end == 0.0 else x
    low, high, longer = q.min(), q.max(), q.longer_side()
    if isinstance(low, Tensor):
        values = x.float()
        below = quotient(longer, low).masked_fill(low == 0, 0.0)
        return torch.maximum(values * quotient(longer, high), values * below)
    if not zero_point:
        return x.clamp(min=0)
    values = x.float()
    return torch.maximum(values * (longer / high), values * (longer / low))


def upper_end(longer: Tensor, q: QParams) -> Tensor:
    """The upper end of a range, which is its ``amax``, from the length of its longer side."""
    if q.zero_point is None:
        return longer
    high, side = q.max(), q.longer_side()
    if isinstance(high, Tensor):
        return longer * quotient(high, side)
    return longer * (high / side) if side > high else longer


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
