"""Ranges of weights clipped at the share of each that loses least at the output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantpatch.tuning.operands import Layout, Moments
from quantpatch.tuning.weights import Weight

# Shares of a range that it is clipped at.
_SHARES = tuple(1 - step / 20 for step in range(1, 11))


def clipped(weight: Weight, own: Tensor, seen: Mapping[Layout, Moments]) -> Tensor:
    """A tensor in a weight's place with each of its ranges clipped, on its own, where that loses less.

    Args:
        weight: The weight.
        own: What it is, float32.
        seen: What is known of its inputs.
    """
    ranges = weight.own_ranges(own)
    result, best = own, weight.summed(costs(weight, own, own, seen, alone=True))
    for share in _SHARES:
        tried = torch.minimum(torch.maximum(own, -ranges * share), ranges * share)
        lost = weight.summed(costs(weight, own, tried, seen, alone=True))
        result = torch.where(lost < best, tried, result)
        best = torch.minimum(best, lost)
    return result


def costs(
    weight: Weight, own: Tensor, tried: Tensor, seen: Mapping[Layout, Moments], *, alone: bool = False
) -> Tensor:
    """What rounding a clipped weight loses at the output, of each element its part in the sum.

    Args:
        weight: The weight.
        own: What it is.
        tried: What is rounded.
        seen: What is known of its inputs.
        alone: Whether blocks count each for itself, without what their errors have in common.
    """
    error, found = own - weight.rounded_anew(tried), torch.zeros_like(own)
    blocks = weight.blocks(own) if alone else None
    for layout, moments in seen.items():
        delta, gram = layout.matrices(error), moments.gram
        if blocks is not None:
            numbers = layout.matrices(blocks)[:, :1]
            gram = gram * (numbers.mT == numbers)
        view = layout.view(found)
        view.copy_((torch.bmm(delta, gram) * delta).reshape(view.shape))
    return found


def size(own: Tensor, seen: Mapping[Layout, Moments]) -> float:
    """The square of what a weight gives."""
    total = 0.0
    for layout, moments in seen.items():
        w = layout.matrices(own)
        total += float((torch.bmm(w, moments.gram) * w).sum())
    return total
