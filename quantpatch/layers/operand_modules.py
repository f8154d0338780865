"""Operations that no layer of torch owns, as small modules to put into model code.

``self.add = Add()`` and ``self.add(x, residual)`` compute what ``x + residual`` does. Built inside a block
(or converted) they are quantized like any layer: ``Add`` comes out as ``QuantAdd``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantpatch.layers.base import QuantizedLayer

__all__ = [
    "Add",
    "Cat",
    "MatMul",
    "Mul",
    "QuantAdd",
    "QuantCat",
    "QuantMatMul",
    "QuantMul",
    "QuantScaledDotProductAttention",
    "ScaledDotProductAttention",
]


class Add(nn.Module):
    """``x + y``, as in residual connections."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum; shapes broadcast."""
        return x + y


class Mul(nn.Module):
    """``x * y``, as in gates."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The elementwise product; shapes broadcast."""
        return x * y


class MatMul(nn.Module):
    """``x @ y`` of two activations."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The (batched) matrix product."""
        return x @ y


class Cat(nn.Module):
    """``torch.cat``, as in skip connections.

    Args:
        dim: The axis along which tensors are put together.
    """

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, tensors: Iterable[Tensor]) -> Tensor:
        """The tensors, one after the other."""
        return torch.cat(list(tensors), self.dim)

    def extra_repr(self) -> str:
        """The axis, for ``print(model)``."""
        return f"dim={self.dim}"


class ScaledDotProductAttention(nn.Module):
    """``F.scaled_dot_product_attention``.

    Args:
        dropout: Probability with which an attention probability is dropped, in training only.
        is_causal: Whether a position attends to none after it.
        scale: Factor of the scores; default one over the root of the number of features.
    """

    def __init__(self, dropout: float = 0.0, *, is_causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.dropout = dropout
        self.is_causal = is_causal
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The output, of the shape of ``query`` with the features of ``value``."""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout, self.is_causal, scale=self.scale
        )


class QuantAdd(QuantizedLayer, Add):
    """``Add`` with both operands quantized."""

    operations = {torch.add: ("x", "y")}


class QuantMul(QuantizedLayer, Mul):
    """``Mul`` with both operands quantized."""

    operations = {torch.mul: ("x", "y")}


class QuantMatMul(QuantizedLayer, MatMul):
    """``MatMul`` with both operands quantized."""

    operations = {torch.matmul: ("x", "y")}


class QuantCat(QuantizedLayer, Cat):
    """``Cat`` with its tensors quantized, by one range: what is put together has one scale."""

    inputs = ("tensors",)
    weights = {}

    def quantize_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Quantizes every tensor of the list.

        They go through the quantizer together, so that a range that is not known yet is one for all.
        """
        tensors = list(args[0] if args else kwargs["tensors"])
        quantizer = self.quantizer("tensors")
        # torch.cat passes over tensors of shape (0,), whatever the shapes of the others.
        filled = [tensor for tensor in tensors if tensor.shape != (0,)]
        if quantizer is not None and quantizer.is_active and filled:
            sizes = [tensor.shape[self.dim] for tensor in filled]
            tensors = list(quantizer(torch.cat(filled, self.dim)).split(sizes, self.dim))
        return (tensors,), {}


class QuantScaledDotProductAttention(QuantizedLayer, ScaledDotProductAttention):
    """``ScaledDotProductAttention`` with the operands of both its products quantized.

    With the quantizer of ``probabilities`` disabled torch's fused kernel is used, as in float; otherwise
    the probabilities have to be formed. They are quantized before dropout.
    """

    operations = {F.scaled_dot_product_attention: ("query", "key", "value", "probabilities")}
