"""Numbers, their bits, and rounding them to a grid.

A grid is a tuple: its ends, which is all there is to integers; and of floats the bits of the mantissa and of
the smallest normal number. numba compiles what is handed one for each kind.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from quantpatch.numerics.kernels.source.compilation import jit

ZERO = np.float32(0.0)
_TINY = np.float32(1.1754943508222875e-38)  # stands in for a scale of 0, see rounding.scales.divisor
# Elements at a time, noted in a core's own cache before eight marks become a byte, or bins a count.
TILE = 2048


@jit
def _bits(value):
    return np.float32(value).view(np.int32)


@jit
def from_bits(bits):
    """The float32 of these bits."""
    return np.int32(bits).view(np.float32)


def load(memory, i):
    """An element as float32."""
    raise NotImplementedError("within kernels only")


def store(memory, i, value):
    """Rounds a float32 to an element."""
    raise NotImplementedError("within kernels only")


@overload(load)
def _load_any(memory, i):
    if memory.dtype == types.float32:
        return lambda memory, i: memory[i]
    if memory.dtype == types.int32:
        return lambda memory, i: from_bits(memory[i])
    return lambda memory, i: from_bits(np.int32(np.int32(memory[i]) << np.int32(16)))


@overload(store)
def _store_any(memory, i, value):
    if memory.dtype == types.float32:

        def store_float32(memory, i, value):
            memory[i] = value

        return store_float32

    def store_bfloat16(memory, i, value):
        # Ties to even: half of the last place is added, less one bit where the result is even already.
        bits = _bits(value)
        odd = np.int32(np.int32(bits >> np.int32(16)) & np.int32(1))
        rounded = np.int32(bits + np.int32(0x7FFF) + odd)
        memory[i] = np.uint16(np.int32(rounded >> np.int32(16)) if value == value else np.int32(0x7FC0))

    return store_bfloat16


@jit
def magnitude(memory, i):
    """A magnitude as its bits, which are ordered as the magnitudes are, NaN highest."""
    return np.int32(_bits(load(memory, i)) & np.int32(0x7FFFFFFF))


@jit
def bottom(high, lower_end):
    """Where a range begins, as :func:`quantpatch.numerics.zero_point.bottom` has it."""
    return high * lower_end if lower_end != ZERO else ZERO


# --- The grid ---------------------------------------------------------------------------------------------


@jit
def quotient(v, scale):
    """A value by its scale."""
    return v / (scale if scale != ZERO else _TINY)


@jit
def _clamp(v, lowest, highest):
    v = highest if v > highest else v  # a NaN is neither above nor below, and stays
    return lowest if v < lowest else v


def to_grid(v, grid):
    """A quotient, rounded to the grid."""
    raise NotImplementedError("within kernels only")


def _rescale(v, scale, grid):
    raise NotImplementedError("within kernels only")


@overload(to_grid)
def _to_any_grid(v, grid):
    if len(grid) == 2:
        return lambda v, grid: np.rint(_clamp(v, grid[0], grid[1]))

    def to_float(v, grid):
        lowest, highest, mantissa_bits, smallest = grid
        v = _clamp(v, lowest, highest)
        bits = _bits(v)
        # See formats.Float.round_: 1.5 * 2**23 steps of the grid, whose exponent follows that of v.
        exponent = np.int32(bits & np.int32(0x7F800000))
        exponent = exponent if exponent > smallest else smallest
        step = np.int32(exponent + np.int32(np.int32(np.int32(23) - mantissa_bits) << np.int32(23)))
        magic = from_bits(np.int32(step | np.int32(0x400000)))
        rounded = _bits(np.float32(np.float32(v + magic) - magic))
        signed = np.int32(np.int32(rounded & np.int32(0x7FFFFFFF)) | np.int32(bits & np.int32(-0x80000000)))
        return from_bits(signed)

    return to_float


@overload(_rescale)
def _rescale_any(v, scale, grid):
    if len(grid) == 2:
        return lambda v, scale, grid: v * scale + ZERO  # integers have no -0
    return lambda v, scale, grid: v * scale


@jit
def to_grid_and_back(v, scale, grid):
    """A value to the grid and back."""
    return _rescale(to_grid(quotient(v, scale), grid), scale, grid)
