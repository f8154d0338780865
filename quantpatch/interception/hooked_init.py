"""The ``__init__`` of a class while it is hooked, which looks like the one that it stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from quantpatch.interception.mimicry import inheriting, is_made_here
from quantpatch.interception.slots import MISSING, HookedAttribute


def as_function(init: Any, target: Any) -> Callable[..., Any]:
    """What a class's own ``__init__`` (or its lack of one) does to an object, called with the object."""
    if type(init) is FunctionType:
        return init

    def run(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if init is MISSING:
            return super(target, self).__init__(*args, **kwargs)
        bind = getattr(type(init), "__get__", None)  # a mock, say, has none and does not get the object
        return (init if bind is None else bind(init, self, type(self)))(*args, **kwargs)

    return run


class HookedInit:
    """``__init__`` of a class while it is hooked: objects come by here, the class itself shows its own.

    What asks the class (``inspect``, ``help``, a builder that reads ``Target.__init__.__code__``, a library
    that saves it) gets the function that it would get without the hook.
    """

    __slots__ = ("__weakref__", "_act", "_below", "_inherited", "_target", "slot")

    def __init__(self, slot: HookedAttribute, target: Any, below: Any) -> None:
        self.slot = slot
        self._target = target
        self._below = below
        self._inherited: Any = None  # made where it is asked for
        self._act: Callable[..., Any] = self.run_below

    def acts_by(self, function: Callable[..., Any]) -> None:
        """Sets what objects come by."""
        self._act = function

    def run_below(self, thing: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Does what the class would do without the hook."""
        return as_function(self.displaced, self._target)(thing, *args, **kwargs)

    @property
    def displaced(self) -> Any:
        """What the class's dictionary held; or what a tool that edits functions has made of it since."""
        inherited = self._inherited
        if self._below is MISSING and inherited is not None and not is_made_here(inherited):
            return inherited
        return self._below

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self._shown(owner) if instance is None else MethodType(self._act, instance)

    def _shown(self, owner: Any) -> Any:
        below = self._below
        if below is not MISSING:
            return below.__get__(None, owner) if hasattr(type(below), "__get__") else below
        if self._inherited is None:
            # Not the base's own function: who edits what it finds in this class must not edit the base.
            self._inherited = inheriting(self._target, "__init__")
        return self._inherited

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """For code that has found it in the class's dictionary and wraps it."""
        return self._act(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_act":
            raise AttributeError(name)
        return getattr(self._act, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Who pickles the class by value takes what it is without the hook.
        return copy.copy, (self._shown(self._target),)
