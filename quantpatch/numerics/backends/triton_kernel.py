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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantpatch.numerics.formats import Float, Integer, NumberFormat, element_of

__all__ = ["fake_quantize_fused", "fused_round_trip", "run_of"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 1024
# Shorter runs of elements with one scale are not worth a program of their own.
_LONG_RUN = 256


@triton.jit  # type: ignore[untyped-decorator]
def round_trip_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    y_pointer,
    inside_pointer,
    scale_pointer,
    amax_pointer,
    count,
    run,
    scales,
    low,
    high,
    lower_end,
    exponent_bits: tl.constexpr,  # 0: integers
    mantissa_bits: tl.constexpr,
    masked: tl.constexpr,
    has_amax: tl.constexpr,
    one_amax: tl.constexpr,
    short_run: tl.constexpr,  # 0: a program stays within one run
    block: tl.constexpr,
) -> None:
    """Element ``i`` of the memory has the scale ``i // run % scales``."""
    if short_run > 0:
        offset = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        valid = offset < count
        which = (offset // short_run) % scales
    else:
        per_run = tl.cdiv(run, block)
        number = tl.program_id(0) // per_run
        place = (tl.program_id(0) % per_run) * block + tl.arange(0, block)
        valid = place < run
        offset = number.to(tl.int64) * run + place
        which = number % scales
    x = tl.load(x_pointer + offset, mask=valid).to(tl.float32)
    scale = tl.load(scale_pointer + which)
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
        outside = x < 0.0
        if has_amax:
            amax = tl.load(amax_pointer + (which * 0 if one_amax else which))
            outside = (x > amax) | (x < amax * lower_end)
        tl.store(inside_pointer + offset, outside == 0, mask=valid)


@torch.library.custom_op("quantpatch::round_trip", mutates_args=())
def fused_round_trip(
    x: Tensor,
    amax: Tensor | None,
    scale: Tensor,
    run: int,
    low: float,
    high: float,
    lower_end: float,
    exponent_bits: int,
    mantissa_bits: int,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    """``x`` to the grid and back.

    Args:
        x: float32, float16 or bfloat16 of any shape, dense in memory.
        amax: float32, contiguous, one element or as many as ``scale``; None where nothing is above the range.
        scale: float32, contiguous.
        run: How many elements in a row, in the order of memory, share a scale.
        low: Smallest value of the format.
        high: Largest value of the format.
        lower_end: Where its range begins, of one that ends at 1.
        exponent_bits: Of a floating-point format; 0 for integers.
        mantissa_bits: Of a floating-point format.
        masked: Whether to tell what was in the range.

    Returns:
        The result, and whether each element was in the range (of no elements if not ``masked``); both with
        the strides of ``x``.
    """
    y, inside = _outputs(x, masked)
    count = x.numel()
    if count == 0:
        return y, inside
    # One program of the first kind a run, or programs of the second that take elements as they come.
    long = run >= _LONG_RUN or scale.numel() == 1
    programs = count // run * triton.cdiv(run, _BLOCK) if long else triton.cdiv(count, _BLOCK)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        round_trip_kernel[(programs,)](
            x, y, inside, scale, scale if amax is None else amax, count, run, scale.numel(),
            low, high, lower_end, exponent_bits, mantissa_bits, masked,
            amax is not None, amax is not None and amax.numel() == 1, 0 if long else run, _BLOCK,
        )  # fmt: skip
    return y, inside


def _outputs(x: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    inside = torch.empty_like(x, dtype=torch.bool) if masked else x.new_empty(0, dtype=torch.bool)
    return y, inside


@fused_round_trip.register_fake
def _(x: Tensor, amax: Tensor | None, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _outputs(x, rest[-1])


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.masked = inputs[-1]
    if ctx.masked:
        ctx.save_for_backward(output[1])


def _straight_through(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if ctx.masked:
        # One pass over memory as it is, whatever the layout of the gradient.
        grad = torch.where(ctx.saved_tensors[0], grad, 0.0)
    return (grad, *[None] * 9)


fused_round_trip.register_autograd(_straight_through, setup_context=_keep_mask)


def fake_quantize_fused(
    x: Tensor, amax: Tensor | None, scale: Tensor, format: NumberFormat, dim: int | None
) -> Tensor | None:
    """``round_trip`` by the kernel, with its gradient; None where the kernel does not do it.

    It does integers and floats, with one scale, with one for each index of an axis, and with one for each
    block of the last axis; not float64, learned ranges, several kept axes, or blocks with a shorter tail.
    """
    element = element_of(format)
    if x.dtype not in _DTYPES or type(element) not in (Integer, Float):
        return None
    if amax is not None and (amax.requires_grad or amax.numel() not in (1, scale.numel())):
        return None
    dense = x if _is_dense(x) else torch.empty_like(x).copy_(x)
    run = run_of(dense, scale, format.block_size, dim)
    if run is None:
        return None
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    float_bits = (element.exponent_bits, element.mantissa_bits) if isinstance(element, Float) else (0, 0)
    masked = needs_grad and (amax is not None or element.min >= 0)
    result: Tensor = fused_round_trip(
        dense,
        None if amax is None else amax.contiguous(),
        scale.contiguous(),
        run,
        element.min,
        element.max,
        element.lower_end,
        *float_bits,
        masked,
    )[0]
    return result


def run_of(x: Tensor, scale: Tensor, block_size: int | None, dim: int | None) -> int | None:
    """How many elements of a dense ``x`` share a scale in memory; None if no one number says so."""
    if scale.numel() == 1:
        return max(1, x.numel())
    kept = [d for d, n in enumerate(scale.shape) if n > 1]
    if dim is not None and block_size is not None:
        whole = dim == x.dim() - 1 and x.shape[-1] % block_size == 0 and x.is_contiguous()
        return block_size if whole and scale.numel() * block_size == x.numel() else None
    if len(kept) == 1 and scale.shape[kept[0]] == x.shape[kept[0]]:
        return x.stride(kept[0])
    return None


def _is_dense(x: Tensor) -> bool:
    """Whether the elements lie in memory without gaps or overlaps, in any order of the axes."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(x))
