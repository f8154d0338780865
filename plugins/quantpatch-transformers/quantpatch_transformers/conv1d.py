"""``Conv1D``: a linear layer whose weight lies the other way round."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantpatch.layers import QuantizedLayer

__all__ = ["QuantConv1D"]


class QuantConv1D(QuantizedLayer, Conv1D):
    """``transformers.pytorch_utils.Conv1D`` with quantized input and weight.

    Its weight is ``(in, out)``, where that of ``nn.Linear`` is ``(out, in)``: the output channels, each of
    which has a range of its own, are axis 1.
    """

    weights = {"weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        """See ``Conv1D.forward``.

        The float class calls its input ``x``. Handed on by position it is quantized by an
        ``input_quantizer``, as in every other layer, so that rules for those hold here as well.
        """
        output: Tensor = super().forward(x)
        return output

    def extra_repr(self) -> str:
        """The sizes, as ``Conv1D`` shows them."""
        return f"nf={self.nf}, nx={self.weight.shape[0]}"

    # Conv1D has a repr of its own, which would hide the quantizers.
    __repr__ = nn.Module.__repr__
