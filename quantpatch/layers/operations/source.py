"""Functions from their source: read as a tree, and made again from a changed one."""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
import types
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn import functional as F

from quantpatch.errors import LayerError

#: What to write where a function cannot be read.
BY_HAND = 'Write forward in the replacement, with self.quantize_operand("name", x) around each operand'

# Written in Python by torch, and made of products; the others of its functions are taken as they are.
_MADE_OF_PRODUCTS = {
    getattr(F, name)
    for name in ("multi_head_attention_forward", "_in_projection_packed", "_in_projection")
    if hasattr(F, name)
}
# Where what torch.jit.script compiled has its function.
_SCRIPTED_FROM = "_torchdynamo_inline"


class Unreadable(LayerError):
    """A function's source cannot be read."""


def plain(function: Any) -> types.FunctionType | None:
    """The function that a decorated one, or a bound or static method, is made of; None for other objects."""
    function = getattr(function, "__func__", function)
    function = getattr(function, _SCRIPTED_FROM, function)
    try:
        found = inspect.unwrap(function)
    except ValueError:  # wrapped in itself
        return None
    return found if isinstance(found, types.FunctionType) else None


def run_by(value: Any) -> Any:
    """What runs when an object is called: the function of a method, the ``__call__`` of its class."""
    value = getattr(value, "__func__", value)
    if isinstance(value, (types.FunctionType, type, nn.Module)) or hasattr(value, "__wrapped__"):
        return value
    call = inspect.getattr_static(type(value), "__call__", None)
    return call if isinstance(call, types.FunctionType) and not is_in_torch(call) else value


def is_in_torch(function: types.FunctionType) -> bool:
    """Whether a function is torch's own, and taken as it is."""
    return str(function.__module__).partition(".")[0] == "torch" and function not in _MADE_OF_PRODUCTS


def parsed(function: types.FunctionType, owner: Any) -> ast.FunctionDef:
    """The tree of a function, with the line numbers of its file.

    Args:
        function: A function written in Python.
        owner: The class that it is read for.

    Raises:
        LayerError: The source cannot be read, or is not what was imported.
    """
    tree, first = _read(function, owner)
    ast.increment_lineno(tree, first - 1)
    return tree


def _read(function: types.FunctionType, owner: Any) -> tuple[ast.FunctionDef, int]:
    name = function.__qualname__
    try:
        lines, first = inspect.getsourcelines(function.__code__)
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise Unreadable(
            f"`operations` needs the source of {name}, which cannot be read: {error}. {BY_HAND}", layer=owner
        ) from error
    if function.__code__.co_name == "<lambda>":
        where = f"line {first} of {os.path.basename(function.__code__.co_filename)}"
        raise Unreadable(f"`operations` cannot read a lambda ({name}, {where}); make it a def", layer=owner)
    if not isinstance(tree, ast.FunctionDef) or not _is_of(tree, function):
        raise Unreadable(
            f"the source of {name} is not what was imported: the file has changed since. Start Python again",
            layer=owner,
        )
    _spell_private_names(tree, function)
    return tree, first


def compiled(
    function: types.FunctionType, tree: ast.FunctionDef, given: Mapping[str, Any], *, takes: str | None = None
) -> types.FunctionType:
    """A function like another, of a changed tree.

    Args:
        function: The other.
        tree: What it is to compute.
        given: Objects that the tree uses, by names that are its own.
        takes: The name of one more parameter, by keyword alone.
    """
    tree.returns = None
    arguments = tree.args
    parts = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in [*parts, *filter(None, (arguments.vararg, arguments.kwarg))]:
        argument.annotation = None
    # Defaults are taken from the function as it is: their names may be those of a class body.
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [d and ast.Constant(None) for d in arguments.kw_defaults]
    if takes is not None:
        arguments.kwonlyargs.append(ast.arg(takes))
        arguments.kw_defaults.append(None)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    tree.decorator_list = []
    factory = ast.parse(f"def factory({', '.join({**cells, **given})}):\n    return {tree.name}").body[0]
    assert isinstance(factory, ast.FunctionDef)
    factory.body.insert(0, tree)
    module = ast.fix_missing_locations(ast.Module([factory], []))
    namespace: dict[str, Any] = {}
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, namespace)
    placeholders = {**dict.fromkeys(cells), **given}
    made: types.FunctionType = namespace["factory"](**placeholders)
    new = dict(zip(made.__code__.co_freevars, made.__closure__ or (), strict=True))
    made = types.FunctionType(
        made.__code__,
        function.__globals__,
        made.__name__,
        function.__defaults__,
        tuple(
            cells.get(name, cell) for name, cell in new.items()
        ),  # those of the function itself: they may change
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__doc__, made.__qualname__ = function.__doc__, function.__qualname__
    made.__module__ = function.__module__
    return made


def is_scripted_from(function: Any, inner: types.FunctionType | None) -> bool:
    """Whether torch.jit.script compiled a function from another."""
    return getattr(function, _SCRIPTED_FROM, None) is inner


def codes(code: types.CodeType) -> list[types.CodeType]:
    """The code of a function, and of those that are defined in it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [code, *(each for part in inner for each in codes(part))]


def _spell_private_names(tree: ast.FunctionDef, function: types.FunctionType) -> None:
    """Writes ``self.__x`` as Python does inside a class, where the function no longer is."""
    # A decorator's function goes by the name of what it wraps.
    parts = [] if hasattr(function, "__wrapped__") else function.__qualname__.split(".")
    owner = parts[-2].lstrip("_") if len(parts) > 1 else ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("__") and not node.attr.endswith("__"):
            node.attr = f"_{owner}{node.attr}"


def _is_of(tree: ast.FunctionDef, function: types.FunctionType) -> bool:
    """Whether a function was compiled from a source, as far as its names show."""
    code = function.__code__
    arguments = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)]
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    known = {name for c in codes(code) for name in c.co_names}
    return (
        tree.name == function.__code__.co_name
        and arguments == list(code.co_varnames[: code.co_argcount])
        and all(name in known or name.startswith("__") for name in attributes - _in_signature(tree))
    )


def _in_signature(tree: ast.FunctionDef) -> set[str]:
    """Attributes in decorators, defaults and annotations, which are not part of a function's code."""
    outside = [*tree.decorator_list, tree.args, *([tree.returns] if tree.returns else [])]
    outside += [node.annotation for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    return {n.attr for part in outside for n in ast.walk(part) if isinstance(n, ast.Attribute)}
