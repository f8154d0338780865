"""Whether a class can take another one's place, where the object exists before its new class is known."""

from __future__ import annotations

import inspect
from typing import Any


def check_class(target: type, replacement: Any) -> None:
    """Raises TypeError, saying why, if a class cannot take another one's place."""
    if not isinstance(replacement, type):
        raise TypeError(f"{replacement!r} is not a class")
    if replacement is target:
        raise TypeError("it is the target itself")
    if issubclass(target, replacement):
        raise TypeError(f"{replacement.__qualname__} is a base class of the target")
    shared = (set(replacement.__mro__) & set(target.__mro__)) - {object}
    if not issubclass(replacement, target) and not shared:
        raise TypeError(
            f"{replacement.__qualname__} is not a subclass of {target.__qualname__}, and they share no base"
        )
    _check_creation(target, replacement)
    probe = object.__new__(target)
    try:
        object.__setattr__(probe, "__class__", replacement)
    except TypeError as error:
        raise TypeError(
            f"an object of {target.__qualname__} cannot become a {replacement.__qualname__} ({error})"
        ) from None


def _check_creation(target: type, replacement: type) -> None:
    """Raises TypeError for what would not run: the object exists already when its replacement is known."""
    new = inspect.getattr_static(replacement, "__new__")
    if new is not inspect.getattr_static(target, "__new__") and new is not object.__dict__["__new__"]:
        owner = next(cls for cls in replacement.__mro__ if "__new__" in vars(cls))
        raise TypeError(
            f"the __new__ of {owner.__qualname__} would not run, as the object is made by "
            f"{target.__qualname__} before it becomes a {replacement.__qualname__}; do its work in __init__"
        )
    meta, call = type(replacement), inspect.getattr_static(type(replacement), "__call__")
    if call is not inspect.getattr_static(type(target), "__call__") and call is not type.__dict__["__call__"]:
        raise TypeError(
            f"the __call__ of its metaclass {meta.__qualname__} would not run, as {target.__qualname__} is "
            f"what is called; do its work in __init__"
        )
