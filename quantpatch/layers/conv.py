"""Convolutions and transposed convolutions, lazy ones included.

Formats in blocks run along the input channels, of the activation as of the weight, since products sum over
them. Where a group has fewer channels than a block, blocks are as short as the group: a depthwise
convolution has a scale for each element of its weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quantpatch.layers.base import ChannelsFirst1d, ChannelsFirst2d, ChannelsFirst3d, QuantizedLayer
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.recipes.descriptor import Axis, QuantDescriptor, Recipe
from quantpatch.torch_tools import nn

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


class QuantConv1d(ChannelsFirst1d, nn.Conv1d):
    """``nn.Conv1d`` with quantized input and weight."""


class QuantConv2d(ChannelsFirst2d, nn.Conv2d):
    """``nn.Conv2d`` with quantized input and weight."""


class QuantConv3d(ChannelsFirst3d, nn.Conv3d):
    """``nn.Conv3d`` with quantized input and weight."""


class _QuantizedTransposed(QuantizedLayer):
    weights = {"weight": 1}  # (in, out / groups, ...): torch keeps the input channels first
    groups: int
    in_channels: int
    out_channels: int

    def weight_axes(self) -> Mapping[str, Axis]:
        """Where the output channels are: with groups along both of the first axes.

        In a depthwise convolution the groups are the channels, and along the first alone.
        """
        if self.groups == 1:
            return self.weights
        is_depthwise = self.in_channels == self.out_channels == self.groups
        return {"weight": 0 if is_depthwise else GroupedAxes(self.groups)}

    def descriptors(self, recipe: Recipe) -> Iterable[tuple[str, QuantDescriptor]]:
        """Blocks run along the input channels, whichever axes the output channels have."""
        for name, descriptor in super().descriptors(recipe):
            if name == "weight" and recipe.weight is not None:
                descriptor = recipe.weight.for_axes(self.weight_axes()[name], 0)
            yield name, descriptor


class QuantConvTranspose1d(ChannelsFirst1d, _QuantizedTransposed, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with quantized input and weight."""


class QuantConvTranspose2d(ChannelsFirst2d, _QuantizedTransposed, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with quantized input and weight."""


class QuantConvTranspose3d(ChannelsFirst3d, _QuantizedTransposed, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with quantized input and weight."""


class QuantLazyConv1d(ChannelsFirst1d, nn.LazyConv1d):  # type: ignore[misc]
    """``nn.LazyConv1d`` that becomes a ``QuantConv1d``."""

    cls_to_become = QuantConv1d


class QuantLazyConv2d(ChannelsFirst2d, nn.LazyConv2d):  # type: ignore[misc]
    """``nn.LazyConv2d`` that becomes a ``QuantConv2d``."""

    cls_to_become = QuantConv2d


class QuantLazyConv3d(ChannelsFirst3d, nn.LazyConv3d):  # type: ignore[misc]
    """``nn.LazyConv3d`` that becomes a ``QuantConv3d``."""

    cls_to_become = QuantConv3d


class QuantLazyConvTranspose1d(ChannelsFirst1d, _QuantizedTransposed, nn.LazyConvTranspose1d):  # type: ignore[misc]
    """``nn.LazyConvTranspose1d`` that becomes a ``QuantConvTranspose1d``."""

    cls_to_become = QuantConvTranspose1d


class QuantLazyConvTranspose2d(ChannelsFirst2d, _QuantizedTransposed, nn.LazyConvTranspose2d):  # type: ignore[misc]
    """``nn.LazyConvTranspose2d`` that becomes a ``QuantConvTranspose2d``."""

    cls_to_become = QuantConvTranspose2d


class QuantLazyConvTranspose3d(ChannelsFirst3d, _QuantizedTransposed, nn.LazyConvTranspose3d):  # type: ignore[misc]
    """``nn.LazyConvTranspose3d`` that becomes a ``QuantConvTranspose3d``."""

    cls_to_become = QuantConvTranspose3d
