"""Average and max pooling: TensorRT runs them in 8 bits if their input is."""

from __future__ import annotations

from quantpatch.layers.base import ChannelsFirst1d, ChannelsFirst2d, ChannelsFirst3d, QuantizedLayer
from quantpatch.torch_tools import nn

__all__ = [
    "QuantAdaptiveAvgPool1d",
    "QuantAdaptiveAvgPool2d",
    "QuantAdaptiveAvgPool3d",
    "QuantAdaptiveMaxPool1d",
    "QuantAdaptiveMaxPool2d",
    "QuantAdaptiveMaxPool3d",
    "QuantAvgPool1d",
    "QuantAvgPool2d",
    "QuantAvgPool3d",
    "QuantMaxPool1d",
    "QuantMaxPool2d",
    "QuantMaxPool3d",
]


class _QuantizedPooling(QuantizedLayer):
    weights = {}  # pooling has none


class QuantAvgPool1d(ChannelsFirst1d, _QuantizedPooling, nn.AvgPool1d):
    """``nn.AvgPool1d`` with quantized input."""


class QuantAvgPool2d(ChannelsFirst2d, _QuantizedPooling, nn.AvgPool2d):
    """``nn.AvgPool2d`` with quantized input."""


class QuantAvgPool3d(ChannelsFirst3d, _QuantizedPooling, nn.AvgPool3d):
    """``nn.AvgPool3d`` with quantized input."""


class QuantAdaptiveAvgPool1d(ChannelsFirst1d, _QuantizedPooling, nn.AdaptiveAvgPool1d):
    """``nn.AdaptiveAvgPool1d`` with quantized input."""


class QuantAdaptiveAvgPool2d(ChannelsFirst2d, _QuantizedPooling, nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` with quantized input."""


class QuantAdaptiveAvgPool3d(ChannelsFirst3d, _QuantizedPooling, nn.AdaptiveAvgPool3d):
    """``nn.AdaptiveAvgPool3d`` with quantized input."""


class QuantMaxPool1d(ChannelsFirst1d, _QuantizedPooling, nn.MaxPool1d):
    """``nn.MaxPool1d`` with quantized input."""


class QuantMaxPool2d(ChannelsFirst2d, _QuantizedPooling, nn.MaxPool2d):
    """``nn.MaxPool2d`` with quantized input."""


class QuantMaxPool3d(ChannelsFirst3d, _QuantizedPooling, nn.MaxPool3d):
    """``nn.MaxPool3d`` with quantized input."""


class QuantAdaptiveMaxPool1d(ChannelsFirst1d, _QuantizedPooling, nn.AdaptiveMaxPool1d):
    """``nn.AdaptiveMaxPool1d`` with quantized input."""


class QuantAdaptiveMaxPool2d(ChannelsFirst2d, _QuantizedPooling, nn.AdaptiveMaxPool2d):
    """``nn.AdaptiveMaxPool2d`` with quantized input."""


class QuantAdaptiveMaxPool3d(ChannelsFirst3d, _QuantizedPooling, nn.AdaptiveMaxPool3d):
    """``nn.AdaptiveMaxPool3d`` with quantized input."""
