"""How the elements that share a scale lie in memory, for kernels that know no axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor


class ScaleLayout(NamedTuple):
    """Which of the scales is that of which element of a tensor's memory.

    Memory is rows of ``length * width`` elements, cut into blocks of ``block * width``; a block has ``width``
    scales, for elements that are ``width`` apart. Scales follow each other as blocks do, and begin anew when
    all have been used.

    Attributes:
        scales: Their number.
        length: Of a row.
        block: Of a block; the last one of a row may be shorter.
        width: 1: neighbours share a scale.
    """

    scales: int
    length: int
    block: int
    width: int

    def touched(self, start: int, size: int) -> tuple[int, int]:
        """Some scales that hold those of some neighbours: the first of them, and how many follow."""
        row, last = start // self.width, (start + size - 1) // self.width
        begin, end = self._blocks_before(row) * self.width, (self._blocks_before(last) + 1) * self.width
        first = begin % self.scales
        return (first, end - begin) if first + end - begin <= self.scales else (0, self.scales)

    def _blocks_before(self, row: int) -> int:
        return row // self.length * -(-self.length // self.block) + row % self.length // self.block


class OrderedScales(NamedTuple):
    """How scales lie over a tensor, and how they become a tensor in that order.

    Attributes:
        layout: Which of them is that of which element.
        order: The tensor's axes in the order of memory; None: they are in it.
        kept: The shape of the scales, its axes in that order: 1 where an axis shares them.
        laid: The shape that they must be expanded to, to follow each other so.
        repeat: How often each of them must be repeated after that.
    """

    layout: ScaleLayout
    order: list[int] | None
    kept: tuple[int, ...]
    laid: tuple[int, ...]
    repeat: int

    def spread(self, scales: Tensor) -> Tensor:
        """Scales, 0-dim or of the tensor's dimensions, in the layout's order and number, contiguous."""
        scales = scales.detach()
        in_order = self.order is None and scales.is_contiguous() and scales.numel() == self.layout.scales
        if scales.numel() == 1 or in_order:
            return scales
        t = scales if self.order is None else scales.permute(self.order)
        t = t.expand(self.laid).reshape(-1)
        return (t.repeat_interleave(self.repeat) if self.repeat > 1 else t).contiguous()

    def gather(self, found: Tensor, fold: Callable[..., Tensor]) -> Tensor:
        """The other way round: one for each scale of the layout, to the shape of the scales.

        ``fold`` makes one of several, such as ``torch.sum``. A single one stays ``(1,)``.
        """
        if found.numel() == 1:
            return found
        if self.repeat > 1:
            found = fold(found.view(-1, self.repeat), 1)
        found = found.view(self.laid)
        if shared := [d for d, n in enumerate(self.kept) if n < self.laid[d]]:
            found = fold(found, shared, keepdim=True)
        order = self.order
        return found if order is None else found.permute([order.index(d) for d in range(len(order))])


def ordered_scales(x: Tensor, kept: Sequence[int], dim: int | None, block_size: int) -> OrderedScales:
    """How scales lie over a tensor.

    Args:
        x: Without gaps in memory.
        kept: The shape of the scales: of the tensor's dimensions, 1 where an axis shares them; or empty.
        dim: The axis that blocks run along, if there are any.
        block_size: Elements of that axis in a block.
    """
    shape, kept, order = tuple(x.shape), tuple(kept) or (1,) * x.dim(), None
    if not x.is_contiguous():
        order = memory_order(x)
        shape, kept = tuple(shape[d] for d in order), tuple(kept[d] for d in order)
        dim = None if dim is None else order.index(dim)
    layout, laid, repeat = _ordered(shape, kept, dim, block_size)
    return OrderedScales(layout, order, kept, laid, repeat)


def flat(size: int) -> ScaleLayout:
    """One scale for ``size`` elements."""
    return ScaleLayout(1, size, size, 1)


def memory_order(x: Tensor) -> list[int]:
    """The axes of ``x``, the one with the largest steps in memory first."""
    return sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)


@lru_cache(maxsize=1024)
def _ordered(
    shape: tuple[int, ...], kept: tuple[int, ...], dim: int | None, block_size: int
) -> tuple[ScaleLayout, tuple[int, ...], int]:
    """``layout``, ``laid`` and ``repeat`` of a layout, of shapes in the order of memory."""
    if dim is not None and kept[dim] > 1:
        first = next(d for d in range(dim + 1) if kept[d] > 1)
        wide = (*(1,) * first, *shape[first:dim], kept[dim], *shape[dim + 1 :])
        return ScaleLayout(math.prod(wide), shape[dim], block_size, math.prod(shape[dim + 1 :])), wide, 1
    axes = [d for d, n in enumerate(kept) if n > 1]
    if not axes:
        return flat(math.prod(shape)), kept, 1
    first, end = axes[0], axes[-1] + 1
    wide = (*(1,) * first, *shape[first:end], *(1,) * (len(shape) - end))
    outer, count, inner = math.prod(shape[:first]), math.prod(wide), math.prod(shape[end:])
    if inner > 1 and (inner >= _LONG or outer < _LONG):
        return ScaleLayout(count, inner, inner, 1), wide, 1
    # Too short for a loop of its own.
    return ScaleLayout(count * inner, outer, outer, count * inner), wide, inner


_LONG = 16
