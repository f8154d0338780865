"""Bins of histograms whose width is a power of two: how wide they are, and which values are in which."""

from __future__ import annotations

import torch
from torch import Tensor

from quantpatch.numerics.backends import numba

_CHUNK = 1 << 19  # elements binned at a time on a CPU: the scratch buffers stay in its cache
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
    just below the quotient, whose integer part is that index. So no pass over the data goes into
    ``ceil``, and ``|.|`` is left to the integers, which are half as wide.

    A CPU waits for a count to be written before it raises it again, and after a ReLU half of the values are
    in one bin. So of two neighbours one is counted in a second histogram: as one integer of twice the width
    the indices of both take the second's offset in one operation.
    """
    channels, bins = counts.shape
    below = (((127 - exponent) << 23) - 1).to(torch.int32).view(torch.float32)[:, None]
    if numba.count(x, below.view(-1), counts):
        return
    chunk = _CHUNK if x.device.type == "cpu" else 1 << 26
    length = min(chunk, x.shape[1])
    rows = max(1, min(chunk // length, (1 << 20) // bins, channels))
    size = rows * bins
    dtype = torch.int16 if size <= 1 << 15 else torch.int32 if size < 1 << 31 else torch.int64
    halves = 2 if size <= 1 << 14 and x.device.type == "cpu" else 1
    scratch = torch.empty(rows, length, dtype=torch.float32, device=x.device)
    indices = torch.empty(rows, length, dtype=dtype, device=x.device)
    first = torch.arange(0, size, bins, dtype=dtype, device=x.device)[:, None]  # index of each row
    for row in range(0, channels, rows):
        some = slice(row, row + rows)
        factor, target = below[some], counts[some]
        for part in torch.split(x[some], length, dim=1):
            n, m = part.shape
            # Rows of a narrower part are packed, so that bincount can take them as one.
            scaled = scratch.view(-1)[: n * m].view(n, m)
            index = indices.view(-1)[: n * m].view(n, m)
            if part.dtype == torch.float32:
                torch.mul(part, factor, out=scaled)
            else:
                scaled.copy_(part).mul_(factor)
            if clamp:
                scaled.clamp_(1 - bins, bins - 1)
            index.copy_(scaled).abs_()
            if n > 1:
                index.add_(first[:n])
            flat = index.view(-1)
            if halves > 1:
                flat[: flat.numel() & ~1].view(torch.int32).add_(n * bins << 16)
            for half in torch.bincount(flat, minlength=halves * n * bins).view(halves, n, bins):
                target.add_(half)
