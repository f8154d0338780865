"""The round trip of plain tensors in main memory, in eager mode.

There every operation costs a pass over memory, and a small tensor the price of calling it. So the result is
worked on in place, large tensors a piece at a time; a range of one number is a number of Python's; and what
lies outside the range is looked for before, because mostly nothing does: then nothing is clamped, kept for
backward or masked there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from quantpatch.numerics.backends.chunks import pieces
from quantpatch.numerics.backends.clip_mask import Outside, find, zero_outside
from quantpatch.numerics.backends.modes import is_in_memory
from quantpatch.numerics.backends.scales import block_views, divisor, rescale_, spread
from quantpatch.numerics.division import float32
from quantpatch.numerics.formats import Blocked, Integer, NumberFormat, element_of
from quantpatch.numerics.kernels import operations as kernels
from quantpatch.numerics.kernels.scale_layout import memory_order

__all__ = ["Axis", "forward_in_memory", "round_trip_in_memory", "round_trip_to_range"]

Range = Tensor | float
#: The axes that are kept, each index along them with a range of its own.
Axis = int | tuple[int, ...] | None

# Elements worked on at a time: 4 MiB of float32, which stay in the cache from one operation to the next.
# Smaller pieces cost more in calls than they win, up to _WHOLE even these do.
_PIECE = 2**20
_WHOLE = 2**22

# Adding and subtracting it rounds a float32 below 2**22 to an integer, ties to even, and -0 to 0.
_MAGIC = 1.5 * 2**23
_MAGIC_TENSOR = torch.tensor(_MAGIC, dtype=torch.float32, device="cpu")  # sooner added than a number
_LONGEST_ROW = 2**16

_SMALLEST_NORMAL = 2.0**-126


def round_trip_in_memory(
    x: Tensor, amax: Range | None, scale: Range, format: NumberFormat, dim: int | None
) -> Tensor:
    """As :func:`quantpatch.numerics.backends.round_trip.round_trip`, of a range that is not learned."""
    if x.requires_grad and torch.is_grad_enabled():
        return _apply(x, amax, scale, format, dim)
    return forward_in_memory(x, amax, scale, format, dim)


def round_trip_to_range(x: Tensor, amax: Tensor, format: NumberFormat, axis: Axis) -> Tensor | None:
    """The same by ranges that were found before, whose scales follow from them; None if that is not all.

    What quantizers mostly do, so in few steps: after a matrix product nothing of the interpreter is left in
    a core's caches, and each function and object that is touched takes some ten times as long.

    Args:
        x: Anything.
        amax: Any range.
        format: Any format.
        axis: The axes that are kept.
    """
    if (
        not isinstance(x, Tensor)
        or type(amax) is not Tensor
        or not amax.is_cpu
        or amax.dtype is not torch.float32
        or amax.requires_grad
        or isinstance(format, Blocked)
        or not x.is_floating_point()
        or not is_in_memory(x)
        or forward_ad._current_level >= 0
        or (amax.dim() and not _fits(amax.shape, x.shape, axis))
    ):
        return None
    if x.requires_grad and torch.is_grad_enabled():
        return _apply(x, amax, None, format, None)
    rounded = kernels.round_to_range(x, amax, format)
    if rounded is not None:
        return rounded.values
    return forward_in_memory(x, *_range_and_scale(amax, None, format), format, None)


@lru_cache(maxsize=1024)
def _fits(ranges: tuple[int, ...], shape: tuple[int, ...], axis: Axis) -> bool:
    """Whether there is one range for each index along the axes that are kept, or for all of an axis."""
    count = len(shape)
    axes = range(count) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if len(ranges) != count or any(not -count <= a < count for a in axes):
        return False
    kept = {a % count for a in axes}
    return all(m == 1 or (m == n and d in kept) for d, (m, n) in enumerate(zip(ranges, shape, strict=True)))


class _StraightThrough(Function):
    """:func:`forward_in_memory` with the straight-through gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, amax: Range | None, scale: Range | None, format: NumberFormat, dim: int | None
    ) -> Tensor:
        ctx.order = order = None if x.is_contiguous() else memory_order(x)
        if scale is None:
            assert isinstance(amax, Tensor)
            rounded = kernels.round_to_range(x, amax, format, trains=True)
        else:
            rounded = kernels.round_trip(x, amax, scale, format, dim, trains=True)
        if rounded is not None:
            outside = Outside(marks=kernels.mark(x, amax, format, dim)) if rounded.is_hit else Outside()
            result = rounded.values
        else:
            amax, scale = _range_and_scale(amax, scale, format)
            outside = _outside(x, amax, format, dim, order)
            result = forward_in_memory(x, amax, scale, format, dim, all_inside=outside.is_nothing)
        ctx.all_inside = outside.is_nothing
        if not ctx.all_inside:
            ctx.save_for_backward(*outside)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.all_inside:
            order, outside = ctx.order, Outside(*ctx.saved_tensors)
            if order is None:
                grad = zero_outside(grad, outside)
            else:
                ordered = zero_outside(grad.permute(order), outside)
                grad = ordered.permute([order.index(d) for d in range(len(order))])
        return grad, None, None, None, None


