"""Pooling with quantized input."""

from __future__ import annotations

from torch import nn

from pytorch_quantization.nn.modules._utils import QuantInputLayer

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "QuantAdaptiveAvgPool1d",
    "QuantAdaptiveAvgPool2d",
    "QuantAdaptiveAvgPool3d",
    "QuantAvgPool1d",
    "QuantAvgPool2d",
    "QuantAvgPool3d",
    "QuantMaxPool1d",
    "QuantMaxPool2d",
    "QuantMaxPool3d",
]


class QuantMaxPool1d(QuantInputLayer, nn.MaxPool1d):
    """``nn.MaxPool1d`` with quantized input."""


class QuantMaxPool2d(QuantInputLayer, nn.MaxPool2d):
    """``nn.MaxPool2d`` with quantized input."""


class QuantMaxPool3d(QuantInputLayer, nn.MaxPool3d):
    """``nn.MaxPool3d`` with quantized input."""


class QuantAvgPool1d(QuantInputLayer, nn.AvgPool1d):
    """``nn.AvgPool1d`` with quantized input."""


class QuantAvgPool2d(QuantInputLayer, nn.AvgPool2d):
    """``nn.AvgPool2d`` with quantized input."""


class QuantAvgPool3d(QuantInputLayer, nn.AvgPool3d):
    """``nn.AvgPool3d`` with quantized input."""


class QuantAdaptiveAvgPool1d(QuantInputLayer, nn.AdaptiveAvgPool1d):
    """``nn.AdaptiveAvgPool1d`` with quantized input."""


class QuantAdaptiveAvgPool2d(QuantInputLayer, nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` with quantized input."""


class QuantAdaptiveAvgPool3d(QuantInputLayer, nn.AdaptiveAvgPool3d):
    """``nn.AdaptiveAvgPool3d`` with quantized input."""


MaxPool1d, MaxPool2d, MaxPool3d = QuantMaxPool1d, QuantMaxPool2d, QuantMaxPool3d
AvgPool1d, AvgPool2d, AvgPool3d = QuantAvgPool1d, QuantAvgPool2d, QuantAvgPool3d
AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d = (
    QuantAdaptiveAvgPool1d,
    QuantAdaptiveAvgPool2d,
    QuantAdaptiveAvgPool3d,
)
