"""JetMoe's linear layer of several experts, of which both its attention and its MLP are made."""

from __future__ import annotations

from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

from quantpatch.layers import QuantizedLayer

__all__ = ["QuantJetMoeParallelExperts"]


class QuantJetMoeParallelExperts(QuantizedLayer, JetMoeParallelExperts):
    """``JetMoeParallelExperts`` with its inputs quantized, and its weight for each expert and channel."""

    inputs = ("inputs",)
    weights = {"weight": (0, 1)}
