"""Embedding tables: only the weight is quantized, since the input is indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantpatch.layers.base import QuantizedLayer

__all__ = ["QuantEmbedding", "QuantEmbeddingBag"]


class _QuantizedTable(QuantizedLayer):
    inputs = ()  # indices

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.max_norm is not None:  # type: ignore[attr-defined]
            # The float class renormalizes the rows it looks up in place: in the table, not in a
            # quantized copy of it.
            indices = args[0] if args else kwargs["input"]
            with torch.no_grad():
                torch.embedding_renorm_(
                    self.weight,  # type: ignore[attr-defined]
                    indices.contiguous(),
                    self.max_norm,  # type: ignore[attr-defined]
                    self.norm_type,  # type: ignore[attr-defined]
                )
        return super().forward(*args, **kwargs)


class QuantEmbedding(_QuantizedTable, nn.Embedding):
    """``nn.Embedding`` with quantized weight, one range for each row."""


class QuantEmbeddingBag(_QuantizedTable, nn.EmbeddingBag):
    """``nn.EmbeddingBag`` with quantized weight, one range for each row."""
