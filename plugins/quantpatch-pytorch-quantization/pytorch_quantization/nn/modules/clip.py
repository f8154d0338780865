"""Clipping to bounds that can be learned."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pytorch_quantization.nn import functional

__all__ = ["Clip"]


class Clip(nn.Module):
    """Clips to ``[clip_value_min, clip_value_max]``.

    Args:
        clip_value_min: Lower bound.
        clip_value_max: Upper bound.
        learn_min: Whether the lower bound is a parameter, else a buffer.
        learn_max: Whether the upper bound is a parameter.

    Raises:
        ValueError: A bound that is to be learned is not a number.
    """

    clip_value_min: Tensor
    clip_value_max: Tensor

    def __init__(
        self,
        clip_value_min: float | Tensor,
        clip_value_max: float | Tensor,
        learn_min: bool = False,
        learn_max: bool = False,
    ) -> None:
        super().__init__()
        bounds = {
            "clip_value_min": (clip_value_min, learn_min),
            "clip_value_max": (clip_value_max, learn_max),
        }
        for name, (value, learn) in bounds.items():
            if learn and (isinstance(value, Tensor) or np.size(value) != 1):
                shape = tuple(np.shape(value))
                raise ValueError(
                    f"{name} must be scalar to be learned, a number such as 1.0; got a "
                    f"{type(value).__name__} of shape {shape}"
                )
            tensor = torch.as_tensor(value, dtype=torch.float32).detach().clone()
            if learn:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, inputs: Tensor) -> Tensor:
        """The clipped tensor."""
        return functional.clip(inputs, self.clip_value_min, self.clip_value_max)
