"""The gradients of learned ranges, after LSQ (Esser et al. 2020, arXiv 1902.08153)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantpatch.numerics.backends.scales import block_views, divisor, spread
from quantpatch.numerics.division import quotient
from quantpatch.numerics.qparams import QParams


def lsq_gradients(grad: Tensor, x: Tensor, q: QParams, batch_axis: int | None) -> tuple[Tensor, Tensor]:
    """The gradients to ``x`` and to the range, in operations on whole tensors, which anything can record."""
    amax, dim = q.amax, q.dim
    assert amax is not None
    outside, slope = lsq_slopes(x, q.scales(), q)
    slope = slope * grad
    if dim is not None and q.format.block_size is not None and amax.dim() and amax.shape[dim] > 1:
        sums = [b.sum(dim + 1) for b in block_views(slope, dim, q.format.block_size)]
        slope = torch.cat(sums, dim)
    grad_amax = slope.sum_to_size(amax.shape) / divided_by(x, q, batch_axis)
    del slope  # before the next is allocated
    return grad.masked_fill(outside, 0.0), grad_amax


def lsq_slopes(x: Tensor, scale: Tensor, q: QParams) -> tuple[Tensor, Tensor]:
    """How the result depends on ``x`` and on the scale.

    With ``v = x / scale``, both are decided by the paper's one rule, ``q.min() < v < q.max()``: there
    ``x`` gets the gradient (equation 5) and the scale ``round(v) - v`` (equation 3); elsewhere ``x`` gets
    none and the scale the end of the grid.

    Returns:
        Where ``x`` gets no gradient, and the scale's slope in float32.
    """
    v = quotient(x.float(), divisor(spread(scale, x, q.format, q.dim)))
    outside = ((v > q.min()) & (v < q.max())).logical_not_()
    rounded = q.round_(v.clone())
    # Not in place, which DTensors of torch 2.8 do not know.
    return outside, rounded.sub_(v.masked_fill(outside, 0.0))


def divided_by(x: Tensor, q: QParams, batch_axis: int | None = None) -> Tensor | float:
    """What divides the gradient of a scale to be that of its range.

    The paper's gradient scale (section 2.2) balances the steps of the scale with those of weights, each to
    its own size. For the range, which is ``q.max()`` times the scale, to take steps of that size its
    gradient is as many times the scale's.

    Of weights the paper counts those that share the range, of activations the features that do: examples give
    a sum of gradients, as they do for weights, so that a batch is worth as much in one piece as in several.
    """
    amax = q.amax
    assert amax is not None
    sharing = max(1, x.numel()) / max(1, amax.numel())
    if batch_axis is not None and (not amax.dim() or amax.shape[batch_axis] == 1):
        sharing = sharing / max(1, x.shape[batch_axis])
    # The longer side's: next to a zero point the upper end may be a single step. The lowest integer of a
    # signed format counts as little as it does in the paper.
    low, high = q.min(), q.max()
    if isinstance(high, Tensor):
        return quotient((sharing * torch.maximum(high, -low - 1.0)).sqrt(), high)
    return float(math.sqrt(sharing * max(high, -low - 1)) / high)
