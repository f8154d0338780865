"""What is known of a layer once it is built, by the expressions that its forward asks: ``self.fused_attn``.

Which branch of a forward runs, and which function a variable holds, often hangs on attributes alone. Those
are looked up when the layer is there. What was found goes into the layer's class, so that a copy or a pickle
is made of the same; where an attribute is changed afterwards, the layer says so when it runs.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from quantpatch.errors import warn_caller
from quantpatch.layers.operations.source import Unreadable, is_in_torch, parsed, plain, run_by
from quantpatch.layers.operations.table import NAMES
from quantpatch.torch_tools.class_swap import dotted

#: Expressions with what they gave: truth, or the name of a function.
Facts = Mapping[str, bool | str]

UNKNOWN: Final = object()
#: Functions and methods that only look something up.
ASKING = {isinstance, hasattr, getattr, callable, len, bool, torch.jit.is_scripting}  # type: ignore[attr-defined]
LOOKUPS = {"get", "get_interface"}
# What a layer says of itself that is another thing at each call.
_CHANGING = {"training"}


class Asked:
    """The questions that the code of a class asks of a layer, with their answers.

    Args:
        layer: A layer of the class that is built; None where the answers are known from an earlier one.
        facts: Those answers.

    Attributes:
        answers: By question; None for one that has no answer before the layer runs.
    """

    def __init__(self, layer: nn.Module | None, facts: Facts | None = None) -> None:
        self.answers: dict[str, bool | str | None] = dict(facts or {})
        self._layer = layer
        self._again: dict[str, Callable[[nn.Module], bool | str | None]] = {}

    @property
    def facts(self) -> Facts:
        """The answers that there are."""
        return {question: answer for question, answer in self.answers.items() if answer is not None}

    def has_same(self, layer: nn.Module) -> bool:
        """Whether another layer gives the same answers."""
        return all(ask(layer) == self.answers[question] for question, ask in self._again.items())

    def _ask(
        self,
        question: str,
        node: ast.expr,
        scope: Mapping[str, Any],
        of: str,
        answer: Callable[[Any], bool | str | None],
    ) -> bool | str | None:
        if question not in self.answers:
            if self._layer is None:
                return None

            def ask(layer: nn.Module) -> bool | str | None:
                value = evaluated(node, {**scope, of: layer} if of else scope)
                return None if value is UNKNOWN else answer(value)

            self._again[question] = ask
            self.answers[question] = ask(self._layer)
        return self.answers[question]

    def is_true(self, node: ast.expr, scope: Mapping[str, Any], of: str, where: str) -> bool | None:
        """Whether a condition holds; None where that is not known.

        Args:
            node: The condition.
            scope: Names that mean the same at each call.
            of: The name of the parameter that is the layer.
            where: The function that it stands in.
        """
        known = self._ask(f"{where}: {ast.unparse(node)}", copy.deepcopy(node), scope, of, _truth)
        return known if isinstance(known, bool) else None

    def is_tensor(self, node: ast.expr, of: str, where: str) -> bool:
        """Whether an expression is known to give a tensor."""
        question = f"{where}: is_tensor({ast.unparse(node)})"
        tensor = torch.Tensor
        return self._ask(question, copy.deepcopy(node), {}, of, lambda x: isinstance(x, tensor)) is True

    def is_vector(self, node: ast.expr, of: str, where: str) -> bool:
        """Whether an expression is known to give a tensor of one axis, which has no output channels."""
        question = f"{where}: is_vector({ast.unparse(node)})"

        def answer(x: Any) -> bool | None:
            return (isinstance(x, torch.Tensor) and not is_lazy(x) and x.dim() < 2) or None

        return self._ask(question, copy.deepcopy(node), {}, of, answer) is True

    def function(self, node: ast.expr, scope: Mapping[str, Any], of: str, where: str) -> Any:
        """The function that an expression gives, if that is one that a pickle can name; else None."""
        stands_for, its_scope = unfolded(node, scope)
        known = self._ask(
            f"{where}: {ast.unparse(node)}", copy.deepcopy(stands_for), its_scope, of, _function_name
        )
        return _found(known) if isinstance(known, str) else None

    def unnamed(self, node: ast.expr, of: str) -> types.FunctionType | None:
        """The function that an attribute of the layer holds, if no pickle can name it."""
        value = UNKNOWN if self._layer is None or not of else evaluated(node, {of: self._layer})
        value = run_by(value)
        return value if isinstance(value, types.FunctionType) and _function_name(value) is None else None


def _truth(value: Any) -> bool | None:
    lasting = (bool, int, float, str, nn.Module, types.FunctionType, type(None))
    return bool(value) if isinstance(value, lasting) else None


def _function_name(value: Any) -> str | None:
    value = run_by(value)
    if not isinstance(value, types.FunctionType):
        return None
    name = _name(value)
    return name if _found(name) is value else None


def _name(function: types.FunctionType) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _found(name: str) -> Any:
    module, _, path = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = (
            inspect.getattr_static(value, part, None)
            if isinstance(value, type)
            else getattr(value, part, None)
        )
    return getattr(value, "__func__", value)


def evaluated(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    """The value of an expression that only looks things up; ``UNKNOWN`` for any other."""
    try:
        return _value(node, scope)
    except _Unknown:
        return UNKNOWN
    except Exception:  # properties of others, asked at another time than they expect
        return UNKNOWN


def unfolded(node: ast.expr, scope: Mapping[str, Any]) -> tuple[ast.expr, Mapping[str, Any]]:
    """What an expression stands for, with the names in it.

    A call without arguments stands for what the function returns, if that is all that it does, as those that
    look something up; an item of such a call for its part of it.

    Args:
        node: The expression.
        scope: Names that mean the same at each call.
    """
    item = node.slice if isinstance(node, ast.Subscript) else None
    call = node.value if isinstance(node, ast.Subscript) else node
    if not (isinstance(call, ast.Call) and not call.args and not call.keywords):
        return node, scope
    function = evaluated(call.func, scope)
    inner = plain(function)
    returned = None if inner is None or is_in_torch(inner) else _returned(inner)
    if inner is None or returned is None:
        return node, scope
    owner = getattr(function, "__self__", None)
    its_own = {} if owner is None else {inner.__code__.co_varnames[0]: owner}
    if isinstance(returned, ast.Tuple) and isinstance(item, ast.Constant) and isinstance(item.value, int):
        returned, item = returned.elts[item.value], None
    part = returned if item is None else ast.Subscript(returned, item, ast.Load())
    return part, {**inner.__globals__, **its_own}


def _returned(function: types.FunctionType) -> ast.expr | None:
    """What a function returns that does nothing else."""
    try:
        *described, last = parsed(function, function).body
    except Unreadable:
        return None
    does_more = any(not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in described)
    return last.value if isinstance(last, ast.Return) and not does_more else None


class _Unknown(Exception):
    pass


def _value(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            if node.id in scope:
                return scope[node.id]
        case ast.Attribute() if node.attr not in _CHANGING:
            return getattr(_value(node.value, scope), node.attr)
        case ast.Subscript():
            owner = _value(node.value, scope)
            if not isinstance(owner, torch.Tensor):
                return owner[_value(node.slice, scope)]
        case ast.UnaryOp(op=ast.Not()):
            return not _plain(_value(node.operand, scope))
        case ast.BoolOp():
            return _of_several(node, scope)
        case ast.Compare():
            return _compared(node, scope)
        case ast.IfExp():
            return _value(node.body if _plain(_value(node.test, scope)) else node.orelse, scope)
        case ast.Call(keywords=[]):
            return _called(node, scope)
    raise _Unknown


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        raise _Unknown
    return value


def _of_several(node: ast.BoolOp, scope: Mapping[str, Any]) -> Any:
    """``and`` and ``or``, where one operand may decide though another is not known."""
    stops = isinstance(node.op, ast.Or)
    value, unknown = None, False
    for operand in node.values:
        value = evaluated(operand, scope)
        if value is UNKNOWN or isinstance(value, torch.Tensor):
            unknown = True
        elif bool(value) is stops:
            return value
    if unknown:
        raise _Unknown
    return value


_COMPARED: dict[type[ast.cmpop], Any] = {
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Gt: lambda a, b: a > b,
    ast.Lt: lambda a, b: a < b,
    ast.GtE: lambda a, b: a >= b,
    ast.LtE: lambda a, b: a <= b,
}


def _compared(node: ast.Compare, scope: Mapping[str, Any]) -> bool:
    if len(node.ops) != 1:
        raise _Unknown
    left, right = _value(node.left, scope), _value(node.comparators[0], scope)
    if not isinstance(node.ops[0], (ast.Is, ast.IsNot)):
        left, right = _plain(left), _plain(right)
    return bool(_COMPARED[type(node.ops[0])](left, right))


def _called(node: ast.Call, scope: Mapping[str, Any]) -> Any:
    function = _value(node.func, scope)
    is_lookup = isinstance(node.func, ast.Attribute) and node.func.attr in LOOKUPS
    if not (is_lookup or function in ASKING):
        raise _Unknown
    return function(*(_value(argument, scope) for argument in node.args))


# --- while the layer runs ----------------------------------------------------------------------


def still(value: Any, known: bool, layer: Any, expression: str) -> Any:
    """A condition's value at a call; reports one that was another when the layer was built.

    Warns:
        QuantPatchWarning: What runs now has no quantizers.
    """
    if bool(value) is not known and not torch.compiler.is_compiling():
        _report(layer, f"`{expression}` was {known} when it was quantized and is {bool(value)} now")
    return value


def calling(known: Any, instead: Any) -> Any:
    """What a call of a function becomes: one of its like with quantized operands, for the layer.

    Args:
        known: The function that is called.
        instead: The other, which takes the layer as ``_layer``.
    """

    def call(called: Any, layer: Any, /, *args: Any, **kwargs: Any) -> Any:
        function = getattr(called, "__func__", called)
        if known is type(called).__call__:
            function = known
        if function is not known:
            if not torch.compiler.is_compiling():
                _report(
                    layer, f"it called {_shown(known)} when it was quantized and calls {_shown(function)} now"
                )
            return called(*args, **kwargs)
        if function is not called:  # a method, with the object that it is of, or an object's call
            args = (getattr(called, "__self__", called), *args)
        return instead(*args, **kwargs, _layer=layer)

    return call


def report_unquantized(layer: Any, name: str, value: torch.Tensor) -> None:
    """Reports an operand of a product that no format takes; numbers to be added or joined are none.

    Warns:
        QuantPatchWarning: It stays as it is.
    """
    operand = name.removesuffix("_quantizer")
    inner = type(layer)._inner.get(operand)
    if inner is None or not NAMES.get(inner.operation) or torch.compiler.is_compiling():
        return
    kind = str(value.dtype if value.layout is torch.strided else value.layout).removeprefix("torch.")
    place = operand.removesuffix(f"_{inner.operand.role}")
    _report_once(
        layer,
        f"{place} multiplies tensors of {kind}, which no format takes, and they stay as they are. To leave "
        f"it float write operations={{{type(layer).float_class.__name__!r}: {{{inner.operation!r}: None}}}}",
    )


def _shown(function: Any) -> str:
    return dotted(function) if hasattr(function, "__qualname__") else repr(function)


_reported: set[tuple[type, str]] = set()


def _report(layer: Any, what: str) -> None:
    _report_once(layer, f"{what}. What it computes there is float; build or convert it anew")


def _report_once(layer: Any, what: str) -> None:
    key = (type(layer), what)
    if key not in _reported:
        _reported.add(key)
        warn_caller(f"{type(layer).__name__}: {what}")
