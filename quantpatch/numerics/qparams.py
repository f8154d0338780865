"""``QParams``: what a tensor is rounded by, as one value that is handed from function to function."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from quantpatch.numerics.division import quotient
from quantpatch.numerics.formats import NumberFormat, element_of

__all__ = ["QParams"]


class QParams(NamedTuple):
    """The parameters of quantization of a tensor ``x``.

    Attributes:
        format: The number format.
        amax: The range, float32, broadcastable to ``x``; None where it is that of ``x`` itself, so that
            nothing is clipped but what is negative, if the format has no place for that.
        scale: float32, detached, broadcastable to ``x``; None where it follows from the range.
        dim: For blocks that have scales of their own the axis they run along: there ``amax`` and ``scale``
            have the number of blocks, or 1.
    """

    format: NumberFormat
    amax: Tensor | None
    scale: Tensor | None = None
    dim: int | None = None

    # Methods: torch.compile of torch 2.8 follows no property of a named tuple (nor its _replace).
    def element(self) -> NumberFormat:
        """The format of single elements."""
        return element_of(self.format)

    def clips(self) -> bool:
        """Whether anything can be clipped."""
        return self.amax is not None or self.format.min >= 0

    def scales(self) -> Tensor:
        """The scale, also where it follows from the range."""
        if self.scale is not None:
            return self.scale
        assert self.amax is not None
        return quotient(self.amax.detach(), self.format.max)