# What Function.apply does beside is for torch.func, which no plain tensor comes from.
_apply: Callable[..., Tensor] = super(Function, _StraightThrough).apply


def _range_and_scale(
    amax: Range | None, scale: Range | None, format: NumberFormat
) -> tuple[Range | None, Range]:
    """A range and its scale, as numbers if it is one; a scale that is not given follows from the range."""
    if scale is not None:
        return amax, scale
    assert isinstance(amax, Tensor)
    if amax.dim():
        return amax, amax / format.max
    end = amax.item()
    scale = float32(end / format.max)
    if 0.0 < scale < _SMALLEST_NORMAL:  # which tensors may have flushed to 0
        scale = (amax / format.max).item()
    return end, scale


def _outside(
    x: Tensor, amax: Range | None, format: NumberFormat, dim: int | None, order: list[int] | None
) -> Outside:
    """What of ``x`` is outside the range, in the order of memory."""
    if isinstance(amax, Tensor):
        amax = spread(amax, x, format, dim)
        amax = amax.permute(order) if amax.dim() and order is not None else amax
    if order is not None:
        x = x.permute(order).contiguous()
    return find(x, amax, lower_end=format.lower_end)


def forward_in_memory(
    x: Tensor,
    amax: Range | None,
    scale: Range,
    format: NumberFormat,
    dim: int | None,
    *,
    all_inside: bool | None = None,
    trains: bool = False,
) -> Tensor:
    """``x`` to the grid and back.

    ``all_inside`` says whether nothing lies outside, if that is known; ``trains`` that there is a gradient.
    """
    if not x.numel():
        return torch.empty_like(x)
    rounded = None
    if all_inside is None:
        rounded = kernels.round_trip(x, amax, scale, format, dim, trains=trains)
    if rounded is not None:
        return rounded.values
    out = torch.empty_like(x)
    element = element_of(format)
    if all_inside is None:
        all_inside = amax is None and element.min < 0
    factors: Range = scale
    if isinstance(scale, Tensor):
        factors = scale.item() if scale.numel() == 1 else scale
    smallest = factors if not isinstance(factors, Tensor) else factors.min().item()
    divisors = factors if smallest >= _SMALLEST_NORMAL else divisor(factors)
    # What is inside the range stays on the grid without a clamp: quotients of normal numbers are too near the
    # ends of the grid to round past them. Scales of blocks that are rounded themselves are another matter,
    # and a subclass rounds as it says.
    exact = not isinstance(format, Blocked) or format.scale == "float32"
    clamps = not (all_inside and exact and type(element) is Integer and divisors is factors)
    if dim is None or format.block_size is None or not isinstance(factors, Tensor):
        _write(x, out, factors, divisors, element, clamps)
        return out
    assert isinstance(divisors, Tensor)
    sources, targets = (block_views(t, dim, format.block_size) for t in (x, out))
    counts = [source.shape[dim] for source in sources]
    parts = (
        torch.split(t.unsqueeze(dim + 1), counts, dim) if t.shape[dim] > 1 else [t.unsqueeze(dim + 1)] * 2
        for t in (factors, divisors)
    )
    for source, target, factor, by in zip(sources, targets, *parts, strict=False):
        _write(source, target, factor, by, element, clamps)
    return out


