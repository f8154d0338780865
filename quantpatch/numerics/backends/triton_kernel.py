"""One CUDA kernel for a trip to the grid and back, equal to the CPU's result bit for bit.

As plain operations the trip goes through memory once for each of them. The kernel reads the tensor once and
writes the result and, where there will be a gradient, one byte an element that says what was in the range.
``torch.compile`` does not come here: it fuses the plain operations with their neighbours, which it cannot
do with a kernel of ours.

What keeps it exact: ``div_rn``, since Triton's ``/`` is an approximation; rounding by adding and subtracting
``1.5 * 2**23`` steps, which has ties go to even and is exact in the range left by the clamp; and that no
product is rounded otherwise if the compiler makes one operation of it and the sum after it.

Import it only where Triton is installed and there is a CUDA tensor to work on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantpatch.numerics.formats import Float
from quantpatch.numerics.qparams import QParams

_BLOCK = 1024
# Fewer elements in a row with one scale are not worth a program of their own.
_LONG_ROW = 256


@triton.jit  # type: ignore[untyped-decorator]
def round_trip_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    y_pointer,
    inside_pointer,
    scale_pointer,
    amax_pointer,
    count,
    row,
    scales,
    low,
    high,
    lower_end,
    zero_point_pointer,
    steps,
    exponent_bits: tl.constexpr,  # 0: integers
    mantissa_bits: tl.constexpr,
    masked: tl.constexpr,
    has_zero_point: tl.constexpr,
    has_amax: tl.constexpr,
    one_amax: tl.constexpr,
    short_row: tl.constexpr,  # 0: a program stays within one row
    block: tl.constexpr,
) -> None:
    """Element ``i`` of the memory has the scale ``i // row % scales``."""
    if short_row > 0:
        offset = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        valid = offset < count
        which = (offset // short_row) % scales
    else:
        per_row = tl.cdiv(row, block)
        number = tl.program_id(0) // per_row
        place = (tl.program_id(0) % per_row) * block + tl.arange(0, block)
        valid = place < row
        offset = number.to(tl.int64) * row + place
        which = number % scales
    x = tl.load(x_pointer + offset, mask=valid).to(tl.float32)
    scale = tl.load(scale_pointer + which)
    if has_zero_point:  # which the host does not know
        low = 0.0 - tl.load(zero_point_pointer).to(tl.float32)
        high = steps + low
        lower_end = tl.div_rn(low, high)
    # Whatever is divided by the smallest normal number here is multiplied by 0 below.
    y = tl.div_rn(x, tl.where(scale == 0.0, 1.1754943508222875e-38, scale))
    # Not tl.clamp, which loses NaN.
    y = tl.where(y < low, low, y)
    y = tl.where(y > high, high, y)
    if exponent_bits == 0:
        y = ((y + 12582912.0) - 12582912.0) * scale + 0.0
    else:
        bits = y.to(tl.int32, bitcast=True)
        # y's own power of two, which the step of the grid follows down to the subnormals.
        power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
        smallest: tl.constexpr = 2.0 ** (2 - (1 << (exponent_bits - 1)))
        magic = tl.where(power < smallest, smallest, power) * (12582912.0 / (1 << mantissa_bits))
        rounded = ((y + magic) - magic).to(tl.int32, bitcast=True)
        # The sum has lost the sign of what became 0.
        y = ((rounded & 0x7FFFFFFF) | (bits & -0x80000000)).to(tl.float32, bitcast=True) * scale
    tl.store(y_pointer + offset, y.to(y_pointer.dtype.element_ty), mask=valid)
    if masked:
        bottom = 0.0
        if has_zero_point:
            bottom = tl.where(low == 0.0, 0.0, float("-inf"))
        outside = x < bottom
        if has_amax:
            amax = tl.load(amax_pointer + (which * 0 if one_amax else which))
            outside = (x > amax) | (x < amax * lower_end)
        tl.store(inside_pointer + offset, outside == 0, mask=valid)


def launch(
    x: Tensor, amax: Tensor | None, scale: Tensor, count: int, q: QParams, *, masked: bool
) -> tuple[Tensor, Tensor | None]:
    """``x`` to the grid and back.

    Args:
        x: float32, float16 or bfloat16 of any shape, dense in memory.
        amax: float32, one element or as many as ``scale``; None where nothing is above the range.
        scale: float32.
        count: How many elements in a row, in the order of memory, share a scale.
        q: Integers or floats, and their zero point.
        masked: Whether to say what was in the range.

    Returns:
        The result, and whether each element was in the range if ``masked``; both with the strides of ``x``.
    """
    y = torch.empty_like(x)
    inside = torch.empty_like(x, dtype=torch.bool) if masked else None
    if x.numel() == 0:
        return y, inside
    element, zero_point = q.format.element, q.zero_point
    read = isinstance(zero_point, Tensor)
    ends = (0.0, 0.0, 0.0) if read else (q.min(), q.max(), q.lower_end())
    scale, amax = scale.contiguous(), None if amax is None else amax.contiguous()
    float_bits = (element.exponent_bits, element.mantissa_bits) if isinstance(element, Float) else (0, 0)
    # One program of the first kind for elements of one scale, or programs of the second that take elements as
    # they come.
    long = count >= _LONG_ROW or scale.numel() == 1
    programs = x.numel() // count * triton.cdiv(count, _BLOCK) if long else triton.cdiv(x.numel(), _BLOCK)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        round_trip_kernel[(programs,)](
            x, y, y if inside is None else inside, scale, scale if amax is None else amax, x.numel(), count,
            scale.numel(), *ends, zero_point if read else scale, 2.0**element.bits - 1.0, *float_bits, masked,
            read, amax is not None,
            amax is not None and amax.numel() == 1, 0 if long else count, _BLOCK,
        )  # fmt: skip
    return y, inside
