"""Weights as the integers that they are quantized to: one byte each, or two of up to 4 bits in a byte.

What is stored of a weight are its codes and, where its quantizer takes the range from the weight itself,
the range. The weight that comes back is made so that its quantizer gives the very same codes: elements that
are a product of code and scale do, and those at the end of the range get the range itself, so that it is
found again exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.numerics.fake_quant import dequantize, fake_quantize, quantize
from quantpatch.numerics.formats import Blocked, Integer, NumberFormat
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.numerics.qparams import QParams
from quantpatch.numerics.ranges import own_range


def integer_element(format: NumberFormat) -> Integer | None:
    """The integers that a format's elements are; None if they are others, or their scales cannot be stored.

    A plugin's subclass of ``Integer`` may round to anything.
    """
    element = format
    if isinstance(format, Blocked):
        if format.scale == "e4m3":  # two levels of scales
            return None
        element = format.element
    return element if type(element) is Integer else None


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes: up to 4 bits two in a byte, the first one in the low half."""
    flat = codes.reshape(-1).view(torch.uint8)
    if bits > 4:
        return flat.clone()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] & 0xF) | (flat[1::2] << 4)


def unpack(data: Tensor, shape: tuple[int, ...], element: Integer) -> Tensor:
    """Undoes ``pack``: int8 or uint8 codes of a shape."""
    if element.bits > 4:
        codes = data
    else:
        numel = 1
        for n in shape:
            numel *= n
        codes = torch.stack([data & 0xF, data >> 4], dim=-1).reshape(-1)[:numel]
        if not element.unsigned:  # the sign is bit 3
            codes = torch.where(codes > 7, codes | 0xF0, codes)
    return codes.contiguous().view(torch.uint8 if element.unsigned else torch.int8).reshape(shape)


def packed_weight(weight: Tensor, quantizer: TensorQuantizer) -> tuple[Tensor, Tensor | None]:
    """The codes of a weight, and its range where the quantizer has none of its own."""
    own = quantizer.own_range
    axis = quantizer.descriptor.kept_axes
    format, zero_point = quantizer.format, quantizer.held_zero_point
    codes, _ = quantize(
        weight, None if own is None else own.detach(), format, axis=axis, zero_point=zero_point
    )
    return codes, None if own is not None else own_range(weight, format, axis, zero_point)


def unpacked_weight(
    codes: Tensor,
    format: NumberFormat,
    axis: int | tuple[int, ...] | None,
    amax: Tensor,
    dtype: torch.dtype,
    *,
    own_range: bool,
    zero_point: int | None = None,
) -> Tensor:
    """A weight that is quantized to these codes.

    Args:
        codes: From ``packed_weight``.
        format: The quantizer's format.
        axis: The descriptor's ``kept_axes``.
        amax: The range.
        dtype: Of the weight.
        own_range: Whether the range is the quantizer's own, not the weight's.
        zero_point: The quantizer's.
    """
    highest = QParams(format, None, zero_point=zero_point).max()
    scale = format.block_scale(amax.clone()) if isinstance(format, Blocked) else amax / highest
    values = dequantize(codes, scale, format, axis=axis, zero_point=zero_point)
    if not own_range:
        # amax / max * max need not be amax; the quantizer shall find amax again.
        ends = axis.spread(amax, codes.shape[0]) if isinstance(axis, GroupedAxes) else amax
        if isinstance(format, Blocked):
            dim = (-1 if axis is None else axis if isinstance(axis, int) else axis[0]) % codes.dim()
            ends = amax.repeat_interleave(format.block_size, dim).narrow(dim, 0, codes.shape[dim])
        steps = codes.float() - (zero_point or 0)
        top = (steps if zero_point else steps.abs()) >= highest
        values = torch.where(top, ends * steps.sign(), values)
    return values.to(dtype)


def same_when_quantized(weight: Tensor, other: Tensor, quantizer: TensorQuantizer) -> bool:
    """Whether a quantizer makes the same of two weights, bit for bit."""
    own = quantizer.own_range
    with torch.no_grad():
        first, second = (
            fake_quantize(
                w.detach(),
                own,
                quantizer.format,
                axis=quantizer.descriptor.kept_axes,
                zero_point=quantizer.held_zero_point,
            )
            for w in (weight, other)
        )
    return torch.equal(first, second)
