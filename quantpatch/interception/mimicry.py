"""Functions that look like others: the same parameters, for whoever reads a function or its code object."""

from __future__ import annotations

import functools
import inspect
from types import FunctionType
from typing import Any

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
