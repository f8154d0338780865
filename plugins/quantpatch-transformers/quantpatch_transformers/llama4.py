"""The experts of Llama 4, which take their tokens sorted and multiply them with ``torch.bmm``."""

from __future__ import annotations

from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from quantpatch_transformers.experts import QuantizedExperts

__all__ = ["QuantLlama4TextExperts"]


class QuantLlama4TextExperts(QuantizedExperts, Llama4TextExperts):
    """``Llama4TextExperts`` with the operands of both its products quantized.

    Its weights are (experts, in, out), and its input is (experts * tokens, features).
    """

    is_transposed = True
