"""The largest magnitude of a tensor, over all or some of its axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["kept_to_reduced", "reduce_amax"]


@torch.no_grad()
def reduce_amax(input: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = True) -> Tensor:
    """The largest magnitude.

    Args:
        input: Any tensor.
        axis: The axes to *reduce*, negative ones counted from the end; None reduces all of them.
        keepdims: Whether reduced axes stay, with length 1. Without ``axis`` the result has no axes.

    Returns:
        A tensor of the dtype of ``input``, without a gradient.

    Raises:
        ValueError: There are more axes to reduce than the tensor has.
    """
    if axis is None:
        low, high = torch.aminmax(input)
    else:
        axes = [axis] if isinstance(axis, int) else list(axis)
        if not axes:
            return input.abs()
        if len(axes) > input.dim():
            raise ValueError(
                f"Cannot reduce more axes than the tensor has: axis={axis} for one of shape "
                f"{tuple(input.shape)}"
            )
        low, high = input.amin(axes, keepdim=keepdims), input.amax(axes, keepdim=keepdims)
    return torch.maximum(low.abs(), high.abs())


def kept_to_reduced(axis: int | Sequence[int] | None, dim: int) -> tuple[int, ...] | None:
    """The axes to reduce in a tensor of ``dim`` axes, given those to keep; None reduces all.

    Raises:
        ValueError: The tensor has no such axis.
    """
    if axis is None:
        return None
    axes = [axis] if isinstance(axis, int) else list(axis)
    if any(not -dim <= a < dim for a in axes):
        raise ValueError(f"axis={axis} does not exist in a tensor of {dim} axes")
    kept = {a % dim for a in axes}
    return tuple(a for a in range(dim) if a not in kept)
