"""``nn.Linear`` and its kin."""

from __future__ import annotations

from quantpatch.layers.base import QuantizedLayer
from quantpatch.torch_tools import nn

__all__ = ["QuantBilinear", "QuantLazyLinear", "QuantLinear"]


class QuantLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with quantized input and weight."""


class QuantBilinear(QuantizedLayer, nn.Bilinear):
    """``nn.Bilinear`` with both inputs and the weight quantized."""

    inputs = ("input1", "input2")


class QuantLazyLinear(QuantizedLayer, nn.LazyLinear):
    """``nn.LazyLinear`` that becomes a ``QuantLinear``."""

    cls_to_become = QuantLinear
