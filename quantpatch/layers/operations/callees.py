"""Which function a call runs, as far as that is known before it does."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import threading
import types
from typing import Any

import torch
from torch import nn
from torch._library.custom_ops import CustomOpDef
from torch.utils.checkpoint import checkpoint

from quantpatch.layers.operations.facts import ASKING, LOOKUPS
from quantpatch.layers.operations.names import Names
from quantpatch.layers.operations.progress import Progress
from quantpatch.layers.operations.source import is_in_torch, plain, run_by
from quantpatch.layers.operations.syntax import get

_SPARSE = {torch.sparse.mm, torch.sparse.addmm, torch.sspaddmm, torch.hspmm, torch.smm}
# What calls a function that it is given, with the arguments that it is given besides.
_RUNNERS = (checkpoint, threading.Thread, map, functools.partial, torch.vmap)
# What gets functions and does not call them, or not with tensors of torch's own class.
_CALLING_NONE = ASKING | {torch.overrides.handle_torch_function}
_RUNNING_METHODS = {"submit", "map", "starmap", "apply_async"}
# Of compiled functions: those of torch, which the table has, and of packages that do not multiply tensors.
_OWN_NAMESPACES = {"aten", "prims", "prim", "quantpatch"}
_COMPUTES_NO_PRODUCT = {"torch", "numpy"}


def is_of_module(name: str) -> bool:
    """Whether a method is one of every module's, which are torch's own."""
    return name != "forward" and hasattr(nn.Module, name)


class Callees:
    """The functions that calls in a function run.

    Args:
        progress: Of the class.
        names: What names mean in the function.
    """

    def __init__(self, progress: Progress, names: Names) -> None:
        self._progress = progress
        self._names = names

    def target(self, node: ast.Call, found: Any) -> tuple[Any, bool] | None:
        """The function that a call runs, if it is to be looked into.

        Args:
            node: The call.
            found: What a global name in it means; None if it means nothing.

        Returns:
            The function, and whether an object is given to it first, as to a method.
        """
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr == "apply":
            self._look_at_backward(self._names.meaning(function.value))
        if found is not None:
            why = _not_python(found)
            if why:
                self._progress.hide(ast.unparse(function), why)
            followed = self._followed(found)
            return None if followed is None else (followed, followed is not found)
        if isinstance(function, ast.Attribute):
            return self._attribute_called(function)
        if isinstance(function, ast.Name) and function.id in self._names.assigned:
            for value in reversed(self._names.assigned[function.id]):
                held = self._asked_function(value)
                if held is not None:
                    return held, _is_call(held)
        if isinstance(function, ast.Subscript):
            held = self._asked_function(function)
            return None if held is None else (held, _is_call(held))
        return None

    def handed_on(self, node: ast.Call, found: Any) -> list[tuple[Any, Any, Any]]:
        """Functions that a call hands on to what calls them, each with where it stands: an owner and a key.

        Args:
            node: The call.
            found: What a global name in it means; None if it means nothing.
        """
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        runs = any(found is known for known in _RUNNERS) or (found is None and name in _RUNNING_METHODS)
        places: list[tuple[Any, Any]] = [(node.args, n) for n in range(len(node.args))]
        places += [(keyword, "value") for keyword in node.keywords]
        handed: list[tuple[Any, Any, Any]] = []
        for owner, key in places:
            argument = get(owner, key)
            meant = self._names.meaning(argument) if isinstance(argument, (ast.Name, ast.Attribute)) else None
            function = None if meant is None else self._followed(meant)
            inner = plain(function)
            if inner is None or not self._progress.may_multiply(inner):
                continue
            if runs:
                handed.append((owner, key, function))
            elif name not in LOOKUPS and found not in _CALLING_NONE:
                why = f"handed on to {ast.unparse(node.func)}, which may call it. Call it by its name"
                self._progress.hide(inner, why)
        return handed

    def _asked_function(self, node: ast.expr) -> Any:
        asked = self._progress.asked
        unnamed = asked.unnamed(node, self._names.own)
        if unnamed is not None and self._progress.may_multiply(unnamed):
            name = unnamed.__qualname__.rpartition(".")[2]
            why = f"{ast.unparse(node)} is {name}, which no other process finds by that name"
            self._progress.hide(self._progress.float_class, why)
        return asked.function(node, self._names.known, self._names.own, self._names.where)

    def _look_at_backward(self, cls: Any) -> None:
        """An ``autograd.Function`` cannot be rewritten: what it saves is for a backward of its own."""
        if isinstance(cls, type) and issubclass(cls, torch.autograd.Function):
            inner = plain(inspect.getattr_static(cls, "forward", None))
            if inner is not None and self._progress.wanted.hinted(inner.__code__):
                self._progress.hide(cls, "an autograd.Function, which has a backward of its own")

    def _followed(self, function: Any) -> Any:
        """A function that a global name means, if it is to be looked into."""
        function = run_by(function)
        inner = None if isinstance(function, type) else plain(function)
        if inner is None or is_in_torch(inner):
            return None
        return function

    def _attribute_called(self, function: ast.Attribute) -> tuple[Any, bool] | None:
        """``self.method``, ``self.child``, ``self.child.method``, ``super().method``."""
        owner, name = function.value, function.attr
        float_class = self._progress.float_class
        if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super":
            written = self._names.above
            above = None if written is None else getattr(super(written, float_class), name, None)
            return None if is_of_module(name) or plain(above) is None else (above, True)
        if not self._names.own or is_of_module(name):
            return None
        if self._names.is_own(owner):
            static = inspect.getattr_static(float_class, name, None)
            if isinstance(static, staticmethod):
                return static.__func__, False
            if plain(static) is not None:
                if self._names.layer == self._names.own:  # it is seen to as a method of the class
                    return None
                return static, True
            self._progress.called.add(name)
        elif isinstance(owner, ast.Attribute):
            self._progress.called.add(owner.attr)
        held = self._asked_function(function)
        if held is None:
            return None
        return held, _is_call(held) or (not isinstance(owner, ast.Name) and _takes_self(held))

    def parameters(self, node: ast.Call, target: Any, is_bound: bool) -> tuple[tuple[str, ...], str]:
        """Which parameters of a function get what is made of the layer's own tensors, and which the layer."""
        inner = plain(target)
        assert inner is not None
        names = list(inner.__code__.co_varnames[: inner.__code__.co_argcount])
        weights: list[str] = []
        own = ""
        if is_bound:
            first = names.pop(0) if names else ""
            weights.append(first)
            owner = node.func.value if isinstance(node.func, ast.Attribute) and not _is_call(inner) else None
            if isinstance(owner, ast.Call) or self._names.is_own(owner):
                own = first
        pairs: list[tuple[str, ast.expr]] = []
        for name, argument in zip(names, node.args, strict=False):
            if isinstance(argument, ast.Starred):
                break
            pairs.append((name, argument))
        pairs += [(k.arg, k.value) for k in node.keywords if k.arg is not None]
        for name, argument in pairs:
            if self._names.is_own(argument):
                own = own or name
            if not self._names.depends.depends(argument):
                weights.append(name)
        return tuple(weights), own


def _not_python(function: Any) -> str:
    """Why a function is not looked into, if it may multiply: it is not written in Python; else empty."""
    if any(function is known for known in _SPARSE):
        return "a product of sparse tensors, which no format takes"
    if isinstance(function, (torch._ops.OpOverloadPacket, torch._ops.OpOverload)):
        is_own = str(function).partition(".")[0] in _OWN_NAMESPACES
    elif isinstance(function, types.BuiltinFunctionType):
        package = str(function.__module__ or "torch").partition(".")[0]
        is_own = package in _COMPUTES_NO_PRODUCT or package in sys.stdlib_module_names
    else:
        is_own = not isinstance(function, CustomOpDef)
    return "" if is_own else "compiled code. Give its operands quantizers in a replacement of the class"


def _is_call(function: types.FunctionType) -> bool:
    """Whether a function is what runs when an object is called."""
    return function.__name__ == "__call__"


def _takes_self(function: types.FunctionType) -> bool:
    """Whether a function is a method, whose object comes first."""
    return function.__code__.co_varnames[:1] == ("self",) and "." in function.__qualname__
