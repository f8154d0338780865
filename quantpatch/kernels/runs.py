"""How the elements that share a scale lie in memory, for kernels that know no axes."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

__all__ = ["Runs", "flat", "memory_order", "runs_of"]


class Runs(NamedTuple):
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


def flat(size: int) -> Runs:
    """One scale for ``size`` elements."""
    return Runs(1, size, size, 1)


def memory_order(x: Tensor) -> list[int]:
    """The axes of ``x``, the one with the largest steps in memory first."""
    return sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)


@lru_cache(maxsize=1024)
def runs_of(
    shape: tuple[int, ...], kept: tuple[int, ...], dim: int | None, block_size: int
) -> tuple[Runs, tuple[int, ...], int]:
    """How scales lie over a tensor.

    Args:
        shape: Of the tensor, its axes in the order of memory.
        kept: Of the scales, in the same order: 1 where an axis shares them.
        dim: The axis that blocks run along, if there are any.
        block_size: Elements of that axis in a block.

    Returns:
        Where they lie; the shape that they must be expanded to, to follow each other as the runs do; and how
        often each of them must be repeated after that.
    """
    if dim is not None and kept[dim] > 1:
        first = next(d for d in range(dim + 1) if kept[d] > 1)
        wide = (*(1,) * first, *shape[first:dim], kept[dim], *shape[dim + 1 :])
        return Runs(math.prod(wide), shape[dim], block_size, math.prod(shape[dim + 1 :])), wide, 1
    axes = [d for d, n in enumerate(kept) if n > 1]
    if not axes:
        return flat(math.prod(shape)), kept, 1
    first, end = axes[0], axes[-1] + 1
    wide = (*(1,) * first, *shape[first:end], *(1,) * (len(shape) - end))
    outer, count, inner = math.prod(shape[:first]), math.prod(wide), math.prod(shape[end:])
    if inner > 1 and (inner >= _LONG or outer < _LONG):
        return Runs(count, inner, inner, 1), wide, 1
    # Too short for a loop of its own.
    return Runs(count * inner, outer, outer, count * inner), wide, inner


_LONG = 16
