"""``QParams``: what a tensor is rounded by, as one value that is handed from function to function.

With a zero point ``z`` integers are unsigned: ``z`` of them stand for what is below 0, and ``255 - z`` of 8
bits for what is above. Such a range is known by its upper end, as every other is; where it begins follows
from the zero point.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantpatch.errors import ArgumentError, ArgumentTypeError
from quantpatch.numerics.division import quotient
from quantpatch.numerics.formats import Integer, NumberFormat


class QParams(NamedTuple):
    """The parameters of quantization of a tensor ``x``.

    Attributes:
        format: The number format.
        amax: The range, float32, broadcastable to ``x``; None where it is that of ``x`` itself, so that
            nothing is clipped but what is negative, if the format has no place for that.
        scale: float32, detached, broadcastable to ``x``; None where it follows from the range.
        dim: For blocks that have scales of their own the axis they run along: there ``amax`` and ``scale``
            have the number of blocks, or 1.
        zero_point: Which of the unsigned integers stands for 0; None: integers are what the format says. A
            number where ``x`` is in main memory and can be read. Else it may be a tensor, broadcastable to
            ``x``: nothing is read back to the host, and one graph serves layers that differ in it. The ends
            of the grid are then float32 tensors too.
    """

    format: NumberFormat
    amax: Tensor | None
    scale: Tensor | None = None
    dim: int | None = None
    zero_point: Tensor | int | None = None

    # Methods: torch.compile of torch 2.8 follows no property of a named tuple (nor its _replace).
    def max(self) -> Any:
        """The largest value on the grid; a range becomes a scale by ``amax / max``."""
        zero_point = self.zero_point
        if zero_point is None:
            return self.format.max
        if isinstance(zero_point, Tensor):
            zero_point = zero_point.float()
        return 2.0**self.format.bits - 1.0 - zero_point

    def min(self) -> Any:
        """The smallest value on the grid."""
        zero_point = self.zero_point
        if zero_point is None:
            return self.format.min
        return 0.0 - (zero_point.float() if isinstance(zero_point, Tensor) else zero_point)

    def lower_end(self) -> Any:
        """Where a range begins that ends at 1."""
        zero_point = self.zero_point
        if zero_point is None:
            return self.format.lower_end
        return quotient(self.min(), self.max()) if isinstance(zero_point, Tensor) else self.min() / self.max()

    def longer_side(self) -> Any:
        """How many steps there are on that side of 0 which has more."""
        low, high = self.min(), self.max()
        return torch.maximum(high, -low) if isinstance(high, Tensor) else max(high, -low)

    def clips(self) -> bool:
        """Whether anything can be clipped."""
        if self.amax is not None or isinstance(self.zero_point, Tensor):
            return True
        return bool(self.min() >= 0)

    def scales(self) -> Tensor:
        """The scale, also where it follows from the range."""
        if self.scale is not None:
            return self.scale
        assert self.amax is not None
        return quotient(self.amax.detach(), self.max())

    def round_(self, y: Tensor) -> Tensor:
        """Rounds scaled values to the grid, in place; see :meth:`NumberFormat.round_`."""
        if self.zero_point is None:
            return self.format.round_(y)
        return y.round_().clamp_(self.min(), self.max())

    def magnitudes(self, x: Tensor) -> Tensor:
        """What calibrators get of a tensor: how far the longer side of a range must reach for each element.

        Without a zero point the magnitude of ``x`` says that, so it is ``x``; of formats that hold nothing
        negative it is what is above 0, since no range would hold the rest.

        Args:
            x: Floating point, any shape.

        Returns:
            Of ``x``'s shape; float32 and not negative with a zero point.
        """
        zero_point = self.zero_point
        if zero_point is None:
            return x.clamp(min=0) if self.format.lower_end == 0.0 else x
        low, high, longer = self.min(), self.max(), self.longer_side()
        if isinstance(low, Tensor):
            values = x.float()
            below = quotient(longer, low).masked_fill(low == 0, 0.0)
            return torch.maximum(values * quotient(longer, high), values * below)
        if not zero_point:
            return x.clamp(min=0)
        values = x.float()
        return torch.maximum(values * (longer / high), values * (longer / low))

    def upper_end(self, longer: Tensor) -> Tensor:
        """The upper end of a range, which is its ``amax``, from the length of its longer side."""
        if self.zero_point is None:
            return longer
        high, side = self.max(), self.longer_side()
        if isinstance(high, Tensor):
            return longer * quotient(high, side)
        return longer * (high / side) if side > high else longer


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


def read_zero_point(saved: Tensor, format: NumberFormat) -> int:
    """The zero point that a checkpoint has for a format.

    Raises:
        ArgumentError: It has none that such a format could have.
    """
    if saved.numel() != 1 or saved.is_complex():
        raise ArgumentError(
            f"a zero point is one number; got {saved.dtype} of shape {tuple(saved.shape)}", zero_point=saved
        )
    value = saved.item()
    # An average of it with itself may be off by a rounding.
    number = round(value) if math.isfinite(value) else value
    check_zero_point(number, format)
    return int(number)


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