def _write(
    x: Tensor, out: Tensor, factors: Range, divisors: Range, format: NumberFormat, clamps: bool
) -> None:
    """``round(x / divisors) * factors``, clamped between, into ``out``."""
    same = x.dtype == torch.float32
    # Zeros of scale 0 would be negative there.
    if same and type(format) is Integer and isinstance(factors, Tensor) and divisors is factors:
        rows = _rows(x, out, factors)
        if rows is not None:
            _write_rows(*rows, format, clamps)
            return
    round_: Callable[[Tensor], Tensor] = format.round_ if clamps else Tensor.round_
    if same and x.numel() <= _WHOLE:
        tensor = divisors if isinstance(divisors, Tensor) else _tensor(divisors)
        rescale_(round_(torch.div(x, tensor, out=out)), factors, format)
        return
    scratch = None if same else torch.empty(min(x.numel(), _PIECE), dtype=torch.float32)
    several = (factors, divisors) if isinstance(factors, Tensor) and isinstance(divisors, Tensor) else ()
    factor: Range = factors
    by: Range = divisors
    for source, target, *own in pieces(_PIECE, x, out, *several):
        if own:
            factor, by = own[0], own[1]
        if scratch is None:
            y = torch.div(source, by, out=target)
        else:
            y = scratch[: source.numel()].view(source.shape).copy_(source).div_(by)
        rescale_(round_(y), factor, format)
        if scratch is not None:
            target.copy_(y)


def _rows(x: Tensor, out: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """All as rows of one scale each, ``(rows, length)`` and ``(rows, 1)``; None if they do not lie so."""
    if scale.dim() != x.dim() or x.stride() != out.stride():
        return None
    if not x.is_contiguous():
        order = memory_order(x)
        x, out, scale = (t.permute(order) for t in (x, out, scale))
        if not x.is_contiguous():
            return None
    count = scale.numel()
    length = x.numel() // count
    axes = next((d for d in range(scale.dim(), 0, -1) if scale.shape[d - 1] > 1), 0)
    if scale.shape[:axes] != x.shape[:axes] or length > _LONGEST_ROW:
        return None
    return x.view(count, length), out.view(count, length), scale.reshape(count, 1)


def _write_rows(x: Tensor, out: Tensor, scale: Tensor, format: Integer, clamps: bool) -> None:
    """:func:`_write` in three operations instead of four, as zeros come out positive by themselves."""
    size = _WHOLE if x.numel() <= _WHOLE else _PIECE
    for source, target, factor in pieces(size, x, out, scale):
        # magic + source / factor, both rounded; what is too large for it stays large, and is clamped.
        y = torch.addcdiv(_magic_row(source.shape[1]), source, factor, out=target)
        if clamps:
            y.clamp_(_MAGIC + format.min, _MAGIC + format.max)
        y.sub_(_MAGIC_TENSOR).mul_(factor)


@lru_cache(maxsize=1024)
def _tensor(number: float) -> Tensor:
    """A number as a tensor, by which torch divides sooner."""
    return torch.tensor(number, dtype=torch.float32, device="cpu")


@lru_cache(maxsize=64)
def _magic_row(length: int) -> Tensor:
    return torch.full((1, length), _MAGIC, dtype=torch.float32, device="cpu")
