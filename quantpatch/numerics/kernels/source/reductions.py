"""Largest magnitudes, and histograms."""

from __future__ import annotations

import numpy as np
from numba import carray, types  # type: ignore[attr-defined,unused-ignore]

from quantpatch.numerics.kernels.source.compilation import (
    ELEMENTS,
    FLOATS,
    INTS,
    LONG,
    LONGS,
    jit,
    register,
)
from quantpatch.numerics.kernels.source.elements import TILE, load, magnitude
from quantpatch.numerics.kernels.source.scale_layout import (
    after,
    end_of_scale,
    is_short,
    next_block,
    next_row,
    scale_of,
)


@jit
def _peak(x):
    """The largest magnitude, as its bits."""
    largest = np.int32(0)
    for i in range(x.size):
        bits = magnitude(x, i)
        largest = bits if bits > largest else largest
    return largest


@jit
def _peaks_of_rows(x, peaks, start, length, block):
    count = peaks.size
    which = scale_of(start, length, block) % count
    i, size = 0, x.size
    while i < size:
        end = end_of_scale(start + i, start + size, length, block) - start
        peak = _peak(x[i:end])
        peaks[which] = peak if peak > peaks[which] else peaks[which]
        which = after(which, count)
        i = end


@jit
def _peaks_of_columns(x, peaks, start, length, block, width):
    i, stop, count = start, start + x.size, peaks.size
    short = is_short(start, x.size, block, width)
    folded = np.empty(TILE if short else 0, np.int32)
    while short and i < stop:
        rows, to = next_block(i, stop, length, block, width, count)
        some = x[i - start : i - start + rows * width]
        for j in range(some.size):
            folded[j] = magnitude(some, j)
        i += rows * width
        while rows > 1:
            half = rows // 2
            second = folded[(rows - half) * width : rows * width]
            for j in range(second.size):
                folded[j] = max(folded[j], second[j])
            rows -= half
        for j in range(width):
            peaks[to + j] = max(peaks[to + j], folded[j])
    while i < stop:
        end, to = next_row(i, stop, length, block, width, count)
        some, target = x[i - start : end - start], peaks[to : to + end - i]
        for j in range(some.size):
            bits = magnitude(some, j)
            target[j] = bits if bits > target[j] else target[j]
        i = end


@register(types.void, ELEMENTS, LONG, LONG, INTS, LONG, LONG, LONG, LONG)
def amax(x, start, size, peaks, count, length, block, width):
    if width == 1:
        _peaks_of_rows(carray(x, size), carray(peaks, count), start, length, block)
    else:
        _peaks_of_columns(carray(x, size), carray(peaks, count), start, length, block, width)


@jit
def _count(x, factor, counts):
    # Two histograms, as a CPU waits for a count to be written before it raises the same one again; and
    # unsigned indices, which numba need not compare with 0.
    bins = counts.size
    twice = np.zeros(2 * bins, np.uint32)
    indices = np.empty(TILE, np.uint32)
    second, last, one = np.uint64(bins), np.uint32(bins - 1), np.uint32(1)
    for tile in range(0, x.size, TILE):
        some = x[tile : tile + TILE]
        for i in range(some.size):
            index = np.uint32(np.int32(abs(load(some, i) * factor)))
            indices[i] = min(index, last)  # of infinity and NaN, too
        for i in range(some.size // 2):
            twice[np.uint64(indices[np.uint64(2 * i)])] += one
            twice[np.uint64(indices[np.uint64(2 * i + 1)]) + second] += one
        if some.size % 2:
            twice[np.uint64(indices[np.uint64(some.size - 1)])] += one
    for i in range(bins):
        counts[i] += np.int64(twice[i]) + np.int64(twice[bins + i])


@register(types.void, ELEMENTS, LONG, LONG, FLOATS, LONGS, LONG)
def count(x_, rows, length, factors_, counts_, bins):
    x, factors, counts = carray(x_, (rows, length)), carray(factors_, rows), carray(counts_, (rows, bins))
    for row in range(rows):
        _count(x[row], factors[row], counts[row])
