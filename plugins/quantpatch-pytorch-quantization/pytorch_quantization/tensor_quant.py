"""Rounding to integers and FP8 the toolkit's way, with straight-through gradients; the descriptors.

The toolkit multiplies by ``bound / amax`` where quantpatch divides by ``amax / bound``; the two differ in
the last bit of a quotient, and so now and then by a step. Checkpoints that were trained one way are best
run the same way, hence this file.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pytorch_quantization._descriptor import Axis, NumBits, QuantDescriptor, ScaledQuantDescriptor

__all__ = [
    "QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW",
    "QUANT_DESC_8BIT_PER_TENSOR",
    "QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR",
    "Axis",
    "NumBits",
    "QuantDescriptor",
    "ScaledQuantDescriptor",
    "as_tensor",
    "bound_of",
    "fake_affine_tensor_quant",
    "fake_tensor_quant",
    "legacy_fake_tensor_quant",
    "scaled_e4m3",
    "tensor_quant",
]

QUANT_DESC_8BIT_PER_TENSOR = QuantDescriptor(num_bits=8)
QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR = QuantDescriptor(num_bits=8, unsigned=True)
QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW = QuantDescriptor(num_bits=8, axis=0)
# The weight of a transposed convolution has its output channels on axis 1.
QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=1)
QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=1)
QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=1)

E4M3_MAX = 448.0
_DEAD = 2.0**-24  # a range up to this one holds nothing: the smallest number that float16 can hold
_FLOAT16_MAX = 65504.0


def bound_of(num_bits: NumBits, unsigned: bool = False) -> float:
    """The largest number of a format: 127 of 8 bits, 255 of unsigned 8 bits, 448 of ``(4, 3)``."""
    if isinstance(num_bits, tuple):
        return E4M3_MAX
    return max(0.0, 2.0 ** (num_bits - 1 + int(unsigned)) - 1.0)


def tensor_quant(
    inputs: Tensor,
    amax: Tensor | float,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rounds to integers: ``clamp(round(x * bound / amax))``.

    Args:
        inputs: A floating point tensor.
        amax: The range, broadcastable to ``inputs``.
        num_bits: Number of bits; ``bound`` is ``2**(num_bits - 1 + unsigned) - 1``.
        unsigned: Whether ``inputs`` has no negative values.
        narrow_range: Whether the lowest integer is ``-bound`` rather than ``-bound - 1``.

    Returns:
        The integers, as floats of the dtype of ``inputs``, and the scale ``bound / amax`` (1 where the
        range is at most 2^-24).

    Raises:
        TypeError: ``inputs`` has negative values with ``unsigned=True``.
        ValueError: ``amax`` is negative, or float16 cannot hold the scale.
    """
    quantized, scale = _TensorQuant.apply(  # type: ignore[no-untyped-call]
        inputs, _range(amax, inputs), num_bits, unsigned, narrow_range
    )
    return quantized, scale


