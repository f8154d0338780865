"""A layer as its own forward sees it, with quantized tensors in the place of its parameters.

The forward of the float class reads ``self.weight``. It is called with an object that has another tensor
there and is the layer in all else, so that nothing of the layer changes for the length of a call.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch

__all__ = ["with_stand_ins"]


def with_stand_ins(layer: Any, stand_ins: Mapping[str, Any]) -> Any:
    """A view of a layer that has the stand-ins in place of the attributes of their names."""
    # torch.compile cannot follow an object that says it is of another class.
    view = _WithStandIns if torch.compiler.is_compiling() else _Impersonating
    return view(layer, stand_ins)


class _WithStandIns:
    """A layer as its own forward sees it, with some attributes standing in for others.

    The layer itself is not touched, so threads can share it. Its methods, called through this, see the
    same stand-ins.
    """

    def __init__(self, layer: Any, stand_ins: Mapping[str, Any]) -> None:
        self.__dict__.update(stand_ins)
        self.__dict__["_layer"] = layer

    def __getattr__(self, name: str) -> Any:
        layer = self._layer
        # Methods and properties run on this object, so that they see the stand-ins as well; static and
        # class methods have no object to run on.
        member = getattr(type(layer), name, None)
        if isinstance(member, property) and member.fget is not None:
            return member.fget(self)
        value = getattr(layer, name)
        if isinstance(value, MethodType) and value.__self__ is layer:
            return functools.partial(value.__func__, self)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            self.__dict__[name] = value
        else:
            setattr(self.__dict__["_layer"], name, value)


class _Impersonating(_WithStandIns):
    """The same, passing for an object of the layer's class, as ``super()`` in its methods demands."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._layer)
