"""Zero points: the one that fits a range, and what calibrators see of a range that has one.

A grid with a zero point (``Integer(8, unsigned=True, zero_point=z)``) has ``z`` steps below 0 and ``255 - z``
above. Its range is known by its upper end, as every other is; where it begins follows from the format.
"""

from __future__ import annotations

import math
from typing import overload

import attrs
import torch
from torch import Tensor

from quantpatch.numerics.division import float32
from quantpatch.numerics.formats import Integer, NumberFormat

__all__ = ["bottom", "fitted_zero_point", "has_zero_point", "longer_side", "magnitudes", "upper_end"]


def has_zero_point(format: NumberFormat) -> bool:
    """Whether 0 is neither the first integer of a format nor that of a signed one."""
    return isinstance(format, Integer) and format.zero_point > 0


def longer_side(format: NumberFormat) -> NumberFormat:
    """A format whose positive side is the longer one of a format with a zero point; others as they are.

    Calibrators know magnitudes, and count the steps that a format has for them.
    """
    if not isinstance(format, Integer) or -format.min <= format.max or not format.unsigned:
        return format
    return attrs.evolve(format, zero_point=2**format.bits - 1 - format.zero_point)


@overload
def bottom(amax: float | None, lower_end: float) -> float: ...
@overload
def bottom(amax: Tensor | float | None, lower_end: float) -> Tensor | float: ...
def bottom(amax: Tensor | float | None, lower_end: float) -> Tensor | float:
    """Where a range begins that ends at ``amax``: float32, as the product of the two.

    Args:
        amax: The upper end; None: there is none, nor a lower one but 0 if that is the format's.
        lower_end: Of the format.
    """
    if lower_end == 0.0:
        return 0.0
    if amax is None:
        return -math.inf
    if lower_end == -1.0:
        return -amax
    return amax * lower_end if isinstance(amax, Tensor) else float32(amax * float32(lower_end))


def magnitudes(x: Tensor, format: NumberFormat) -> Tensor:
    """What calibrators get of a tensor: how far the longer side of a range must reach to hold each element.

    Without a zero point the magnitude of ``x`` says that, so it is ``x``; of formats that hold nothing
    negative it is what is above 0, since no range would hold the rest.

    Args:
        x: Floating point, any shape.
        format: The format.

    Returns:
        Of ``x``'s shape; float32 and not negative with a zero point.
    """
    if not has_zero_point(format):
        return x.clamp(min=0) if format.lower_end == 0.0 else x
    longer = longer_side(format).max
    values = x.float()
    return torch.maximum(values * (longer / format.max), values * (longer / format.min))


def upper_end(longer: Tensor, format: NumberFormat) -> Tensor:
    """The upper end of a range, which is its ``amax``, from the length of its longer side."""
    side = longer_side(format)
    return longer if side is format else longer * (format.max / side.max)


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
