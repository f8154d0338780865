"""``QParams``: what a tensor is rounded by, as one value that is handed from function to function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantpatch.numerics.division import quotient
from quantpatch.numerics.formats import NumberFormat, element_of


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
    def element(self) -> NumberFormat:
        """The format of single elements."""
        return element_of(self.format)

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
            return self.element().round_(y)
        return y.round_().clamp_(self.min(), self.max())
