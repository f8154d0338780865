"""Embedding tables: only the weight is quantized, since the input is indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantpatch.layers.base import QuantizedLayer
from quantpatch.torch_tools import nn

__all__ = ["QuantEmbedding", "QuantEmbeddingBag"]


class _QuantizedTable(QuantizedLayer):
    inputs = ()  # indices
    max_norm: float | None
    norm_type: float
    weight: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float class's forward, with the quantized table."""
        quantizer = self.quantizer("weight")
        if self.max_norm is None or quantizer is None or not quantizer.is_active:
            return super().forward(*args, **kwargs)
        # The float class first renormalizes the rows it looks up, in place: in the table itself, and not in
        # a quantized copy of it, which it would take off the grid.
        indices = args[0] if args else kwargs["input"]
        with torch.no_grad():
            torch.embedding_renorm_(self.weight, indices.contiguous(), self.max_norm, self.norm_type)
        stand_ins = {**self.quantize_weights(), "max_norm": None}
        return self.quantize_output(self.run_float(stand_ins, args, kwargs))

    def run_float(
        self, stand_ins: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The float class's forward; with a quantized table its gradient is dense, also with ``sparse=True``.

        All of the table goes through its quantizer, and so does the gradient: a learned range has one from
        every element, and those outside of a range have none.
        """
        if "weight" in stand_ins:
            stand_ins = {**stand_ins, "sparse": False}
        return super().run_float(stand_ins, args, kwargs)


class QuantEmbedding(_QuantizedTable, nn.Embedding):
    """``nn.Embedding`` with quantized weight, one range for each row."""


class QuantEmbeddingBag(_QuantizedTable, nn.EmbeddingBag):
    """``nn.EmbeddingBag`` with quantized weight, one range for each row."""
