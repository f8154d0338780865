"""Which elements lie outside a range, and the gradient that is zero there."""

from __future__ import annotations

import numpy as np
from numba import carray, types  # type: ignore[attr-defined,unused-ignore]

from quantpatch.numerics.kernels.source.compilation import (
    BITS,
    ELEMENTS,
    FLOAT,
    FLOATS,
    INTS,
    LONG,
    jit,
    register,
)
from quantpatch.numerics.kernels.source.elements import TILE, bottom, load
from quantpatch.numerics.kernels.source.scale_layout import end_of_scale, next_row, scale_of


@jit
def _note(x, notes, low, high):
    for i in range(x.size):
        v = load(x, i)
        notes[i] = np.uint8(0) if (v > high) | (v < low) else np.uint8(1)


@jit
def _note_row(x, notes, amax, lower_end):
    for i in range(x.size):
        v = load(x, i)
        notes[i] = np.uint8(0) if (v > amax[i]) | (v < bottom(amax[i], lower_end)) else np.uint8(1)


@jit
def _mark(x, words, start, amax, lower_end, length, block, width):
    notes = np.zeros(TILE, np.uint8)
    eights = notes.view(np.uint64)
    marks = words.view(np.uint8)
    for tile in range(0, x.size, TILE):
        upto = min(tile + TILE, x.size)
        i = tile
        while i < upto:
            if width == 1:
                end = end_of_scale(start + i, start + upto, length, block) - start
                high = amax[scale_of(start + i, length, block) % amax.size]
                _note(x[i:end], notes[i - tile : end - tile], bottom(high, lower_end), high)
            else:
                end, to = next_row(start + i, start + upto, length, block, width, amax.size)
                end -= start
                _note_row(x[i:end], notes[i - tile : end - tile], amax[to : to + end - i], lower_end)
            i = end
        for g in range((upto - tile + 7) // 8):
            # Eight bytes of 0 or 1 become the bits of the highest one.
            eight = np.uint64(eights[g] * np.uint64(0x0102040810204080))
            marks[tile // 8 + g] = np.uint8(np.uint64(eight >> np.uint64(56)))


@register(types.void, ELEMENTS, INTS, LONG, LONG, FLOATS, LONG, LONG, LONG, LONG, FLOAT)
def mark(x, words, start, size, amax, count, length, block, width, lower_end):
    _mark(
        carray(x, size), carray(words, (size + 31) // 32), start, carray(amax, count), lower_end, length,
        block, width,
    )  # fmt: skip


@register(types.void, BITS, BITS, INTS, LONG)
def keep(grad_, out_, words_, size):
    grad, out, words = carray(grad_, size), carray(out_, size), carray(words_, (size + 31) // 32)
    for w in range(size // 32):
        word = words[w]
        some, target = grad[32 * w : 32 * w + 32], out[32 * w : 32 * w + 32]
        for j in range(32):
            target[j] = some[j] & -np.int32(np.int32(word >> np.int32(j)) & np.int32(1))
    for i in range(size // 32 * 32, size):
        out[i] = grad[i] & -np.int32(np.int32(words[i // 32] >> np.int32(i % 32)) & np.int32(1))
