"""Scales, and the blocks of elements that share them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantpatch.numerics.formats import Integer, NumberFormat

_ZERO = torch.zeros((), device="cpu")


def divisor(scale: Tensor | float) -> Tensor | float:
    """``scale`` where it is not 0. There any finite quotient will do: it is multiplied by 0."""
    # Small, because everything lies outside a range of 0: so its gradient says. Not subnormal, because these
    # count as 0 where they are flushed.
    smallest = 1.1754943508222875e-38
    if not isinstance(scale, Tensor):
        return scale or smallest
    return scale.masked_fill(scale == 0, smallest)


def rescale_(y: Tensor, scale: Tensor | float, format: NumberFormat) -> Tensor:
    """``y * scale`` in place. For integers -0 becomes 0: they have but one, and so does ONNX Runtime."""
    if not isinstance(format, Integer):
        return y.mul_(scale)
    if not isinstance(scale, Tensor):
        # One operation for both: 0 + scale * y is rounded once, and 0 + -0 is 0.
        return torch.add(_ZERO, y, alpha=scale, out=y)
    return y.mul_(scale).add_(0.0)


def block_views(x: Tensor, dim: int, size: int) -> list[Tensor]:
    """``x`` with ``dim`` split into (blocks, elements): the whole blocks, and a shorter last one if any."""
    length = x.shape[dim]
    rest = length % size
    whole = length - rest
    views = []
    if whole or not length:
        views.append(torch.unflatten(x.narrow(dim, 0, whole), dim, (whole // size, size)))
    if rest:
        views.append(x.narrow(dim, whole, rest).unsqueeze(dim))
    return views


def spread(t: Tensor, x: Tensor, format: NumberFormat, dim: int | None) -> Tensor:
    """The ranges or scales of blocks, repeated for their elements; others as they are."""
    if dim is None or format.block_size is None or not t.dim() or t.shape[dim] == 1:
        return t
    return t.repeat_interleave(format.block_size, dim).narrow(dim, 0, x.shape[dim])
