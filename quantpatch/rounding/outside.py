"""Which elements lie outside a range, kept for the backward pass in at most a byte an element.

The straight-through gradient is zero there. Keeping the tensor itself would tell, for four bytes an element
and as long as the graph lives. But nothing is outside of the range that a tensor was calibrated to, and
mostly very little of the next one. Looking for extremes, row by row, costs about what clamping costs, which
is not needed if there are none. What is found is kept as nothing, as positions, or as a byte an element.

For eager mode on a CPU: values are read, and passes over memory counted.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from quantpatch.rounding.pieces import pieces

__all__ = ["Outside", "find", "is_outside", "zero_outside"]

# Elements in a row that is looked through. Shorter rows take longer, longer ones hide less.
_ROW, _SHORTEST_ROW = 512, 16
# Where more of the rows than this hold something outside, a byte an element is less work than positions.
_FEW = 1 / 8
# Elements at a time: those whose extremes are sought stay in a CPU's shared cache, those that bytes are made
# of in a core's own. Up to _SMALL the price of calls is what counts.
_PIECE, _CHUNK, _SMALL = 2**22, 2**18, 2**16


class Outside(NamedTuple):
    """What lies outside, by its place in a contiguous tensor; nothing where both are None.

    Attributes:
        positions: ``(elements outside,)``, int32, or int64 in tensors of 2**31 elements and more.
        mask: int8 of the tensor's shape; 1 outside, else 0.
    """

    positions: Tensor | None = None
    mask: Tensor | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether nothing lies outside."""
        return self.positions is None and self.mask is None


def find(x: Tensor, amax: Tensor | None, *, lower_end: float) -> Outside:
    """The elements outside of ``amax * lower_end .. amax``. NaN is inside.

    Args:
        x: Floating point, any shape, contiguous; compared in float32.
        amax: The range: float32, 0-dim or of ``x``'s number of dimensions, with 1 where an axis shares it.
            None: nothing is outside, but what is negative if ``lower_end`` is 0.
        lower_end: Of the format: -1, 0, or what a zero point makes of it.
    """
    if x.numel() == 0 or (amax is None and lower_end < 0):
        return Outside()
    if x.numel() <= _SMALL and (amax is None or amax.numel() == 1):
        low, high = (extreme.float().item() for extreme in torch.aminmax(x))
        bound = math.inf if amax is None else amax.item()
        if (-bound if lower_end == -1.0 else float(_bottom(amax, lower_end))) <= low and high <= bound:
            return Outside()
    rows, bounds = _rows(x, amax)
    if rows is None:
        mask = _mask(x, amax, lower_end)
        return Outside(mask=mask) if mask.any() else Outside()
    hit = _hit(rows, bounds, lower_end)
    if not hit.numel():
        return Outside()
    if hit.numel() > _FEW * rows.shape[0]:
        return Outside(mask=_mask(rows, bounds, lower_end).view(x.shape))
    if bounds is not None and bounds.dim():
        bounds = bounds.index_select(0, hit)
    row, column = is_outside(rows.index_select(0, hit), bounds, lower_end=lower_end).nonzero().unbind(1)
    if not row.numel():  # only NaN
        return Outside()
    positions = hit.mul_(rows.shape[1]).index_select(0, row).add_(column)
    return Outside(positions.int() if x.numel() < 2**31 else positions)


def zero_outside(grad: Tensor, outside: Outside, *, recorded: bool) -> Tensor:
    """``grad``, with 0 at the places outside.

    Args:
        grad: Of the shape in which :func:`find` saw the tensor, any strides.
        outside: What it found.
        recorded: Whether somebody records the operations, so that they must be plain ones.
    """
    positions, mask = outside
    if positions is not None:
        # One copy, of which a few elements are overwritten.
        return grad.reshape(-1).index_fill(0, positions.long(), 0.0).view(grad.shape)
    if mask is None:
        return grad
    if recorded:
        return grad.masked_fill(mask.view(torch.bool), 0.0)
    # torch's operations with masks are not vectorised; the gradient of hardtanh is, and so is int8 to float.
    out = torch.empty_like(grad)
    scratch = torch.empty(min(grad.numel(), _CHUNK), dtype=grad.dtype)
    for upstream, part, target in pieces(_CHUNK, grad, mask, out):
        outside_ = scratch[: part.numel()].view(part.shape).copy_(part)
        torch.ops.aten.hardtanh_backward(upstream, outside_, -1.0, 0.5, grad_input=target)
    return out


def is_outside(x: Tensor, amax: Tensor | None, *, lower_end: float) -> Tensor:
    """What :func:`find` finds, in plain operations, on any device: bool of the shape of ``x``."""
    values = x.float()
    if amax is None:
        return values < 0
    if lower_end == -1.0:
        return values.abs() > amax
    return (values > amax) | (values < _bottom(amax, lower_end))


def _bottom(amax: Tensor | None, lower_end: float) -> Tensor | float:
    """The lower end of a range: float32, as the product of the upper one."""
    if amax is None or lower_end == 0.0:
        return 0.0
    return -amax if lower_end == -1.0 else amax * lower_end


def _rows(x: Tensor, amax: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """``x`` in rows of one bound each, and the bounds, 0-dim or ``(rows, 1)``; None if too short."""
    if amax is None or amax.numel() == 1:
        length = _row_length(x.numel())
        bounds = None if amax is None else amax.reshape(())
    else:
        own = max(axis for axis, n in enumerate(amax.shape) if n > 1) + 1
        inner = math.prod(x.shape[own:])
        length = _row_length(inner)
        bounds = amax.expand(*x.shape[:own], *amax.shape[own:]).reshape(-1, 1)
        bounds = bounds.repeat_interleave(inner // length, 0)
    if length < min(_SHORTEST_ROW, x.numel()):
        return None, None
    return x.view(-1, length), bounds


@lru_cache(maxsize=1024)
def _row_length(inner: int) -> int:
    """The largest divisor of ``inner`` up to ``_ROW``."""
    return next(n for n in range(min(_ROW, inner), 0, -1) if inner % n == 0)


def _hit(rows: Tensor, bounds: Tensor | None, lower_end: float) -> Tensor:
    """Indices of the rows that hold something outside, or NaN, which hides it."""
    step = max(1, _PIECE // rows.shape[1])
    hit = []
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        end = bounds[start : start + step] if bounds is not None and bounds.dim() else bounds
        inside = part.amin(1, keepdim=True).float() >= _bottom(end, lower_end)
        if end is not None:
            inside &= part.amax(1, keepdim=True).float() <= end
        hit.append(inside.logical_not_().view(-1).nonzero().view(-1).add_(start))
    return hit[0] if len(hit) == 1 else torch.cat(hit)


def _mask(x: Tensor, bounds: Tensor | None, lower_end: float) -> Tensor:
    """What lies outside as int8, for main memory: comparisons that give bools are not vectorised."""
    mask = torch.empty(x.shape, dtype=torch.int8)
    scratch = torch.empty(min(x.numel(), _CHUNK))
    ends = [] if bounds is None else [bounds]
    for part, target, *end in pieces(_CHUNK, x, mask, *ends):
        y, part = scratch[: part.numel()].view(part.shape), part.float()
        if not end:
            torch.lt(part, 0.0, out=y)
        elif lower_end == -1.0:
            torch.gt(torch.abs(part, out=y), end[0], out=y)
        else:
            above_bottom = part if lower_end == 0.0 else part - _bottom(end[0], lower_end)
            torch.lt(torch.minimum(torch.sub(end[0], part, out=y), above_bottom, out=y), 0.0, out=y)
        target.copy_(y)
    return mask
