"""What the toolkit's compiled kernels offered, in plain PyTorch on any device.

Like the kernels these take no notice of a narrow range: signed results lie in ``[-bound, bound]``. They
have no gradients of their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pytorch_quantization.tensor_quant import as_tensor, bound_of, round_to_e4m3

__all__ = ["fake_e4m3fy", "fake_tensor_quant", "fake_tensor_quant_", "fake_tensor_quant_with_axis"]


@torch.no_grad()
def fake_tensor_quant(
    inputs: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False
) -> Tensor:
    """Rounds a tensor with one range to integers and back.

    Args:
        inputs: A floating point tensor; low precision is computed in float32 and rounded once.
        amax: The range, one number.
        num_bits: Number of bits.
        unsigned: Whether negative values become 0.

    Returns:
        A new tensor like ``inputs``.
    """
    x = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    bound = bound_of(num_bits, unsigned)
    range_ = as_tensor(amax).to(device=x.device, dtype=x.dtype)
    dead = range_ <= (2.0**-24 if bound else math.inf)
    scale = (torch.full_like(range_, bound) / range_).masked_fill(dead, 1.0)
    rounded = (x * scale).round_().clamp_(0.0 if unsigned else -bound, bound) / scale
    return rounded.masked_fill(dead, 0.0).to(inputs.dtype)


@torch.no_grad()
def fake_tensor_quant_(
    inputs: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False
) -> Tensor:
    """The same in place; returns ``inputs``."""
    return inputs.copy_(fake_tensor_quant(inputs, amax, num_bits, unsigned))


def fake_tensor_quant_with_axis(
    inputs: Tensor, amax: Tensor, axis: int, num_bits: int = 8, unsigned: bool = False
) -> Tensor:
    """The same with a range for each index along an axis.

    Args:
        inputs: As in :func:`fake_tensor_quant`.
        amax: As many ranges as ``inputs`` is long along ``axis``, of any shape.
        axis: The axis.
        num_bits: As in :func:`fake_tensor_quant`.
        unsigned: As in :func:`fake_tensor_quant`.

    Returns:
        A new tensor like ``inputs``.
    """
    shape = [1] * inputs.dim()
    shape[axis] = -1
    return fake_tensor_quant(inputs, amax.reshape(shape), num_bits, unsigned)


@torch.no_grad()
def fake_e4m3fy(inputs: Tensor) -> Tensor:
    """The nearest numbers of FP8 E4M3, in the dtype of ``inputs``; what is too large becomes +-448."""
    return round_to_e4m3(inputs)
