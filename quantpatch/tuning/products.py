"""What is lost in products with quantized operands, for candidates of factors."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.tuning.exchanges import Channels, mix
from quantpatch.tuning.operands import Layout, Moments
from quantpatch.tuning.weights import Weight


@attrs.frozen(eq=False)
class Product:
    """A product of which one operand is a weight, and what is known of the other.

    Attributes:
        weight: The weight.
        channels: Where the channels of the other operand are in it.
        moments: What is known of that.
    """

    weight: Weight
    channels: Channels
    moments: Moments

    @property
    def layout(self) -> Layout:
        """How it reads the weight."""
        assert self.channels.layout is not None
        return self.channels.layout

    def of_channels(self, values: Tensor) -> Tensor:
        """The largest of values of the inputs, ``(groups, inputs)``, for each channel."""
        return values.flatten().reshape(self.channels.count(self.weight.tensor.contiguous()), -1).amax(1)

    def for_inputs(self, factor: Tensor) -> Tensor:
        """Factors of channels for the inputs, ``(groups, inputs)``."""
        shape = self.moments.largest.shape
        return factor.repeat_interleave(shape.numel() // factor.numel()).reshape(shape)

    def _rounded(self, factor: Tensor | None) -> Tensor:
        """The weight as matrices, with the factor in it and by a range of its own."""
        tensor = self.weight.tensor.detach()
        if factor is not None:
            change = self.channels.scaled if factor.dim() == 1 else self.channels.rotated
            tensor = change(tensor, factor)
        return self.layout.matrices(self.weight.rounded_anew(tensor))

    def lost(self, factor: Tensor | None) -> tuple[float, float]:
        """The squared error of what it gives with both operands quantized, on the rows that were kept.

        Args:
            factor: By which each channel is divided, and multiplied in the weight; or what mixes channels, as
                in ``Scaling.put``; None: neither.

        Returns:
            The error, and the square of what there is in float.
        """
        rows, largest = self.moments.rows, self.moments.largest
        wanted = torch.bmm(rows, self.layout.matrices(self.weight.tensor.detach().float()).mT)
        rounded = self._rounded(factor)
        if factor is not None and factor.dim() == 2:
            # The channels behind each other, whatever else is among the inputs of a product.
            apart = torch.unflatten(rows, -1, (self.channels.count(self.weight.tensor.contiguous()), -1))
            rows = mix(apart.movedim(-2, -1), factor.to(rows)).movedim(-1, -2).flatten(-2)
            largest = rows.abs()
        elif factor is not None:
            by = self.for_inputs(factor)
            rows, largest = rows / by.unsqueeze(1), largest / by
        x = _quantized(_input_quantizer(self.weight), rows, largest.max())
        return float((torch.bmm(x, rounded.mT) - wanted).square().sum()), float(wanted.square().sum())

    def lost_by_weight(self, factor: Tensor | None) -> tuple[float, float]:
        """The same with the weight alone quantized, on all rows."""
        own = self.layout.matrices(self.weight.tensor.detach().float())
        rounded = self._rounded(factor)
        if factor is not None:
            rounded = rounded / self.for_inputs(factor).unsqueeze(1)
        return tuple(float((torch.bmm(w, self.moments.gram) * w).sum()) for w in (own - rounded, own))  # type: ignore[return-value]


def _input_quantizer(weight: Weight) -> TensorQuantizer | None:
    """What quantizes what a weight is multiplied by, if it is known by name and at work."""
    inputs = weight.layer.inputs
    found: TensorQuantizer | None = weight.layer.quantizer(inputs[0]) if inputs else None
    return found if found is not None and found.is_active else None


def _quantized(quantizer: TensorQuantizer | None, rows: Tensor, largest: Tensor) -> Tensor:
    """Rows of inputs as they are quantized, by a range that is found anew: up to the largest of all."""
    if quantizer is None:
        return rows
    format = quantizer._format
    if format.block_size is not None:
        return fake_quantize(rows, None, format, axis=-1)
    return fake_quantize(rows, None if quantizer.descriptor.dynamic else largest, format)
