"""Tensors a chunk at a time, so that what one operation leaves in a CPU's cache the next finds there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantpatch.numerics.kernels.scale_layout import memory_order


def chunked(size: int, x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts tensors along the slowest axes of the first.

    Args:
        size: Most elements in a chunk of ``x``.
        x: Any shape and strides.
        *others: Broadcastable to ``x``; cut along an axis wherever they have its length.
    """
    if x.numel() <= size:
        yield x, *others
        return
    order = memory_order(x)
    padded = [t.reshape([1] * (x.dim() - t.dim()) + list(t.shape)).permute(order) for t in others]
    yield from _cut(size, x.permute(order), *padded)


def _cut(size: int, x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if x.numel() <= size:
        yield x, *others
        return
    dim = next(d for d, n in enumerate(x.shape) if n > 1)
    step = max(1, size * x.shape[dim] // x.numel())
    xs = torch.split(x, step, dim)
    rest = [torch.split(t, step, dim) if t.shape[dim] > 1 else (t,) * len(xs) for t in others]
    for chunk in zip(xs, *rest, strict=True):
        yield from _cut(size, *chunk)
