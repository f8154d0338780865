"""Which elements share a scale: a ``ScaleLayout``, walked through from any element on.

Elements and rows are counted from the beginning of the tensor's memory, wherever a part of it begins.
"""

from __future__ import annotations

from quantpatch.numerics.kernels.source.compilation import jit
from quantpatch.numerics.kernels.source.elements import TILE


@jit
def end_of_scale(i, stop, length, block):
    """Where the neighbours end that share the scale of element ``i``, or ``stop`` before."""
    row = i // length * length
    return min(row + min(length, ((i - row) // block + 1) * block), stop)


@jit
def scale_of(i, length, block):
    """Which scale is that of element ``i``, if none were used again."""
    row = i // length
    return row * -(-length // block) + (i - row * length) // block


@jit
def after(which, count):
    """The scale that follows; they begin anew when all have been used."""
    return which + 1 if which + 1 < count else 0


@jit
def halves(start, length, block):
    """Of how many sixteens a block consists, and how many of the first lie before ``start``; 0: too many."""
    if block % 16 or block >= 128 or length % block or start % 16:
        return 0, 0
    return block // 16, start % length % block // 16


@jit
def next_half(which, half, sixteens, count):
    """The scale after sixteen elements more, and how many sixteens of its block lie before them."""
    return (which, half + 1) if half + 1 < sixteens else (after(which, count), 0)


# --- Elements that have a scale each, in rows -------------------------------------------------------------


@jit
def next_row(i, stop, length, block, width, count):
    """Where the row ends in which element ``i`` lies, or ``stop`` before; and the scale of ``i``."""
    row = i // width
    return min((row + 1) * width, stop), scale_of(row, length, block) * width % count + i - row * width


@jit
def next_block(i, stop, length, block, width, count):
    """How many rows of a block follow from element ``i``, where one begins, and their first scale."""
    row = i // width
    return end_of_scale(row, stop // width, length, block) - row, scale_of(row, length, block) * width % count


@jit
def is_short(start, size, block, width):
    """Whether a block is short enough to be worked on as one row."""
    return width < 128 and block > 1 and block * width <= TILE and start % width == 0 and size % width == 0
