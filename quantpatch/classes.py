"""Classes: where they are found, and which one a layer is really of."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["dotted", "own_class"]


def dotted(thing: Any) -> str:
    """Where a class or function is found: ``module.Qualified.Name``."""
    return f"{thing.__module__}.{thing.__qualname__}"


def own_class(layer: nn.Module) -> type[Any]:
    """A layer's class, looking through the one that ``parametrize`` puts around it."""
    cls = type(layer)
    return cls.__bases__[0] if parametrize.is_parametrized(layer) else cls
