"""The ``__init__`` of a class while it is hooked, which looks like the one that it stands for."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

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


_FILE = "<quantpatch: inherited>"


def inheriting(cls: type, name: str) -> Any:
    """The method that a class would have, had it written out that it does what it inherits.

    Args:
        cls: A class without a method of that name of its own.
        name: The method's name.

    Returns:
        A function with the parameters and defaults of the inherited one; that one itself if it is not written
        in Python.
    """
    inherited = getattr(super(cls, cls), name)
    if type(inherited) is not FunctionType or not inherited.__code__.co_argcount:
        return inherited
    code = inherited.__code__
    count, named = code.co_argcount, code.co_argcount + code.co_kwonlyargcount
    optional = count - len(inherited.__defaults__ or ())
    taken = [f"{p}=None" if i >= optional else p for i, p in enumerate(code.co_varnames[:count])]
    given = [*code.co_varnames[1:count]]
    if code.co_posonlyargcount:
        taken.insert(code.co_posonlyargcount, "/")
    if code.co_flags & inspect.CO_VARARGS:
        taken.append(f"*{code.co_varnames[named]}")
        given.append(taken[-1])
        named += 1
    elif code.co_kwonlyargcount:
        taken.append("*")
    for keyword in code.co_varnames[count : count + code.co_kwonlyargcount]:
        taken.append(keyword)
        given.append(f"{keyword}={keyword}")
    if code.co_flags & inspect.CO_VARKEYWORDS:
        taken.append(f"**{code.co_varnames[named]}")
        given.append(taken[-1])
    source = (
        f"def make(__class__):\n"
        f"  def {name}({', '.join(taken)}):\n"
        f"    return super().{name}({', '.join(given)})\n"
        f"  return {name}\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(source, _FILE, "exec"), namespace)
    made: Any = namespace["make"](cls)
    functools.update_wrapper(made, inherited)
    made.__defaults__, made.__kwdefaults__ = inherited.__defaults__, inherited.__kwdefaults__
    return made


def is_made_here(function: Any) -> bool:
    """Whether a function still does what ``inheriting`` had it do."""
    return type(function) is not FunctionType or function.__code__.co_filename == _FILE
