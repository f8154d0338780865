"""Convolutions and transposed convolutions, lazy ones included."""

from __future__ import annotations

from torch import nn

from quantpatch.layers.base import QuantizedLayer

__all__ = [
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantLazyConv1d",
    "QuantLazyConv2d",
    "QuantLazyConv3d",
    "QuantLazyConvTranspose1d",
    "QuantLazyConvTranspose2d",
    "QuantLazyConvTranspose3d",
]


class QuantConv1d(QuantizedLayer, nn.Conv1d):
    """``nn.Conv1d`` with quantized input and weight."""


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """``nn.Conv2d`` with quantized input and weight."""


class QuantConv3d(QuantizedLayer, nn.Conv3d):
    """``nn.Conv3d`` with quantized input and weight."""


class _QuantizedTransposed(QuantizedLayer):
    weights = {"weight": 1}  # (in, out / groups, ...): torch keeps the input channels first


class QuantConvTranspose1d(_QuantizedTransposed, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with quantized input and weight."""


class QuantConvTranspose2d(_QuantizedTransposed, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with quantized input and weight."""


class QuantConvTranspose3d(_QuantizedTransposed, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with quantized input and weight."""


class QuantLazyConv1d(QuantizedLayer, nn.LazyConv1d):
    """``nn.LazyConv1d`` that becomes a ``QuantConv1d``."""

    cls_to_become = QuantConv1d  # type: ignore[assignment]


class QuantLazyConv2d(QuantizedLayer, nn.LazyConv2d):
    """``nn.LazyConv2d`` that becomes a ``QuantConv2d``."""

    cls_to_become = QuantConv2d  # type: ignore[assignment]


class QuantLazyConv3d(QuantizedLayer, nn.LazyConv3d):
    """``nn.LazyConv3d`` that becomes a ``QuantConv3d``."""

    cls_to_become = QuantConv3d  # type: ignore[assignment]


class QuantLazyConvTranspose1d(_QuantizedTransposed, nn.LazyConvTranspose1d):
    """``nn.LazyConvTranspose1d`` that becomes a ``QuantConvTranspose1d``."""

    cls_to_become = QuantConvTranspose1d  # type: ignore[assignment]


class QuantLazyConvTranspose2d(_QuantizedTransposed, nn.LazyConvTranspose2d):
    """``nn.LazyConvTranspose2d`` that becomes a ``QuantConvTranspose2d``."""

    cls_to_become = QuantConvTranspose2d  # type: ignore[assignment]


class QuantLazyConvTranspose3d(_QuantizedTransposed, nn.LazyConvTranspose3d):
    """``nn.LazyConvTranspose3d`` that becomes a ``QuantConvTranspose3d``."""

    cls_to_become = QuantConvTranspose3d  # type: ignore[assignment]
