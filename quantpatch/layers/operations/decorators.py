"""What decorators made of a function, made of another one: they do not run again."""

from __future__ import annotations

import ast
import functools
import types
from typing import Any

from quantpatch.layers.operations.source import (
    BY_HAND,
    Unreadable,
    compiled,
    is_scripted_from,
    parsed,
    plain,
)

_BELOW, _WRAPS = "_below", "_wraps"
# Objects that decorators make of functions, without which these compute the same.
_CACHES = (type(functools.lru_cache(len)),)


def decorated(function: Any, made: types.FunctionType, takes: str | None, owner: Any) -> Any:
    """What a function became by its decorators, of another function in its place.

    Args:
        function: The function, with its decorators.
        made: The other.
        takes: A keyword that the other needs besides. Decorators that drop, rename or check keywords never
            see it: it is bound beneath them.
        owner: The class that it is made for.

    Raises:
        LayerError: A decorator keeps the function where it cannot be exchanged.
    """
    inner = plain(function)
    assert inner is not None
    outer = getattr(function, "__func__", function)
    if outer is inner or is_scripted_from(outer, inner):
        return made
    wrapped = getattr(outer, "__wrapped__", None)
    below = decorated(wrapped, made, takes, owner)
    if isinstance(outer, _CACHES):
        return below
    if not isinstance(outer, types.FunctionType):
        raise Unreadable(
            f"a decorator made an object of {inner.__qualname__}: {type(outer).__name__}. {BY_HAND}",
            layer=owner,
        )
    closure = dict(zip(outer.__code__.co_freevars, outer.__closure__ or (), strict=True))
    names = [name for name, cell in closure.items() if _holds(cell, wrapped)]
    if not names:
        raise Unreadable(
            f"the decorator of {inner.__qualname__} keeps it where it cannot be exchanged. {BY_HAND}",
            layer=owner,
        )
    code, cells, kwdefaults = outer.__code__, closure, outer.__kwdefaults__
    if takes is not None:
        bound = _with_bound(outer, names, below, takes, owner)
        code, kwdefaults = bound.__code__, bound.__kwdefaults__
        cells = dict(zip(code.co_freevars, bound.__closure__ or (), strict=True))
    else:
        cells = {**closure, **dict.fromkeys(names, types.CellType(below))}
    copy = types.FunctionType(
        code, outer.__globals__, outer.__name__, outer.__defaults__, tuple(cells[n] for n in code.co_freevars)
    )
    functools.update_wrapper(copy, outer)
    copy.__kwdefaults__ = kwdefaults
    copy.__wrapped__ = below  # type: ignore[attr-defined]
    return copy


def _with_bound(
    outer: types.FunctionType, names: list[str], below: Any, takes: str, owner: Any
) -> types.FunctionType:
    """A decorator's function, which takes one more keyword and binds it to what it wraps."""
    tree = parsed(outer, owner)
    others = _given_the_same(tree) & {*outer.__code__.co_freevars} - {*names}
    if others:
        raise Unreadable(
            f"the decorator of {outer.__name__} may call {min(others)} in its place. {BY_HAND}", layer=owner
        )
    for name in names:
        text = f"@{_WRAPS}({_BELOW})\ndef {name}(*args, **kwargs):\n    "
        text += f"return {_BELOW}(*args, **kwargs, {takes}={takes})"
        binding = ast.parse(text).body[0]
        for node in ast.walk(binding):
            ast.copy_location(node, tree)
        tree.body.insert(0, binding)
    return compiled(outer, tree, {_BELOW: below, _WRAPS: functools.wraps}, takes=takes)


def _given_the_same(tree: ast.FunctionDef) -> set[str]:
    """Names of functions that a decorator's function calls with the very arguments that it got."""
    starred = tree.args.vararg
    return {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and starred is not None
        for argument in node.args
        if isinstance(argument, ast.Starred)
        and isinstance(argument.value, ast.Name)
        and argument.value.id == starred.arg
    }


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # it is empty
        return False
