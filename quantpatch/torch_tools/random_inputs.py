"""Random inputs that a model takes where it takes those given: for checks on more than an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def random_like(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the same shapes and about the same values."""
    generator = torch.Generator().manual_seed(0)

    def like(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.numel() == 0:
            return x
        if not x.is_floating_point():  # indices, masks: values that are allowed, in another order
            order = torch.randperm(x.numel(), generator=generator)
            return x.detach().cpu().flatten()[order].reshape(x.shape).to(x.device)
        noise = torch.randn(x.shape, generator=generator)
        values = x.detach().float().cpu()
        values = values[values.isfinite() & (values.abs() < 1e10)]
        if not values.numel():
            return noise.to(x.device, x.dtype)
        return (noise * values.std(correction=0) + values.mean()).to(x.device, x.dtype)

    made: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(like, (args, dict(kwargs)))
    return made
