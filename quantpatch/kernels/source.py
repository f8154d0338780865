"""The kernels themselves, in Python as numba compiles it: at their first use, then kept in its cache.

Each works on neighbours in a tensor's memory, so that threads can share one. Arithmetic is IEEE's, nothing is
reordered or fused, and so results have the bits that torch's own operations give. Elements that share a scale
lie as :class:`quantpatch.kernels.runs.Runs` says, whose attributes are arguments here.

One file, as numba's cache sees a change only in the file of the kernel itself.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined,unused-ignore]
from numba.extending import overload

__all__ = ["NAMES", "kernel"]

_TINY = np.float32(1.1754943508222875e-38)  # stands in for a scale of 0, see rounding.scales.divisor
_ZERO = np.float32(0.0)
# Elements at a time, noted in a core's own cache before eight marks become a byte, or bins a count.
_TILE = 2048

_jit = njit(error_model="numpy", nogil=True)
_inlined = njit(error_model="numpy", nogil=True, forceinline=True)  # where a call costs as much as the work

# Arguments of kernels: elements and their bits, by dtype; float32, int32 and int64 in memory; numbers.
_X, _BITS = "elements", "bits"
_FLOATS, _INTS, _LONGS = (types.CPointer(t) for t in (types.float32, types.int32, types.int64))
_F, _I = types.float32, types.int64
_OF_DTYPE = {
    "float32": {_X: types.CPointer(types.float32), _BITS: types.CPointer(types.int32)},
    "bfloat16": {_X: types.CPointer(types.uint16), _BITS: types.CPointer(types.int16)},
}
_C_TYPES: dict[Any, Any] = {_F: ctypes.c_float, _I: ctypes.c_int64, types.void: None}
_KERNELS: dict[str, tuple[Callable[..., Any], Any, tuple[Any, ...]]] = {}


@functools.cache
def kernel(name: str, dtype: str) -> Callable[..., Any]:
    """A kernel as a C function, called with addresses and numbers; while it runs, other threads can.

    Args:
        name: One of ``NAMES``.
        dtype: ``"float32"`` or ``"bfloat16"``.
    """
    function, result, arguments = _KERNELS[name]
    signature = result(*(_OF_DTYPE[dtype].get(a, a) for a in arguments))
    try:
        code = cfunc(signature, error_model="numpy", cache=True)(function)
    except RuntimeError:  # there is nowhere to keep it
        code = cfunc(signature, error_model="numpy")(function)
    prototype: Any = ctypes.CFUNCTYPE(
        _C_TYPES[result], *(_C_TYPES.get(a, ctypes.c_void_p) for a in arguments)
    )
    call: Any = prototype(code.address)
    call.code = code  # keeps the machine code in memory
    return call  # type: ignore[no-any-return]


def _kernel(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _KERNELS[function.__name__] = (function, result, arguments)
        return function

    return register


# --- Elements ---------------------------------------------------------------------------------------------


@_jit
def _bits(value):
    return np.float32(value).view(np.int32)


@_jit
def _float(bits):
    return np.int32(bits).view(np.float32)


def _load(memory, i):
    raise NotImplementedError("within kernels only")


def _store(memory, i, value):
    raise NotImplementedError("within kernels only")


@overload(_load)
def _load_any(memory, i):
    if memory.dtype == types.float32:
        return lambda memory, i: memory[i]
    return lambda memory, i: _float(np.int32(np.int32(memory[i]) << np.int32(16)))


@overload(_store)
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


@_jit
def _magnitude(memory, i):
    """A magnitude as its bits, which are ordered as the magnitudes are, NaN highest."""
    return np.int32(_bits(_load(memory, i)) & np.int32(0x7FFFFFFF))


@_jit
def _clamp(v, lowest, highest):
    v = highest if v > highest else v  # a NaN is neither above nor below, and stays
    return lowest if v < lowest else v


@_jit
def _to_integer(v, scale, lowest, highest):
    divisor = scale if scale != _ZERO else _TINY
    return np.rint(_clamp(v / divisor, lowest, highest)) * scale + _ZERO  # integers have no -0


@_jit
def _to_float(v, scale, lowest, highest, mantissa_bits, smallest):
    divisor = scale if scale != _ZERO else _TINY
    v = _clamp(v / divisor, lowest, highest)
    bits = _bits(v)
    # See formats.Float.round_: 1.5 * 2**23 steps of the grid, whose exponent follows that of v.
    exponent = np.int32(bits & np.int32(0x7F800000))
    exponent = exponent if exponent > smallest else smallest
    step = np.int32(exponent + np.int32(np.int32(np.int32(23) - mantissa_bits) << np.int32(23)))
    magic = _float(np.int32(step | np.int32(0x400000)))
    rounded = _bits(np.float32(np.float32(v + magic) - magic))
    signed = np.int32(np.int32(rounded & np.int32(0x7FFFFFFF)) | np.int32(bits & np.int32(-0x80000000)))
    return _float(signed) * scale


@_jit
def _low(high, lower_end):
    return high * lower_end if lower_end != _ZERO else _ZERO


# --- Rounding ---------------------------------------------------------------------------------------------


@_jit
def _run(x, out, scale, low, high, lowest, highest, mantissa_bits, smallest):
    """A run of one scale; returns whether anything lies outside of ``low .. high``."""
    outside = False
    if mantissa_bits < 0:
        for i in range(x.size):
            v = _load(x, i)
            outside |= (v > high) | (v < low)
            _store(out, i, _to_integer(v, scale, lowest, highest))
    else:
        for i in range(x.size):
            v = _load(x, i)
            outside |= (v > high) | (v < low)
            _store(out, i, _to_float(v, scale, lowest, highest, mantissa_bits, smallest))
    return outside


@_inlined
def _pair(x, out, scale0, scale1, high0, high1, lower_end, lowest, highest, mantissa_bits, smallest):
    """Two runs of 16, as a loop of a length that the compiler knows: some times as fast for short blocks."""
    outside = False
    low0, low1 = _low(high0, lower_end), _low(high1, lower_end)
    if mantissa_bits < 0:
        for i in range(32):
            v = _load(x, i)
            scale, low, high = (scale0, low0, high0) if i < 16 else (scale1, low1, high1)
            outside |= (v > high) | (v < low)
            _store(out, i, _to_integer(v, scale, lowest, highest))
    else:
        for i in range(32):
            v = _load(x, i)
            scale, low, high = (scale0, low0, high0) if i < 16 else (scale1, low1, high1)
            outside |= (v > high) | (v < low)
            _store(out, i, _to_float(v, scale, lowest, highest, mantissa_bits, smallest))
    return outside


@_jit
def _row(x, out, scales, amax, step, lower_end, lowest, highest, mantissa_bits, smallest):
    """A run whose elements have a scale each."""
    outside = False
    if mantissa_bits < 0:
        for i in range(x.size):
            v = _load(x, i)
            high = amax[i * step]
            outside |= (v > high) | (v < _low(high, lower_end))
            _store(out, i, _to_integer(v, scales[i], lowest, highest))
    else:
        for i in range(x.size):
            v = _load(x, i)
            high = amax[i * step]
            outside |= (v > high) | (v < _low(high, lower_end))
            _store(out, i, _to_float(v, scales[i], lowest, highest, mantissa_bits, smallest))
    return outside


@_jit
def _next_run(i, stop, length, block):
    """Where the run ends in which element ``i`` lies, or ``stop`` before."""
    row = i // length * length
    return min(row + min(length, ((i - row) // block + 1) * block), stop)


@_jit
def _first_run(i, length, block):
    """How many runs begin before that of element ``i``."""
    row = i // length
    return row * -(-length // block) + (i - row * length) // block


@_jit
def _after(which, count):
    """The scale that follows; they begin anew when all have been used."""
    return which + 1 if which + 1 < count else 0


@_jit
def _halves(start, length, block):
    """Of how many sixteens a block consists, and how many of the first lie before ``start``; 0: too many."""
    if block % 16 or block >= 128 or length % block or start % 16:
        return 0, 0
    return block // 16, start % length % block // 16


@_jit
def _rows(
    x, out, scales, amax, step, lower_end, start, length, block, lowest, highest, mantissa_bits, smallest
):
    outside = False
    count = scales.size
    which = _first_run(start, length, block) % count
    halves, half = _halves(start, length, block)
    i, size = 0, x.size
    while halves and i + 32 <= size:
        first = which
        half += 1
        if half == halves:
            half = 0
            which = _after(which, count)
        outside |= _pair(
            x[i : i + 32], out[i : i + 32], scales[first], scales[which], amax[first * step],
            amax[which * step], lower_end, lowest, highest, mantissa_bits, smallest,
        )  # fmt: skip
        half += 1
        if half == halves:
            half = 0
            which = _after(which, count)
        i += 32
    while i < size:
        end = _next_run(start + i, start + size, length, block) - start
        high = amax[which * step]
        outside |= _run(
            x[i:end], out[i:end], scales[which], _low(high, lower_end), high, lowest, highest, mantissa_bits,
            smallest,
        )  # fmt: skip
        which = _after(which, count)
        i = end
    return outside


@_jit
def _is_short(start, size, block, width):
    """Whether a block is short enough to be worked on as one run."""
    return width < 128 and block > 1 and block * width <= _TILE and start % width == 0 and size % width == 0


@_jit
def _columns(
    x, out, scales, amax, step, lower_end, start, length, block, width, lowest, highest, mantissa_bits,
    smallest,
):  # fmt: skip
    outside = False
    i, stop = start, start + x.size
    short = _is_short(start, x.size, block, width)
    many = np.empty((2, _TILE if short else 0), np.float32)
    while short and i < stop:
        # Scales of a block, repeated for each of its rows: so that it is one run.
        row = i // width
        rows = _next_run(row, stop // width, length, block) - row
        to = _first_run(row, length, block) * width % scales.size
        n = rows * width
        for j in range(width):
            many[0, j], many[1, j] = scales[to + j], amax[(to + j) * step]
        k = width
        while k < n:  # twice as many each time
            for j in range(min(k, n - k)):
                many[0, k + j], many[1, k + j] = many[0, j], many[1, j]
            k *= 2
        outside |= _row(
            x[i - start : i - start + n], out[i - start : i - start + n], many[0], many[1], 1, lower_end,
            lowest, highest, mantissa_bits, smallest,
        )  # fmt: skip
        i += n
    while i < stop:
        row = i // width
        end = min((row + 1) * width, stop)
        to = _first_run(row, length, block) * width % scales.size + i - row * width
        upto = to + end - i
        outside |= _row(
            x[i - start : end - start], out[i - start : end - start], scales[to:upto],
            amax[to * step : (upto - 1) * step + 1], step, lower_end, lowest, highest, mantissa_bits,
            smallest,
        )  # fmt: skip
        i = end
    return outside


@_kernel(_I, _X, _X, _I, _F, _F, _F, _F, _F, _I, _I)
def round_flat(x, out, size, scale, low, high, lowest, highest, mantissa_bits, smallest):
    return _run(
        carray(x, size), carray(out, size), scale, low, high, lowest, highest, np.int32(mantissa_bits),
        np.int32(smallest),
    )  # fmt: skip


@_kernel(_I, _X, _X, _I, _I, _FLOATS, _FLOATS, _I, _I, _I, _I, _I, _F, _F, _F, _I, _I)
def round_runs(
    x_, out_, start, size, scales_, amax_, step, count, length, block, width, lower_end, lowest, highest,
    mantissa_bits, smallest,
):  # fmt: skip
    x, out, scales, amax = (
        carray(x_, size), carray(out_, size), carray(scales_, count), carray(amax_, (count - 1) * step + 1),
    )  # fmt: skip
    mantissa_bits, smallest = np.int32(mantissa_bits), np.int32(smallest)
    if width == 1:
        return _rows(
            x, out, scales, amax, step, lower_end, start, length, block, lowest, highest, mantissa_bits,
            smallest,
        )  # fmt: skip
    return _columns(
        x, out, scales, amax, step, lower_end, start, length, block, width, lowest, highest, mantissa_bits,
        smallest,
    )  # fmt: skip


# --- What lies outside ------------------------------------------------------------------------------------


@_jit
def _note(x, notes, low, high):
    for i in range(x.size):
        v = _load(x, i)
        notes[i] = np.uint8(0) if (v > high) | (v < low) else np.uint8(1)


@_jit
def _note_row(x, notes, amax, lower_end):
    for i in range(x.size):
        v = _load(x, i)
        notes[i] = np.uint8(0) if (v > amax[i]) | (v < _low(amax[i], lower_end)) else np.uint8(1)


@_jit
def _mark(x, words, start, amax, lower_end, length, block, width):
    notes = np.zeros(_TILE, np.uint8)
    eights = notes.view(np.uint64)
    marks = words.view(np.uint8)
    for tile in range(0, x.size, _TILE):
        upto = min(tile + _TILE, x.size)
        i = tile
        while i < upto:
            if width == 1:
                end = _next_run(start + i, start + upto, length, block) - start
                high = amax[_first_run(start + i, length, block) % amax.size]
                _note(x[i:end], notes[i - tile : end - tile], _low(high, lower_end), high)
            else:
                row = (start + i) // width
                end = min((row + 1) * width - start, upto)
                to = _first_run(row, length, block) * width % amax.size + start + i - row * width
                _note_row(x[i:end], notes[i - tile : end - tile], amax[to : to + end - i], lower_end)
            i = end
        for g in range((upto - tile + 7) // 8):
            # Eight bytes of 0 or 1 become the bits of the highest one.
            eight = np.uint64(eights[g] * np.uint64(0x0102040810204080))
            marks[tile // 8 + g] = np.uint8(np.uint64(eight >> np.uint64(56)))


@_kernel(types.void, _X, _INTS, _I, _I, _FLOATS, _I, _I, _I, _I, _F)
def mark(x, words, start, size, amax, count, length, block, width, lower_end):
    _mark(
        carray(x, size), carray(words, (size + 31) // 32), start, carray(amax, count), lower_end, length,
        block, width,
    )  # fmt: skip


@_kernel(types.void, _BITS, _BITS, _INTS, _I)
def keep(grad_, out_, words_, size):
    grad, out, words = carray(grad_, size), carray(out_, size), carray(words_, (size + 31) // 32)
    for w in range(size // 32):
        word = words[w]
        some, target = grad[32 * w : 32 * w + 32], out[32 * w : 32 * w + 32]
        for j in range(32):
            target[j] = some[j] & -np.int32(np.int32(word >> np.int32(j)) & np.int32(1))
    for i in range(size // 32 * 32, size):
        out[i] = grad[i] & -np.int32(np.int32(words[i // 32] >> np.int32(i % 32)) & np.int32(1))


# --- Statistics -------------------------------------------------------------------------------------------


@_jit
def _peak(x):
    """The largest magnitude, as its bits."""
    largest = np.int32(0)
    for i in range(x.size):
        magnitude = _magnitude(x, i)
        largest = magnitude if magnitude > largest else largest
    return largest


@_inlined
def _peak_of_16(x):
    largest = np.int32(0)
    for i in range(16):
        magnitude = _magnitude(x, i)
        largest = magnitude if magnitude > largest else largest
    return largest


@_jit
def _peaks_of_rows(x, peaks, start, length, block):
    count = peaks.size
    which = _first_run(start, length, block) % count
    halves, half = _halves(start, length, block)
    i, size = 0, x.size
    while halves and i + 16 <= size:
        peak = _peak_of_16(x[i : i + 16])
        peaks[which] = peak if peak > peaks[which] else peaks[which]
        half += 1
        if half == halves:
            half = 0
            which = _after(which, count)
        i += 16
    while i < size:
        end = _next_run(start + i, start + size, length, block) - start
        peak = _peak(x[i:end])
        peaks[which] = peak if peak > peaks[which] else peaks[which]
        which = _after(which, count)
        i = end


@_jit
def _peaks_of_columns(x, peaks, start, length, block, width):
    i, size = 0, x.size
    short = _is_short(start, size, block, width)
    folded = np.empty(_TILE if short else 0, np.int32)
    while short and i < size:
        row = (start + i) // width
        rows = _next_run(row, (start + size) // width, length, block) - row
        to = _first_run(row, length, block) * width % peaks.size
        some = x[i : i + rows * width]
        for j in range(some.size):
            folded[j] = _magnitude(some, j)
        i += rows * width
        while rows > 1:
            half = rows // 2
            second = folded[(rows - half) * width : rows * width]
            for j in range(second.size):
                folded[j] = max(folded[j], second[j])
            rows -= half
        for j in range(width):
            peaks[to + j] = max(peaks[to + j], folded[j])
    while i < size:
        row = (start + i) // width
        end = min((row + 1) * width - start, size)
        to = _first_run(row, length, block) * width % peaks.size + start + i - row * width
        some, target = x[i:end], peaks[to : to + end - i]
        for j in range(some.size):
            magnitude = _magnitude(some, j)
            target[j] = magnitude if magnitude > target[j] else target[j]
        i = end


@_kernel(types.void, _X, _I, _I, _INTS, _I, _I, _I, _I)
def amax(x, start, size, peaks, count, length, block, width):
    if width == 1:
        _peaks_of_rows(carray(x, size), carray(peaks, count), start, length, block)
    else:
        _peaks_of_columns(carray(x, size), carray(peaks, count), start, length, block, width)


@_jit
def _count(x, factor, counts):
    # Two histograms, as a CPU waits for a count to be written before it raises the same one again; and
    # unsigned indices, which numba need not compare with 0.
    bins = counts.size
    halves = np.zeros(2 * bins, np.uint32)
    indices = np.empty(_TILE, np.uint32)
    second, last, one = np.uint64(bins), np.uint32(bins - 1), np.uint32(1)
    for tile in range(0, x.size, _TILE):
        some = x[tile : tile + _TILE]
        for i in range(some.size):
            index = np.uint32(np.int32(abs(_load(some, i) * factor)))
            indices[i] = min(index, last)  # of infinity and NaN, too
        for i in range(some.size // 2):
            halves[np.uint64(indices[np.uint64(2 * i)])] += one
            halves[np.uint64(indices[np.uint64(2 * i + 1)]) + second] += one
        if some.size % 2:
            halves[np.uint64(indices[np.uint64(some.size - 1)])] += one
    for i in range(bins):
        counts[i] += np.int64(halves[i]) + np.int64(halves[bins + i])


@_kernel(types.void, _X, _I, _I, _FLOATS, _LONGS, _I)
def count(x_, rows, length, factors_, counts_, bins):
    x, factors, counts = carray(x_, (rows, length)), carray(factors_, rows), carray(counts_, (rows, bins))
    for row in range(rows):
        _count(x[row], factors[row], counts[row])


NAMES = tuple(_KERNELS)
