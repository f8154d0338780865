"""Which elements lie outside a range, kept for the backward pass in at most a byte an element.

The straight-through gradient is zero there. Keeping the tensor itself would say it too, for four bytes an
element and as long as the graph lives. But nothing is outside of the range that a tensor was calibrated to:
looking for extremes costs about what clamping costs, which is not needed if there are none.

Finding is for eager mode on a CPU: values are read, and passes over memory counted.
"""

from __future__ import annotations

import math
import threading
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from quantpatch.numerics.backends.chunks import chunked
from quantpatch.numerics.division import float32
from quantpatch.numerics.kernels.scale_layout import memory_order

# Elements in a row whose extremes are sought; of shorter ones that takes longer than to look at each.
_SHORTEST_ROW = 16
# Elements at a time: those whose extremes are sought stay in a CPU's shared cache, those that bytes are made
# of in a core's own.
_SEARCH_CHUNK, _MASK_CHUNK = 2**20, 2**17
# Up to so many elements the price of calls is what counts.
_SMALL = 2**14


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
    order = None
    if not x.is_contiguous():
        order = memory_order(x)
        x = x.permute(order).contiguous()
        amax = amax.permute(order) if isinstance(amax, Tensor) and amax.dim() else amax
    if isinstance(amax, Tensor) and amax.numel() == 1:
        amax = amax.item()
    if x.numel() <= _SMALL and isinstance(amax, Tensor):
        clipped = is_clipped(x, amax, lower_end=lower_end)
        return ClipMask("bytes", clipped.to(torch.int8).sub_(1), order) if clipped.any() else NOTHING
    if _is_all_inside(x, amax, lower_end):
        return NOTHING
    mask = _mask(x, amax, lower_end)
    return ClipMask("bytes", mask, order) if mask.amax().item() == 0 else NOTHING


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


def _is_all_inside(x: Tensor, amax: Tensor | float | None, lower_end: float) -> bool:
    """Whether nothing lies outside, as far as extremes say it: of NaN and of short rows they do not."""
    if not isinstance(amax, Tensor):
        low, high = bottom(amax, lower_end), math.inf if amax is None else amax
        for (part,) in chunked(_SEARCH_CHUNK, x):
            least, greatest = torch.aminmax(part)
            if not (low <= least.item() and greatest.item() <= high):
                return False
        return True
    own = max(axis for axis, n in enumerate(amax.shape) if n > 1) + 1
    if math.prod(x.shape[own:]) < _SHORTEST_ROW:
        return False
    rows = x.view(*x.shape[:own], -1)
    several = amax.reshape(*amax.shape[:own], 1)
    return all(
        bool(
            (part.amin(-1, keepdim=True).float() >= bottom(end, lower_end))
            .logical_and_(part.amax(-1, keepdim=True).float() <= end)
            .all()
        )
        for part, end in chunked(_SEARCH_CHUNK, rows, several)
    )


def _mask(x: Tensor, ends: Tensor | float | None, lower_end: float) -> Tensor:
    """The bytes of :class:`ClipMask`.

    Args:
        x: Any shape, contiguous.
        ends: The ranges; a number, or broadcastable to ``x``.
        lower_end: Of the format.
    """
    mask = torch.empty(x.shape, dtype=torch.int8)
    several = (ends,) if isinstance(ends, Tensor) else ()
    for part, target, *own in chunked(_MASK_CHUNK, x, mask, *several):
        end = own[0] if own else ends
        # In float32, as comparisons that give bools are not vectorised.
        y = _scratch(part.numel()).view(part.shape)
        if lower_end == -1.0:
            y = torch.abs(part, out=y) if part.dtype == torch.float32 else y.copy_(part).abs_()
            target.copy_(y.gt_(end))  # type: ignore[arg-type]
            continue
        y.copy_(part)
        if end is not None:
            above_bottom = y - bottom(end, lower_end) if lower_end else y
            torch.minimum(end - y, above_bottom, out=y)
        target.copy_(y.lt_(0.0))
    return mask.sub_(_ONE)


_ONE = torch.ones((), dtype=torch.int8, device="cpu")
_of_thread = threading.local()


def _scratch(size: int) -> Tensor:
    """float32 memory of this thread; new memory would cost more than what is done in it."""
    if size > _MASK_CHUNK:
        return torch.empty(size, dtype=torch.float32, device="cpu")
    memory: Tensor | None = getattr(_of_thread, "memory", None)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):
            memory = _of_thread.memory = torch.empty(_MASK_CHUNK, dtype=torch.float32, device="cpu")
    return memory[:size]
