"""Operands of the operations inside a forward, quantized without writing that forward again.

``out += identity`` or ``torch.matmul(q, k)`` belong to no layer, so no layer can be replaced to quantize
them. What can be is the function they stand in: its source is read, each operand of the operations in
question is handed through ``self.quantize_operand("name", operand)``, and the result is compiled as a
function of the same name, file and lines. Nothing is intercepted while a model runs, so ``torch.compile``,
``torch.export`` and threads see an ordinary function, and every place has quantizers of its own, known before
anything runs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import textwrap
import types
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch.nn import functional as F
from torch.overrides import get_testing_overrides

from quantpatch.errors import LayerError

#: Names of the operands to quantize, by operation; None leaves an operand float.
Operations = Mapping[Callable[..., Any], tuple[str | None, ...]]

_METHOD = "quantize_operand"
_BY_HAND = f'Write forward in the replacement, with self.{_METHOD}("name", x) around each operand'
_OPERATORS: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: torch.add,
    ast.Sub: torch.sub,
    ast.Mult: torch.mul,
    ast.Div: torch.div,
    ast.MatMult: torch.matmul,
}

# The axes that an operation sums over, which formats in blocks run along; elsewhere it is the feature axis.
_SUMMED: dict[Callable[..., Any], tuple[int, ...]] = {
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), (-1, -2)),
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.addbmm), (-1, -1, -2)),
    F.scaled_dot_product_attention: (-1, -1, -2),
}


@attrs.frozen
class Rewritten:
    """A class's functions with quantized operands.

    Attributes:
        functions: The functions that changed, by name; ``forward`` is one of them if it did.
        operands: Every operand with the axis of its features; None stands for the layer's own.
    """

    functions: Mapping[str, Any]
    operands: Mapping[str, int | None]


def rewrite(float_class: type, operations: Operations, *, demand: bool = True) -> Rewritten:
    """The forward of a class, and the methods it calls, with quantized operands.

    Where an operation is found more than once, the operands of the second place are ``name_1`` and so on.

    Args:
        float_class: The class.
        operations: The operations and the names of their operands.
        demand: Whether it is an error that there is none of the operations in it.

    Raises:
        LayerError: There is no such operation in it (``demand``), its source cannot be found, or an operand
            is hidden.
    """
    finder = _Finder(float_class, operations)
    functions: dict[str, Any] = {}
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop(0)
        function = getattr(float_class, name, None)
        inner = inspect.unwrap(function) if callable(function) else None
        if not isinstance(inner, types.FunctionType) or _is_of_torch(name):
            continue  # something else than a method written in Python, or torch's own
        rewriter = _Rewriter(finder, inner)
        made = rewriter.function()
        if made is not None:
            functions[name] = made
        waiting += [other for other in rewriter.methods if other not in seen]
        seen |= rewriter.methods
    if demand and not functions:
        wanted = " or ".join(_spelling(operation) for operation in operations)
        raise LayerError(
            f"{float_class.__qualname__}.forward, with the methods it calls, has no {wanted}: `operations` "
            f"would quantize nothing. Name what it does call, or the class whose forward does",
            layer=float_class,
        )
    return Rewritten(functions, finder.operands)


def _is_of_torch(name: str) -> bool:
    return name != "forward" and hasattr(torch.nn.Module, name)


def _spelling(operation: Callable[..., Any]) -> str:
    return getattr(operation, "__name__", str(operation))


class _Finder:
    """What is an operation in question, and how its operands are called."""

    def __init__(self, float_class: type, operations: Operations) -> None:
        self.float_class = float_class
        self.operands: dict[str, int | None] = {}
        self._operations = operations
        self._places: dict[int, int] = {}
        self._aliases: dict[Any, Callable[..., Any]] = {}
        self._methods: dict[str, Callable[..., Any]] = {}
        for operation in operations:
            name = _spelling(operation)
            self._aliases[operation] = operation
            for method in (name, f"{name}_", f"__{name}__"):
                if hasattr(torch.Tensor, method):
                    self._methods[method] = operation
                    self._aliases[getattr(torch.Tensor, method)] = operation
            if operation in _OPERATORS.values():
                spelled = "truediv" if operation is torch.div else name
                for form in (spelled, f"i{spelled}"):
                    self._aliases[getattr(operator, form)] = operation

    def called(self, function: Any) -> Callable[..., Any] | None:
        """The operation that a function is a spelling of."""
        try:
            return self._aliases.get(function)
        except TypeError:  # it has no hash
            return None

    def method(self, name: str) -> Callable[..., Any] | None:
        """The operation that a tensor's method is a spelling of."""
        return self._methods.get(name)

    def operator(self, kind: ast.operator) -> Callable[..., Any] | None:
        """The operation that an operator is a spelling of."""
        operation = _OPERATORS.get(type(kind))
        return operation if operation in self._operations else None

    def operands_of(self, operation: Callable[..., Any]) -> list[str | None]:
        """Names of the operands at one more place."""
        place = self._places[id(operation)] = self._places.get(id(operation), -1) + 1
        given = self._operations[operation]
        axes = _SUMMED.get(operation, (None,) * len(given))
        names = [name if name is None or not place else f"{name}_{place}" for name in given]
        self.operands.update((n, axis) for n, axis in zip(names, axes, strict=False) if n is not None)
        return names

    def count(self, operation: Callable[..., Any]) -> int:
        """How many operands of an operation have a name, or None for one."""
        return len(self._operations[operation])

    def parameters(self, operation: Callable[..., Any]) -> list[str]:
        """Names of an operation's parameters."""
        described = _signatures().get(operation, operation)
        try:
            return list(inspect.signature(described).parameters)
        except (TypeError, ValueError):
            return []

    def refuse(self, node: ast.expr | ast.stmt, why: str) -> LayerError:
        return LayerError(
            f"`{ast.unparse(node)}` in {self.float_class.__qualname__}: {why}. {_BY_HAND}",
            layer=self.float_class,
        )


