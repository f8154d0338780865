"""The gradients of learned ranges, see :mod:`quantpatch.numerics.backends.lsq`.

Sums are of float64, and the products in them exact. The number of threads does not change their order.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types  # type: ignore[attr-defined,unused-ignore]

from quantpatch.numerics.kernels.source.compilation import (
    BITS,
    DOUBLES,
    ELEMENTS,
    FLOAT,
    FLOATS,
    LONG,
    inlined,
    jit,
    register,
)
from quantpatch.numerics.kernels.source.elements import ZERO, load, quotient, to_grid
from quantpatch.numerics.kernels.source.scale_layout import (
    after,
    end_of_scale,
    next_row,
    scale_of,
)


@inlined
def _element(x, grad, out, i, scale, grid):
    """Passes the gradient to an element; returns that to its scale."""
    v = quotient(load(x, i), scale)
    inside = (v > grid[0]) & (v < grid[1])
    out[i] = grad[i] & -np.int32(inside)
    slope = to_grid(v, grid) - (v if inside else ZERO)
    return np.float64(slope) * np.float64(load(grad, i))


@inlined
def _fold(sums, half):
    for i in range(half):
        sums[i] += sums[i + half]


@inlined
def _lanes(x, grad, out, scale, grid, sums):
    """A sum for every 32nd element, since nothing reorders one: as fast as if there were none."""
    for i in range(32):
        sums[i] += _element(x, grad, out, i, scale, grid)


@jit
def _one_scale(x, grad, out, scale, grid, sums):
    """Neighbours of one scale; returns the gradient to it."""
    whole = x.size // 32 * 32
    for i in range(32):
        sums[i] = 0.0
    for i in range(0, whole, 32):
        upto = i + 32
        _lanes(x[i:upto], grad[i:upto], out[i:upto], scale, grid, sums)
    for i in range(whole, x.size):
        sums[i - whole] += _element(x, grad, out, i, scale, grid)
    for half in (16, 8, 4, 2):
        _fold(sums, half)
    return sums[0] + sums[1]


@jit
def _row(x, grad, out, scales, grid, sums):
    """A run whose elements have a scale each."""
    for i in range(x.size):
        sums[i] += _element(x, grad, out, i, scales[i], grid)


@jit
def _rows(x, grad, out, start, scales, sums, first, length, block, grid):
    i, stop, count = start, start + x.size, scales.size
    lanes = np.empty(32, np.float64)
    which = scale_of(start, length, block) % count
    while i < stop:
        end = end_of_scale(i, stop, length, block)
        here, upto = i - start, end - start
        sums[which - first] += _one_scale(
            x[here:upto], grad[here:upto], out[here:upto], scales[which], grid, lanes
        )  # fmt: skip
        which = after(which, count)
        i = end


@jit
def _several(x, grad, out, start, scales, sums, first, length, block, width, grid):
    if width == 1:
        _rows(x, grad, out, start, scales, sums, first, length, block, grid)
        return
    i, stop, count = start, start + x.size, scales.size
    while i < stop:
        end, to = next_row(i, stop, length, block, width, count)
        here, upto, n = i - start, end - start, end - i
        _row(
            x[here:upto], grad[here:upto], out[here:upto], scales[to : to + n], grid,
            sums[to - first : to - first + n],
        )  # fmt: skip
        i = end


@register(
    types.void, ELEMENTS, BITS, BITS, LONG, LONG, DOUBLES, LONG, LONG, FLOATS, LONG, LONG, LONG, LONG, FLOAT,
    FLOAT, LONG, LONG,
)  # fmt: skip
def lsq(
    x_, grad_, out_, start, size, sums_, first, touched, scales_, count, length, block, width, lowest,
    highest, mantissa_bits, smallest,
):  # fmt: skip
    """Adds to ``sums``, of the ``touched`` scales from the ``first`` on."""
    x, grad, out = carray(x_, size), carray(grad_, size), carray(out_, size)
    sums, scales = carray(sums_, touched), carray(scales_, count)
    if mantissa_bits < 0:
        _several(x, grad, out, start, scales, sums, first, length, block, width, (lowest, highest))
    else:
        _several(
            x, grad, out, start, scales, sums, first, length, block, width,
            (lowest, highest, np.int32(mantissa_bits), np.int32(smallest)),
        )  # fmt: skip
