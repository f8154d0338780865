"""``clip`` with gradients to both bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytorch_quantization.tensor_quant import as_tensor

__all__ = ["clip"]


def clip(x: Tensor, clip_value_min: Tensor | float, clip_value_max: Tensor | float) -> Tensor:
    """Clips to a range whose bounds can be learned, as in PACT (Choi et al. 2018, arXiv 1805.06085).

    Between the bounds the gradient goes to ``x``; from a bound outwards it goes to that bound.

    Args:
        x: A tensor.
        clip_value_min: Lower bound, broadcastable to ``x``; one number, if it is learned.
        clip_value_max: Upper bound.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: In backward, where a bound that needs a gradient is not one number.
    """
    low, high = (as_tensor(bound).to(x.device) for bound in (clip_value_min, clip_value_max))
    result: Tensor = _Clip.apply(x, low, high)  # type: ignore[no-untyped-call]
    return result


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low, high)
        return x.clamp(low.to(x.dtype), high.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, low, high = ctx.saved_tensors
        for bound, needed in zip((low, high), ctx.needs_input_grad[1:], strict=True):
            if needed and bound.dim() and bound.numel() != 1:
                raise ValueError(
                    f"a bound that is learned can only be scalar: one of clip_value_min and clip_value_max "
                    f"has the shape {tuple(bound.shape)}"
                )
        below, above = x <= low.to(x.dtype), x >= high.to(x.dtype)
        return (
            grad.masked_fill(below | above, 0.0),
            grad.masked_fill(~below, 0.0).sum_to_size(low.shape).to(low.dtype),
            grad.masked_fill(~above, 0.0).sum_to_size(high.shape).to(high.dtype),
        )
