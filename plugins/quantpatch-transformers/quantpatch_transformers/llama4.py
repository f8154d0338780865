"""The experts of Llama 4, which take their tokens sorted and multiply them with ``torch.bmm``."""

from __future__ import annotations

import torch
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from quantpatch.layers import QuantizedLayer

__all__ = ["QuantLlama4TextExperts"]


class QuantLlama4TextExperts(QuantizedLayer, Llama4TextExperts):
    """``Llama4TextExperts`` with the operands of both its products quantized.

    Its weights are (experts, in, out), each output channel of each expert with a range of its own, and its
    input is (experts * tokens, features). ``input`` goes into the first product, ``input_1`` into the second.
    """

    weights = {"gate_up_proj": (0, 2), "down_proj": (0, 2)}
    operations = {torch.bmm: ("input", None)}
