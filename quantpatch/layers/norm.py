"""Instance normalization."""

from __future__ import annotations

from quantpatch.layers.base import ChannelsFirst1d, ChannelsFirst2d, ChannelsFirst3d, QuantizedLayer
from quantpatch.torch_tools import nn

__all__ = [
    "QuantInstanceNorm1d",
    "QuantInstanceNorm2d",
    "QuantInstanceNorm3d",
]


class _QuantizedNorm(QuantizedLayer):
    weights = {}  # its affine weight scales the output and is not an operand of a product


class QuantInstanceNorm1d(ChannelsFirst1d, _QuantizedNorm, nn.InstanceNorm1d):
    """``nn.InstanceNorm1d`` with quantized input."""


class QuantInstanceNorm2d(ChannelsFirst2d, _QuantizedNorm, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` with quantized input."""


class QuantInstanceNorm3d(ChannelsFirst3d, _QuantizedNorm, nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` with quantized input."""