@functools.cache
def _signatures() -> dict[Any, Any]:
    return dict(get_testing_overrides())


class _Rewriter(ast.NodeTransformer):
    """One function, rewritten."""

    def __init__(self, finder: _Finder, function: types.FunctionType) -> None:
        self.finder = finder
        self.methods: set[str] = set()
        self._function = function
        self._found = False
        self._tree = self._parsed()
        arguments = [*self._tree.args.posonlyargs, *self._tree.args.args]
        self._self = arguments[0].arg if arguments else ""
        captured = inspect.getclosurevars(function)
        self._scope = {**captured.builtins, **function.__globals__, **captured.nonlocals}
        # With those of inner functions, and those that inner functions see.
        self._locals = {n for c in _codes(function.__code__) for n in (*c.co_varnames, *c.co_cellvars)}

    def _parsed(self) -> ast.FunctionDef:
        function = self._function
        owner = self.finder.float_class
        try:
            lines, first = inspect.getsourcelines(function)
            tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
        except (OSError, TypeError, SyntaxError) as error:
            raise LayerError(
                f"`operations` needs the source of {owner.__qualname__}.{function.__name__}, which cannot be "
                f"read: {error}. {_BY_HAND}",
                layer=owner,
            ) from error
        if not isinstance(tree, ast.FunctionDef) or not _is_of(tree, function):
            raise LayerError(
                f"the source of {owner.__qualname__}.{function.__name__} is not what was imported: the file "
                f"has changed since. Start Python again",
                layer=owner,
            )
        _spell_private_names(tree, function)
        ast.increment_lineno(tree, first - 1)
        return tree

    def function(self) -> Any:
        """The function with quantized operands; None if it has none of the operations."""
        tree, function = self._tree, self._function
        tree.body = [part for statement in tree.body for part in _as_list(self.visit(statement))]
        if not self._found:
            return None
        tree.returns = None
        arguments = tree.args
        parts = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        for argument in [*parts, *filter(None, (arguments.vararg, arguments.kwarg))]:
            argument.annotation = None
        # Defaults are taken from the function as it is: their names may be those of a class body.
        arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
        arguments.kw_defaults = [d and ast.Constant(None) for d in arguments.kw_defaults]
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        factory = ast.parse(f"def factory({', '.join(cells)}):\n    return {tree.name}").body[0]
        assert isinstance(factory, ast.FunctionDef)
        factory.body.insert(0, tree)
        module = ast.fix_missing_locations(ast.Module([factory], []))
        namespace: dict[str, Any] = {}
        exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, namespace)
        made = namespace["factory"](*(cell.cell_contents for cell in cells.values()))
        inner = inspect.unwrap(made)
        inner.__defaults__, inner.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
        inner.__doc__, inner.__qualname__ = function.__doc__, function.__qualname__
        return made

    # --- the operations ------------------------------------------------------------------------

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """``x + y``."""
        operation = self.finder.operator(node.op)
        is_arithmetic = _is_number(node.left) or _is_number(node.right)
        self.generic_visit(node)  # first what is computed first
        if operation is not None and not is_arithmetic:
            left, right = self._named(operation, 2)
            node.left, node.right = self._quantized(left, node.left), self._quantized(right, node.right)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        """``x += y``: x is quantized first, and then added to in place, as it would have been."""
        operation = self.finder.operator(node.op)
        if operation is None or _is_number(node.value):
            return self.generic_visit(node)
        if any(isinstance(part, (ast.Call, ast.NamedExpr)) for part in ast.walk(node.target)):
            raise self.finder.refuse(
                node, "what is added to is found by a call, which must not be made twice"
            )
        left, right = self._named(operation, 2)
        node.value = self._quantized(right, node.value)
        if left is None:
            return self.generic_visit(node)
        target = ast.parse(ast.unparse(node.target), mode="eval").body
        before = ast.Assign([node.target], self._quantized(left, target))
        ast.copy_location(before, node)
        return [self.generic_visit(before), self.generic_visit(node)]

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """``torch.add(x, y)`` and ``x.add(y)``; also finds the methods that are called."""
        function = node.func
        found = self._resolved(function)
        operation, skipped = (None if found is None else self.finder.called(found)), 0
        if found is None and isinstance(function, ast.Attribute):
            if isinstance(function.value, ast.Name) and function.value.id == self._self:
                self.methods.add(function.attr)
            elif not self._is_attribute_of_self(function.value):
                operation, skipped = self.finder.method(function.attr), 1
        self.generic_visit(node)
        if operation is not None:
            self._wrap(node, operation, skipped)
        return node

    def _wrap(self, node: ast.Call, operation: Callable[..., Any], skipped: int) -> None:
        """Quantizes the operands of a call; of a method the first one is what it is called on."""
        hidden = [argument for argument in node.args if isinstance(argument, ast.Starred)]
        if hidden or any(keyword.arg is None for keyword in node.keywords):
            raise self.finder.refuse(node, "its operands may be hidden in a starred argument")
        parameters = self.finder.parameters(operation)
        if node.keywords and not parameters:
            raise self.finder.refuse(node, "it is not known which operand a keyword means")
        where: dict[int, tuple[Any, Any]] = {0: (node.func, "value")} if skipped else {}
        where |= {number + skipped: (node.args, number) for number in range(len(node.args))}
        where |= {parameters.index(k.arg): (k, "value") for k in node.keywords if k.arg in parameters}
        count = self.finder.count(operation)
        if any(number < count and _is_number(_get(*place)) for number, place in where.items()):
            return
        for number, name in enumerate(self._named(operation, count)):
            if number in where:
                _set(*where[number], self._quantized(name, _get(*where[number])))

    def _named(self, operation: Callable[..., Any], count: int) -> list[str | None]:
        self._found = True
        return [*self.finder.operands_of(operation), *[None] * count][:count]

    def _quantized(self, name: str | None, operand: ast.expr) -> ast.expr:
        if name is None:
            return operand
        method = ast.Attribute(ast.Name(self._self, ast.Load()), _METHOD, ast.Load())
        return ast.copy_location(ast.Call(method, [ast.Constant(name), operand], []), operand)

    # --- names ---------------------------------------------------------------------------------

    def _resolved(self, node: ast.expr) -> Any:
        """The object that a dotted name means, if it starts at a global name; else None."""
        if isinstance(node, ast.Name):
            return None if node.id in self._locals else self._scope.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._resolved(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, (types.ModuleType, type)) else None
        return None

    def _is_attribute_of_self(self, node: ast.expr) -> bool:
        """``self.a.b``: a module more likely than a tensor."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id == self._self


def _spell_private_names(tree: ast.FunctionDef, function: types.FunctionType) -> None:
    """Writes ``self.__x`` as Python does inside a class, where the function no longer is."""
    parts = function.__qualname__.split(".")
    owner = parts[-2].lstrip("_") if len(parts) > 1 else ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("__") and not node.attr.endswith("__"):
            node.attr = f"_{owner}{node.attr}"


def _get(owner: Any, key: Any) -> Any:
    return owner[key] if isinstance(owner, list) else getattr(owner, key)


def _set(owner: Any, key: Any, value: Any) -> None:
    if isinstance(owner, list):
        owner[key] = value
    else:
        setattr(owner, key, value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_of(tree: ast.FunctionDef, function: types.FunctionType) -> bool:
    """Whether a function was compiled from a source, as far as its names show."""
    code = function.__code__
    arguments = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args)]
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    known = {name for c in _codes(code) for name in c.co_names}
    return (
        tree.name == function.__name__
        and arguments == list(code.co_varnames[: code.co_argcount])
        and all(name in known or name.startswith("__") for name in attributes - _in_signature(tree))
    )


def _in_signature(tree: ast.FunctionDef) -> set[str]:
    """Attributes in decorators, defaults and annotations, which are not part of a function's code."""
    outside = [*tree.decorator_list, tree.args, *([tree.returns] if tree.returns else [])]
    return {n.attr for part in outside for n in ast.walk(part) if isinstance(n, ast.Attribute)}


def _codes(code: types.CodeType) -> list[types.CodeType]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [code, *(each for part in inner for each in _codes(part))]


def _is_number(node: ast.expr) -> bool:
    """Whether an operand is plainly no tensor: a constant, a size, a display."""
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str)  # which says how to multiply, in einsum
    if isinstance(node, (ast.JoinedStr, ast.Tuple, ast.List, ast.Dict, ast.Set)):
        return True
    if isinstance(node, ast.UnaryOp):
        return _is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return _is_number(node.left) and _is_number(node.right)
    if isinstance(node, ast.Subscript):
        return _is_number(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr in ("shape", "ndim")
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in ("size", "dim", "numel", "len", "int", "float", "range", "item")
    return False