def fake_tensor_quant(
    inputs: Tensor,
    amax: Tensor | float,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> Tensor:
    """Rounds to integers and back: ``clamp(round(x * scale)) / scale`` with ``scale = bound / amax``.

    float16 and bfloat16 are computed in float32 and rounded once at the end. The gradient passes where
    ``|x| <= amax`` and is zero elsewhere.

    Args:
        inputs: As in :func:`tensor_quant`.
        amax: As in :func:`tensor_quant`.
        num_bits: As in :func:`tensor_quant`.
        unsigned: As in :func:`tensor_quant`.
        narrow_range: As in :func:`tensor_quant`.

    Returns:
        A tensor like ``inputs``.

    Raises:
        TypeError: As in :func:`tensor_quant`.
        ValueError: ``amax`` is negative.
    """
    result: Tensor = _FakeTensorQuant.apply(  # type: ignore[no-untyped-call]
        inputs, _range(amax, inputs), num_bits, unsigned, narrow_range
    )
    return result


#: The toolkit kept a second way to compute the same on a GPU.
legacy_fake_tensor_quant = fake_tensor_quant


def scaled_e4m3(inputs: Tensor, amax: Tensor | float | None = None, E: int = 4, M: int = 3) -> Tensor:
    """Rounds to FP8 E4M3 and back, after scaling by ``448 / amax``; what is too large saturates.

    The gradient passes where ``|x| <= 448``, whatever the range, as in the toolkit.

    Args:
        inputs: A floating point tensor.
        amax: The range, broadcastable to ``inputs``; None does not scale.
        E: Bits of the exponent; only 4.
        M: Bits of the mantissa; only 3.

    Returns:
        A tensor like ``inputs``.

    Raises:
        NotImplementedError: ``E`` and ``M`` are not 4 and 3.
    """
    if (E, M) != (4, 3):
        raise NotImplementedError(f"only FP8 E4M3 is known, not E{E}M{M}")
    range_ = _range(E4M3_MAX if amax is None else amax, inputs)
    result: Tensor = _ScaledE4M3.apply(inputs, range_)  # type: ignore[no-untyped-call]
    return result


def fake_affine_tensor_quant(
    inputs: Tensor, min_range: Tensor | float, max_range: Tensor | float, num_bits: int = 8
) -> Tensor:
    """Rounds to ``2**num_bits`` evenly spaced values from ``min_range`` to ``max_range``, one of them 0.

    Args:
        inputs: A floating point tensor.
        min_range: Lower end of the range, broadcastable to ``inputs``.
        max_range: Upper end of the range.
        num_bits: Number of bits.

    Returns:
        A tensor like ``inputs``. Its gradient passes within the range.

    Raises:
        ValueError: The range is empty.
    """
    low, high = _range(min_range, inputs), _range(max_range, inputs)
    if can_look_at(high) and bool((high <= low).any()):
        raise ValueError(f"the range is empty: min_range={min_range}, max_range={max_range}")
    result: Tensor = _FakeAffine.apply(inputs, low, high, num_bits)  # type: ignore[no-untyped-call]
    return result


# --- plain arithmetic, without gradients -----------------------------------------------------------


def can_look_at(x: Tensor) -> bool:
    """Whether the values may be read on the host: not while a graph is taken, nor on the meta device."""
    return not (x.is_meta or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None)


def working(x: Tensor) -> Tensor:
    """``x`` in the precision that is computed in: at least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _range(amax: Tensor | float, x: Tensor) -> Tensor:
    """A range as a tensor of the working precision on the device of ``x``."""
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return as_tensor(amax).detach().to(device=x.device, dtype=dtype)


def as_tensor(value: Any) -> Tensor:
    """A tensor as it is, a number as one; a tracer warns of ``torch.as_tensor``, whatever that does."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), float(value)) if isinstance(value, (int, float)) else torch.as_tensor(value)


def round_to_integers(
    x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> tuple[Tensor, Tensor]:
    """The integers and the scale, in the working precision."""
    if unsigned and can_look_at(x) and x.numel() and bool(x.min() < 0):
        raise TypeError(
            f"Negative values encountered in unsigned quantization: the smallest is {x.min().item():.4g}. "
            f"Use a signed descriptor"
        )
    if can_look_at(amax) and bool((amax < 0).any()):
        raise ValueError(f"Negative values in amax: the smallest is {amax.min().item():.4g}")
    bound = bound_of(num_bits, unsigned)
    lowest = 0.0 if unsigned else -bound if narrow_range else -bound - 1.0
    # Not `bound / amax`, which torch computes as a reciprocal times the bound, rounded twice: the toolkit's
    # kernels divide.
    scale = torch.full_like(amax, bound) / amax
    dead = amax <= (_DEAD if bound else math.inf)
    # The quotient of a range of 0 is infinite, and times 0 would be NaN.
    quantized = (working(x) * scale.masked_fill(dead, 0.0)).round_().clamp_(lowest, bound)
    return quantized, scale.masked_fill(dead, 1.0)


def round_to_e4m3(x: Tensor) -> Tensor:
    """The nearest numbers of FP8 E4M3; what is too large becomes +-448. Keeps the dtype."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def _inside(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``grad`` where ``low <= x <= high``, else 0."""
    x = working(x)  # a range of no dimensions would be rounded to float16 to compare it with float16
    return grad.masked_fill((x < low) | (x > high) | x.isnan(), 0.0)


# --- with gradients --------------------------------------------------------------------------------


class _TensorQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, amax)
        quantized, scale = round_to_integers(x, amax, num_bits, unsigned, narrow_range)
        if x.dtype == torch.float16 and can_look_at(scale) and bool((scale > _FLOAT16_MAX).any()):
            raise ValueError(f"scale is too large for FP16: amax is {amax.min().item()}")
        scale = scale.to(x.dtype)
        ctx.mark_non_differentiable(scale)
        return quantized.to(x.dtype), scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_scale: Tensor) -> tuple[Tensor | None, ...]:
        x, amax = ctx.saved_tensors
        return _inside(grad, x, -amax, amax), None, None, None, None


class _FakeTensorQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
    ) -> Tensor:
        ctx.save_for_backward(x, amax)
        quantized, scale = round_to_integers(x, amax, num_bits, unsigned, narrow_range)
        return (quantized / scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, amax = ctx.saved_tensors
        return _inside(grad, x, -amax, amax), None, None, None, None


class _ScaledE4M3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        dead = amax <= _DEAD
        scale = (E4M3_MAX / amax).masked_fill(dead, 1.0)
        rounded = round_to_e4m3(working(x) * scale) / scale
        return rounded.masked_fill(dead, 0.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        limit = torch.tensor(E4M3_MAX, device=x.device)
        return _inside(grad, x, -limit, limit), None


class _FakeAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, num_bits: int) -> Tensor:
        ctx.save_for_backward(x, low, high)
        step = (high - low) / (2.0**num_bits - 1.0)
        first = (low / step).round()  # 0 is a multiple of the step, so the ends are rounded too
        quantized = (working(x) / step).round_().clamp(first, first + 2.0**num_bits - 1.0)
        return (quantized * step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _inside(grad, *ctx.saved_tensors), None, None, None
