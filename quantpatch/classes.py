"""Classes: where they are found, which one a layer is really of, and making it one of another."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["change_class", "dotted", "own_class"]


def dotted(thing: Any) -> str:
    """Where a class or function is found: ``module.Qualified.Name``."""
    return f"{thing.__module__}.{thing.__qualname__}"


def own_class(layer: nn.Module) -> type[Any]:
    """A layer's class, looking through the one that ``parametrize`` puts around it."""
    cls = type(layer)
    return cls.__bases__[0] if parametrize.is_parametrized(layer) else cls


def change_class(layer: nn.Module, cls: type[Any]) -> None:
    """Makes a layer one of another class of the same layout; what ``parametrize`` put around it stays."""
    if parametrize.is_parametrized(layer):
        cls = _parametrized(cls, like=type(layer))
    object.__setattr__(layer, "__class__", cls)


def _parametrized(cls: type[Any], like: type[Any]) -> type[Any]:
    """A class that is to ``cls`` what ``parametrize`` made of a layer's class before it was changed."""
    own = ("__dict__", "__weakref__", "__slotnames__", "float_class", "__signature__", "_changed_from")
    members = {name: value for name, value in vars(like).items() if name not in own}
    earlier: type[Any] | None = vars(like).get("_changed_from")
    if earlier is not None and earlier.__bases__ == (cls,) and members.keys() <= vars(earlier).keys():
        return earlier
    return type(f"Parametrized{cls.__name__}", (cls,), {**members, "_changed_from": like})
