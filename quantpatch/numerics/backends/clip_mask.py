"""Which elements lie outside a range, kept for the backward pass in at most a byte an element.

The straight-through gradient is zero there. Keeping the tensor itself would tell, for four bytes an element
and as long as the graph lives. But nothing is outside of the range that a tensor was calibrated to, and
mostly very little of the next one. Looking for extremes, row by row, costs about what clamping costs, which
is not needed if there are none. What is found is kept as nothing, as positions, or as a byte an element.

For eager mode on a CPU: values are read, and passes over memory counted.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from quantpatch.numerics.affine import bottom
from quantpatch.numerics.backends.chunks import pieces
from quantpatch.numerics.backends.modes import is_plain_gradient
from quantpatch.numerics.kernels import operations as kernels

__all__ = ["Outside", "find", "is_outside", "zero_outside"]

# Elements in a row that is looked through. Shorter rows take longer, longer ones hide less.
_ROW, _SHORTEST_ROW = 512, 16
# Where more of the rows than this hold something outside, a byte an element is less work than positions.
_FEW = 1 / 8
# Elements at a time: those whose extremes are sought stay in a CPU's shared cache, those that bytes are made
# of in a core's own. Up to _SMALL the price of calls is what counts.
_PIECE, _CHUNK, _SMALL = 2**20, 2**17, 2**16
# Integers of the size of an element.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Outside(NamedTuple):
    """What lies outside, by its place in a contiguous tensor; nothing where all are None.

    Attributes:
        positions: ``(elements outside,)``, int32, or int64 in tensors of 2**31 elements and more.
        mask: int8 of the tensor's shape; 0 outside, else -1: all bits are set.
        marks: int32, ``(elements / 32,)`` rounded up; a bit each, from the lowest on, 0 outside.
    """

    positions: Tensor | None = None
    mask: Tensor | None = None
    marks: Tensor | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether nothing lies outside."""
        return self.positions is None and self.mask is None and self.marks is None


_NOTHING = Outside()


def find(x: Tensor, amax: Tensor | float | None, *, lower_end: float) -> Outside:
    """The elements outside of ``amax * lower_end .. amax``. NaN is inside.

    Args:
        x: Floating point, any shape, contiguous; compared in float32.
        amax: The range: a number, or float32, 0-dim or of ``x``'s number of dimensions, with 1 where an axis
            shares it. None: nothing is outside, but what is negative if ``lower_end`` is 0.
        lower_end: Of the format: -1, 0, or what a zero point makes of it.
    """
    if x.numel() == 0 or (amax is None and lower_end < 0):
        return _NOTHING
    if isinstance(amax, Tensor) and amax.numel() == 1:
        amax = amax.item()
    if x.numel() <= _SMALL and not isinstance(amax, Tensor):
        low, high = (extreme.float().item() for extreme in torch.aminmax(x))
        if bottom(amax, lower_end) <= low and high <= (math.inf if amax is None else amax):
            return _NOTHING
        if low == low:  # not NaN, which would hide whether anything is outside
            return Outside(mask=_mask(x, amax, lower_end))
    rows, ends = _rows(x, amax)
    if rows is None:
        mask = _mask(x, amax, lower_end)
        return Outside(mask=mask) if mask.amax().item() == 0 else _NOTHING
    few = _FEW if x.numel() > _SMALL else 0.0  # where calls are what counts, positions cost too many
    if x.numel() > 8 * _SMALL and _sample_is_hit(rows, ends, lower_end):
        return Outside(mask=_mask(rows, ends, lower_end).view(x.shape))
    found, start = [], 0
    several = (ends,) if isinstance(ends, Tensor) else ()
    for part, *own in pieces(_PIECE, rows, *several):
        end = own[0] if own else ends
        inside = _inside(part, end, lower_end)
        if not inside.min().item():
            hit = inside.logical_not_().view(-1).nonzero().view(-1)
            if hit.numel() > few * part.shape[0]:
                return Outside(mask=_mask(rows, ends, lower_end).view(x.shape))
            end = end.index_select(0, hit) if isinstance(end, Tensor) else end
            row, column = is_outside(part.index_select(0, hit), end, lower_end=lower_end).nonzero().unbind(1)
            found.append(hit.index_select(0, row).add_(start).mul_(rows.shape[1]).add_(column))
        start += part.shape[0]
    positions = found[0] if len(found) == 1 else torch.cat(found) if found else None
    if positions is None or not positions.numel():  # the latter if there was only NaN
        return _NOTHING
    return Outside(positions.int() if x.numel() < 2**31 else positions)


