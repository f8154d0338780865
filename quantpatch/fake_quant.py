"""Fake quantization: round tensors to a number format and back, as pure functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantpatch.errors import DescriptorError, RangeError
from quantpatch.formats import Blocked, Integer, NumberFormat

__all__ = ["dequantize", "fake_quantize", "quantize", "reduce_amax"]

Axis = int | tuple[int, ...] | None


def fake_quantize(x: Tensor, amax: Tensor | None, format: NumberFormat, *, axis: Axis = None) -> Tensor:
    """First version."""
    scale, bound = _scale_and_bound(x.detach(), amax, format, axis)
    if torch.is_grad_enabled() and (x.requires_grad or (amax is not None and amax.requires_grad)):
        return _FakeQuantize.apply(x, amax, scale, bound, format, axis)
    return _round_trip(x, scale, format, axis)


def reduce_amax(x: Tensor, axis: Axis = None) -> Tensor:
    """First version."""
    with torch.no_grad():
        kept = _kept(x, axis)
        dims = [d for d in range(x.dim()) if d not in kept]
        shape = [x.shape[d] if d in kept else 1 for d in range(x.dim())] if axis is not None else []
        if x.numel() == 0:
            return x.new_zeros(shape, dtype=torch.float32)
        r = x.abs().float()
        if dims:
            r = r.amax(dims, keepdim=axis is not None)
        return r


def _kept(x: Tensor, axis: Axis) -> tuple[int, ...]:
    if axis is None:
        return ()
    axes = axis if isinstance(axis, tuple) else (axis,)
    for a in axes:
        if not -x.dim() <= a < x.dim():
            raise RangeError(f"axis {a} is out of range for a tensor of shape {tuple(x.shape)}", value=axis)
    return tuple(a % x.dim() for a in axes)


def _blocks(x: Tensor, size: int, axis: Axis) -> Tensor:
    dim = _block_dim(x, axis)
    tail = -x.shape[dim] % size
    if tail:
        pad = [0, 0] * (x.dim() - dim - 1) + [0, tail]
        x = torch.nn.functional.pad(x, pad)
    return x.unflatten(dim, (x.shape[dim] // size, size))


def _block_dim(x: Tensor, axis: Axis) -> int:
    if isinstance(axis, tuple):
        raise DescriptorError(f"blocks run along one axis, got {axis}", field="axis", value=axis)
    return _kept(x, -1 if axis is None else axis)[0]


def _scale_and_bound(
    x: Tensor, amax: Tensor | None, format: NumberFormat, axis: Axis
) -> tuple[Tensor, Tensor | None]:
    if isinstance(format, Blocked):
        dim = _block_dim(x, axis)
        blocks = _blocks(x, format.block_size, axis)
        if amax is None or format.scale == "e4m3":
            ranges = reduce_amax(blocks, tuple(d for d in range(blocks.dim()) if d != dim + 1))
        else:
            ranges = amax.detach().unsqueeze(dim + 1) if amax.dim() else amax.detach()
        return format.block_scale(ranges, None if amax is None else amax.detach()), None
    range_ = reduce_amax(x, axis) if amax is None else amax.detach().float()
    return range_ / format.max, None if amax is None else range_


def _round_trip(x: Tensor, scale: Tensor, format: NumberFormat, axis: Axis) -> Tensor:
    with torch.no_grad():
        dim = _block_dim(x, axis) if format.block_size else 0
        y = _blocks(x, format.block_size, axis) if format.block_size else x
        y = y.float() / scale.masked_fill(scale == 0, 1.0)
        y = format.round_(y).mul_(scale).to(x.dtype)
        if format.block_size:
            y = y.flatten(dim, dim + 1).narrow(dim, 0, x.shape[dim])
        return y


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        amax: Tensor | None,
        scale: Tensor,
        bound: Tensor | None,
        format: NumberFormat,
        axis: Axis,
    ) -> Tensor:
        ctx.format = format
        ctx.save_for_backward(x, amax, scale, bound)
        return _round_trip(x, scale, format, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, amax, scale, bound = ctx.saved_tensors
        format = ctx.format
        inside = None
        if bound is not None:
            inside = x.float().abs() <= bound
        if format.min >= 0:
            inside = (x >= 0) if inside is None else inside & (x >= 0)
        gx = grad if inside is None else grad.masked_fill(~inside, 0)
        ga = None
        if amax is not None and amax.requires_grad:
            v = x.float() / scale.masked_fill(scale == 0, 1.0)
            q = format.round_(v.clone())
            ds = (q - v.masked_fill((v <= format.min) | (v >= format.max), 0)) * grad.float()
            ga = ds.sum_to_size(amax.shape) / format.max / math.sqrt(x.numel() / amax.numel() * format.max)
        return gx, ga, None, None, None, None


def quantize(
    x: Tensor, amax: Tensor | None, format: NumberFormat, *, axis: Axis = None
) -> tuple[Tensor, Tensor]:
    """First version."""
    with torch.no_grad():
        scale, _ = _scale_and_bound(x, amax, format, axis)
        size = format.block_size
        y = (_blocks(x, size, axis) if size else x).float() / scale.masked_fill(scale == 0, 1.0)
        y = format.round_(y)
        if size:
            dim = _block_dim(x, axis)
            y = y.flatten(dim, dim + 1).narrow(dim, 0, x.shape[dim])
            scale = scale.squeeze(dim + 1)
        element = format.element if isinstance(format, Blocked) else format
        if isinstance(element, Integer):
            y = y.to(torch.uint8 if element.unsigned else torch.int8)
        return y, scale


def dequantize(codes: Tensor, scale: Tensor, format: NumberFormat, *, axis: Axis = None) -> Tensor:
    """First version."""
    if format.block_size:
        dim = _block_dim(codes, axis)
        y = _blocks(codes.float(), format.block_size, axis) * scale.unsqueeze(dim + 1)
        return y.flatten(dim, dim + 1).narrow(dim, 0, codes.shape[dim])
    return codes.float() * scale
