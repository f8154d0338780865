"""Linear layers with quantized input and weight."""

from __future__ import annotations

from torch import nn

from pytorch_quantization import tensor_quant
from pytorch_quantization.nn.modules._utils import QuantLayer

__all__ = ["Linear", "QuantLinear"]


class QuantLinear(QuantLayer, nn.Linear):
    """``nn.Linear`` with quantized input and weight."""

    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW


Linear = QuantLinear