def zero_outside(grad: Tensor, outside: Outside) -> Tensor:
    """``grad``, with 0 at the places outside.

    Args:
        grad: Of the shape in which :func:`find` saw the tensor, any strides.
        outside: What it found.
    """
    positions, mask, marks = outside
    if positions is not None:
        # One copy, of which a few elements are overwritten.
        return grad.reshape(-1).index_fill(0, positions.long(), 0.0).view(grad.shape)
    if mask is None and marks is None:
        return grad
    plain = is_plain_gradient(grad)
    if marks is not None:
        return kernels.keep(grad, marks) if plain else grad.masked_fill(~_unpacked(marks, grad), 0.0)
    assert mask is not None
    if not plain:
        return grad.masked_fill(mask == 0, 0.0)  # whoever records the operations wants plain ones
    # torch's operations with masks are not vectorised, those with bits are, which infinities are to them too.
    bits = _BITS[grad.element_size()]
    out = torch.empty(grad.shape, dtype=bits)
    for target, part, upstream in pieces(_CHUNK, out, mask, grad.view(bits)):
        target.copy_(part).bitwise_and_(upstream)
    return out.view(grad.dtype)


def _unpacked(marks: Tensor, like: Tensor) -> Tensor:
    """A bool for each mark."""
    bits = torch.arange(32, dtype=torch.int32, device="cpu")
    return (marks[:, None] >> bits & 1).view(-1)[: like.numel()].view(like.shape).bool()


def is_outside(x: Tensor, amax: Tensor | float | None, *, lower_end: float) -> Tensor:
    """What :func:`find` finds, in plain operations, on any device: bool of the shape of ``x``."""
    values = x.float()
    if amax is None:
        return values < 0
    if lower_end == -1.0:
        return values.abs() > amax
    return (values > amax) | (values < bottom(amax, lower_end))


def _rows(x: Tensor, amax: Tensor | float | None) -> tuple[Tensor | None, Tensor | float | None]:
    """``x`` in rows of one range each, and the ranges, a number or ``(rows, 1)``; None if too short."""
    if isinstance(amax, Tensor):
        own = max(axis for axis, n in enumerate(amax.shape) if n > 1) + 1
        inner = math.prod(x.shape[own:])
        length = _row_length(inner)
        # Each range once for each of its rows.
        if amax.shape[:own] != x.shape[:own]:
            amax = amax.expand(*x.shape[:own], *amax.shape[own:])
        amax = amax.reshape(-1, 1)
        if length < inner:
            amax = amax.expand(-1, inner // length).reshape(-1, 1)
    else:
        length = _row_length(x.numel())
    if length < min(_SHORTEST_ROW, x.numel()):
        return None, None
    return x.view(-1, length), amax


@lru_cache(maxsize=1024)
def _row_length(inner: int) -> int:
    """The largest divisor of ``inner`` up to ``_ROW``."""
    return next(n for n in range(min(_ROW, inner), 0, -1) if inner % n == 0)


def _inside(rows: Tensor, end: Tensor | float | None, lower_end: float) -> Tensor:
    """Whether nothing of a row lies outside, nor is NaN, which would hide it: bool, ``(rows, 1)``."""
    low = rows.amin(1, keepdim=True).float()
    if end is None:
        return low >= 0.0
    high = rows.amax(1, keepdim=True).float()
    if lower_end == -1.0:
        return torch.maximum(low.neg_(), high) <= end
    return (low >= bottom(end, lower_end)).logical_and_(high <= end)


def _sample_is_hit(rows: Tensor, ends: Tensor | float | None, lower_end: float) -> bool:
    """Whether a mask is due by some of the rows, evenly spaced, so that no other need be searched."""
    every = -(-rows.numel() // max(_SMALL, 1))
    own = ends[::every] if isinstance(ends, Tensor) else ends
    inside = _inside(rows[::every], own, lower_end)
    return inside.numel() - int(inside.sum()) > _FEW * inside.numel()


def _mask(x: Tensor, ends: Tensor | float | None, lower_end: float) -> Tensor:
    """The mask of :class:`Outside`.

    Args:
        x: Any shape, contiguous.
        ends: The ranges; a number, or broadcastable to ``x``.
        lower_end: Of the format.
    """
    mask = torch.empty(x.shape, dtype=torch.int8)
    several = (ends,) if isinstance(ends, Tensor) else ()
    for part, target, *own in pieces(_CHUNK, x, mask, *several):
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
    if size > _CHUNK:
        return torch.empty(size, dtype=torch.float32, device="cpu")
    memory: Tensor | None = getattr(_of_thread, "memory", None)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):
            memory = _of_thread.memory = torch.empty(_CHUNK, dtype=torch.float32, device="cpu")
    return memory[:size]
