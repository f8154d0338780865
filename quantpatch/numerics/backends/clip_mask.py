"""Which elements lie outside a range, kept for the backward pass in at most a byte an element.

The straight-through gradient is zero there. Keeping the tensor itself would say it too, for four bytes an
element and as long as the graph lives. But nothing is outside of the range that a tensor was calibrated to:
looking for extremes costs about what clamping costs, which is not needed if there are none.

Finding is for eager mode on a CPU: values are read, and passes over memory counted.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from quantpatch.numerics.division import float32


class ClipMask(NamedTuple):
    """Which elements lie outside a range.

    Attributes:
        kind: How that is kept: ``"nothing"`` lies outside; ``"bytes"``, 0 for what does; ``"bits"``, the
            same, of the first element the lowest; or the ``"values"`` themselves, to be compared again.
        tensor: What is kept: int8 of the tensor's shape, -1 inside, or bool; int32, ``(elements / 32,)``
            rounded up; the tensor itself.
        order: The axes in the order in which the elements are counted; None: they are in it.
    """

    kind: Literal["nothing", "bytes", "bits", "values"] = "nothing"
    tensor: Tensor | None = None
    order: list[int] | None = None

    def ordered(self, grad: Tensor) -> Tensor:
        """A gradient with its axes in that order."""
        return grad if self.order is None else grad.permute(self.order)

    def restored(self, grad: Tensor) -> Tensor:
        """The other way round."""
        order = self.order
        return grad if order is None else grad.permute([order.index(d) for d in range(len(order))])


#: Of a tensor of which nothing lies outside.
NOTHING = ClipMask()


def find_clipped(x: Tensor, amax: Tensor | float | None, *, lower_end: float) -> ClipMask:
    """The elements outside of ``amax * lower_end .. amax``. NaN is inside.

    Args:
        x: Floating point, any shape and strides; compared in float32.
        amax: The range: a number, or float32, 0-dim or of ``x``'s number of dimensions, with 1 where an axis
            shares it. None: nothing is outside, but what is negative if ``lower_end`` is 0.
        lower_end: Of the format: -1, 0, or what a zero point makes of it.
    """
    if x.numel() == 0 or (amax is None and lower_end < 0):
        return NOTHING
    if isinstance(amax, Tensor) and amax.numel() == 1:
        amax = amax.item()
    if not isinstance(amax, Tensor):
        least, greatest = (end.item() for end in torch.aminmax(x))
        if bottom(amax, lower_end) <= least and greatest <= (math.inf if amax is None else amax):
            return NOTHING
    # Of floats 0 and 1, in float32, as comparisons that give bools are not vectorised.
    if lower_end == -1.0:
        outside = x.abs().float().gt_(amax)  # type: ignore[arg-type]
    else:
        room = x.float() - bottom(amax, lower_end)
        outside = (room if amax is None else torch.minimum(amax - x.float(), room)).lt_(0.0)
    mask = outside.to(torch.int8).sub_(1)
    return ClipMask("bytes", mask) if mask.amax().item() == 0 else NOTHING


def is_clipped(x: Tensor, amax: Tensor | float | None, *, lower_end: float) -> Tensor:
    """What :func:`find_clipped` finds, in plain operations, on any device: bool of the shape of ``x``."""
    values = x.float()
    if amax is None:
        return values < 0
    if lower_end == -1.0:
        return values.abs() > amax
    return (values > amax) | (values < bottom(amax, lower_end))


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
