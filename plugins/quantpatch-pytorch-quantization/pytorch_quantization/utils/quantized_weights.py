"""All weights of a model that are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pytorch_quantization.nn.modules.tensor_quantizer import TensorQuantizer

__all__ = ["joined", "quantized_weights"]


def quantized_weights(model: nn.Module) -> Iterator[tuple[TensorQuantizer, tuple[Tensor, ...]]]:
    """Each weight quantizer of a model with the tensors that it quantizes, joined, as one."""
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        quantizer: Any = getattr(module, "_weight_quantizer", None)
        weight_groups: Any = getattr(module, "weight_groups", None)
        if weight_groups is not None:
            yield from weight_groups()
        elif getattr(type(quantizer), "is_quantizer", False) and isinstance(weight, Tensor):
            yield quantizer, (weight,)


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    """The tensors side by side: with the same rows, and one range for each row."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
