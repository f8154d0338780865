"""Bins of histograms whose width is a power of two: how wide they are, and which values are in which."""

from __future__ import annotations

import torch
from torch import Tensor

from quantpatch.numerics.backends import numba

_CHUNK = 1 << 19  # elements binned, and bins, at a time
#: Of the bin width: the smallest normal float32.
MIN_EXPONENT = -126


def width_exponent(amax: Tensor, num_bins: int) -> Tensor:
    """The smallest ``k`` with ``num_bins * 2**k >= amax``; int64."""
    mantissa, exponent = torch.frexp(amax.double() / num_bins)  # mantissa in [0.5, 1), or 0
    exponent = exponent.to(torch.int64) - (mantissa == 0.5).to(torch.int64)
    return torch.where(amax > 0, exponent, MIN_EXPONENT).clamp_min_(MIN_EXPONENT)


def power_of_two(exponent: Tensor) -> Tensor:
    """``2**exponent`` in float32, from its bits: exact, as no ``pow`` promises to be."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def channels_first(x: Tensor, shape: torch.Size) -> Tensor:
    """``x`` as ``(channels, values of a channel)``, copied only where its memory asks for it."""
    if shape.numel() == 1:
        # Order does not matter to a histogram: take the values as they lie, channels_last too.
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        return x.permute(order).reshape(1, -1)
    kept = [axis for axis, size in enumerate(shape) if size != 1]
    others = [axis for axis in range(x.dim()) if axis not in kept]
    return x.permute(kept + others).reshape(shape.numel(), -1)


def merge(counts: Tensor, doublings: Tensor) -> Tensor:
    """The histograms with ``2**doublings`` neighbouring bins of each channel made one."""
    bins = torch.arange(counts.shape[1], device=counts.device) >> doublings[:, None]
    return torch.zeros_like(counts).scatter_add_(1, bins, counts)


def count(x: Tensor, exponent: Tensor, counts: Tensor, *, clamp: bool = False) -> None:
    """Adds to ``counts (channels, bins)`` those of the finite ``x (channels, values)``.

    With ``clamp`` the last bin gets what is beyond it; without there must be nothing.

    The index of a bin is ``ceil(|x| / width) - 1``, and 0 for 0. As ``width`` is a power of two, the
    quotient is exact; multiplying by the float just below ``1 / width`` instead rounds to the float
    just below the quotient, whose integer part is that index.
    """
    channels, bins = counts.shape
    below = (((127 - exponent) << 23) - 1).to(torch.int32).view(torch.float32)[:, None]
    if numba.count(x, below.view(-1), counts):
        return
    length = min(_CHUNK, x.shape[1])
    rows = max(1, min(_CHUNK // length, _CHUNK // bins))
    for row in range(0, channels, rows):
        some = slice(row, row + rows)
        factor, target = below[some], counts[some]
        first = torch.arange(0, target.numel(), bins, dtype=torch.int32, device=x.device)[:, None]
        for part in torch.split(x[some], length, dim=1):
            scaled = part.float() * factor
            if clamp:
                scaled.clamp_(1 - bins, bins - 1)
            index = scaled.to(torch.int32).abs_().add_(first)
            target.add_(torch.bincount(index.reshape(-1), minlength=target.numel()).view_as(target))
