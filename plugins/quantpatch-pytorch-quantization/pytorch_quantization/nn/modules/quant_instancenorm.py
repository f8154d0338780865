"""Instance normalization with quantized input."""

from __future__ import annotations

from torch import nn

from pytorch_quantization.nn.modules._utils import QuantInputLayer

__all__ = [
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "QuantInstanceNorm1d",
    "QuantInstanceNorm2d",
    "QuantInstanceNorm3d",
]


class QuantInstanceNorm1d(QuantInputLayer, nn.InstanceNorm1d):
    """``nn.InstanceNorm1d`` with quantized input."""


class QuantInstanceNorm2d(QuantInputLayer, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` with quantized input."""


class QuantInstanceNorm3d(QuantInputLayer, nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` with quantized input."""


InstanceNorm1d, InstanceNorm2d, InstanceNorm3d = (
    QuantInstanceNorm1d,
    QuantInstanceNorm2d,
    QuantInstanceNorm3d,
)
