"""To the grid and back."""

from __future__ import annotations

import numpy as np
from numba import carray  # type: ignore[attr-defined,unused-ignore]

from quantpatch.numerics.kernels.source.compilation import (
    ELEMENTS,
    FLOAT,
    FLOATS,
    LONG,
    inlined,
    jit,
    register,
)
from quantpatch.numerics.kernels.source.elements import TILE, bottom, load, store, to_grid_and_back
from quantpatch.numerics.kernels.source.scale_layout import (
    after,
    end_of_scale,
    halves,
    is_short,
    next_block,
    next_half,
    next_row,
    scale_of,
)


@jit
def _one_scale(x, out, scale, low, high, grid):
    """Neighbours of one scale; returns whether anything lies outside of ``low .. high``."""
    outside = False
    for i in range(x.size):
        v = load(x, i)
        outside |= (v > high) | (v < low)
        store(out, i, to_grid_and_back(v, scale, grid))
    return outside


@inlined
def _pair(x, out, scale0, scale1, high0, high1, lower_end, grid):
    """Two sixteens, as a loop of a length that the compiler knows: some times as fast for short blocks."""
    outside = False
    low0, low1 = bottom(high0, lower_end), bottom(high1, lower_end)
    for i in range(32):
        v = load(x, i)
        scale, low, high = (scale0, low0, high0) if i < 16 else (scale1, low1, high1)
        outside |= (v > high) | (v < low)
        store(out, i, to_grid_and_back(v, scale, grid))
    return outside


@jit
def _row(x, out, scales, amax, lower_end, grid):
    """Neighbours that have a scale each."""
    outside = False
    for i in range(x.size):
        v = load(x, i)
        high = amax[i]
        outside |= (v > high) | (v < bottom(high, lower_end))
        store(out, i, to_grid_and_back(v, scales[i], grid))
    return outside


@jit
def _rows(x, out, scales, amax, step, lower_end, start, length, block, grid):
    outside = False
    count = scales.size
    which = scale_of(start, length, block) % count
    sixteens, half = halves(start, length, block)
    i, size = 0, x.size
    while sixteens and i + 32 <= size:
        first = which
        which, half = next_half(which, half, sixteens, count)
        outside |= _pair(
            x[i : i + 32], out[i : i + 32], scales[first], scales[which], amax[first * step],
            amax[which * step], lower_end, grid,
        )  # fmt: skip
        which, half = next_half(which, half, sixteens, count)
        i += 32
    while i < size:
        end = end_of_scale(start + i, start + size, length, block) - start
        high = amax[which * step]
        outside |= _one_scale(x[i:end], out[i:end], scales[which], bottom(high, lower_end), high, grid)
        which = after(which, count)
        i = end
    return outside


@jit
def _columns(x, out, scales, amax, lower_end, start, length, block, width, grid):
    outside = False
    i, stop, count = start, start + x.size, scales.size
    short = is_short(start, x.size, block, width)
    many = np.empty((2, TILE if short else 0), np.float32)
    while short and i < stop:
        # Scales of a block, repeated for each of its rows, so that it is one row.
        rows, to = next_block(i, stop, length, block, width, count)
        n = rows * width
        for j in range(width):
            many[0, j], many[1, j] = scales[to + j], amax[to + j]
        k = width
        while k < n:  # twice as many each time
            for j in range(min(k, n - k)):
                many[0, k + j], many[1, k + j] = many[0, j], many[1, j]
            k *= 2
        here = i - start
        outside |= _row(
            x[here : here + n], out[here : here + n], many[0], many[1], lower_end, grid
        )  # fmt: skip
        i += n
    while i < stop:
        end, to = next_row(i, stop, length, block, width, count)
        upto = to + end - i
        outside |= _row(
            x[i - start : end - start], out[i - start : end - start], scales[to:upto],
            amax[to:upto], lower_end, grid,
        )  # fmt: skip
        i = end
    return outside


@jit
def _several(x, out, scales, amax, step, lower_end, start, length, block, width, grid):
    if width == 1:
        return _rows(x, out, scales, amax, step, lower_end, start, length, block, grid)
    return _columns(x, out, scales, amax, lower_end, start, length, block, width, grid)


@register(
    LONG, ELEMENTS, ELEMENTS, LONG, LONG, FLOATS, FLOATS, LONG, LONG, LONG, LONG, LONG, LONG, FLOAT, FLOAT,
    FLOAT, LONG, LONG,
)  # fmt: skip
def round_trip(
    x_, out_, start, size, scales_, amax_, step, follows, count, length, block, width, lower_end, lowest,
    highest, mantissa_bits, smallest,
):  # fmt: skip
    """``follows`` says that the scales are not given, but follow from the ranges."""
    x, out = carray(x_, size), carray(out_, size)
    amax = carray(amax_, (count - 1) * step + 1)
    scales = amax / highest if follows else carray(scales_, count)
    if mantissa_bits < 0:
        return _several(
            x, out, scales, amax, step, lower_end, start, length, block, width, (lowest, highest)
        )  # fmt: skip
    return _several(
        x, out, scales, amax, step, lower_end, start, length, block, width,
        (lowest, highest, np.int32(mantissa_bits), np.int32(smallest)),
    )  # fmt: skip
