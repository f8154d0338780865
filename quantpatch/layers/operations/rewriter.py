"""Operands of the operations inside a forward, quantized without writing that forward again.

``out += identity`` or ``torch.matmul(q, k)`` belong to no layer, so no layer can be replaced to quantize
them. What can be is the function they stand in: its source is read, each operand of the operations in
question is handed through ``self.quantize_operand("name", operand)``, and the result is compiled as a
function of the same name, file and lines. So is every function that it calls, a method of the class or a
helper anywhere. Nothing is intercepted while a model runs, so ``torch.compile``, ``torch.export`` and threads
see ordinary functions, and every place has quantizers of its own, known before anything runs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch.nn import functional as F

from quantpatch.errors import LayerError
from quantpatch.layers.operations.arguments import in_order
from quantpatch.layers.operations.branches import Branches
from quantpatch.layers.operations.callees import Callees, is_of_module
from quantpatch.layers.operations.decorators import decorated
from quantpatch.layers.operations.facts import Asked, calling
from quantpatch.layers.operations.names import Names
from quantpatch.layers.operations.progress import InnerOperand, Progress, Rewritten
from quantpatch.layers.operations.running import attend_quantized, quantized, quantized_weight
from quantpatch.layers.operations.source import Unreadable, compiled, parsed, plain
from quantpatch.layers.operations.syntax import call, equation, get, is_number, put, read
from quantpatch.layers.operations.table import Operand, Wanted, quantizer_name, spelling

_QUANTIZE, _QUANTIZE_WEIGHT, _ATTEND = "_quantized", "_quantized_weight", "_attend"
_LAYER, _PARTIAL = "_layer", "_partial"
# How deep helpers may call helpers.
_DEPTH = 12


def rewrite(
    float_class: type, wanted: Wanted, asked: Asked | None = None, *, demand: bool = False
) -> Rewritten:
    """The forward of a class, and all that it calls, with quantized operands.

    Args:
        float_class: The class.
        wanted: The operations and the names of their operands.
        asked: What is known of a layer of the class.
        demand: Whether it is an error that there is none of the operations in it, or that it cannot be read.

    Raises:
        LayerError: (``demand``) There is no such operation in it, its source cannot be found, or an operand
            is hidden.
    """
    work = _Work(float_class, wanted, asked or Asked(None), demand)
    functions: dict[str, Any] = {}
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop(0)
        function = getattr(float_class, name, None)
        if plain(function) is None or is_of_module(name):
            continue  # something else than a method written in Python, or torch's own
        made, methods = work.method(function)
        if made is not None:
            functions[name] = made
        waiting += [other for other in methods if other not in seen]
        seen |= methods
    if demand and not functions:
        names = " or ".join(spelling(operation) for operation in wanted.operations)
        raise LayerError(
            f"{float_class.__qualname__}.forward, with the methods it calls, has no {names}: `operations` "
            f"would quantize nothing. Name what it does call, or the class whose forward does",
            layer=float_class,
        )
    read_only = tuple(sorted(work.read - work.called))
    return Rewritten(functions, work.operands, read_only, tuple(dict.fromkeys(work.hidden)))


class _Work(Progress):
    """The rewriting of one class, function by function."""

    def __init__(self, float_class: type, wanted: Wanted, asked: Asked, demand: bool) -> None:
        super().__init__(float_class, wanted, asked)
        self._demand = demand
        self._stack: list[types.FunctionType] = []
        self._barren: set[types.FunctionType] = set()  # functions in which nothing changes

    def method(self, function: Any) -> tuple[Any, set[str]]:
        """A method of the class, remade (None if nothing changes), and the methods that it uses."""
        inner = plain(function)
        assert inner is not None
        before = dict(self.operands)
        try:
            function_of = _Function(self, function, inner)
            return function_of.remade(), function_of.methods
        except Unreadable as error:
            if self._demand:
                raise
            self.operands = before  # those that it found are of code that does not run
            self.hide(inner, error)
            return None, set()

    def helper(self, function: Any, weights: tuple[str, ...], own: str) -> Any:
        """A function that is called, remade to take the layer; None if nothing in it changes.

        Args:
            function: The function, with its decorators.
            weights: Parameters that get what is made of the layer's own tensors.
            own: The one that gets the layer; empty if none does.
        """
        inner = plain(function)
        if inner is None or inner in self._stack or inner in self._barren or len(self._stack) >= _DEPTH:
            return None
        made = None
        if self.may_multiply(inner):
            before = dict(self.operands)
            self._stack.append(inner)
            try:
                made = _Function(self, function, inner, layer=_LAYER, weights=weights, own=own).remade()
            except Unreadable as error:
                if self._demand:
                    raise
                self.operands = before
                self.hide(inner, error)
            finally:
                self._stack.pop()
        if made is None:
            self._barren.add(inner)
        return made


class _Function(Branches):
    """One function, rewritten.

    Args:
        work: Of the class.
        function: The function, with its decorators.
        inner: Without them.
        layer: The name of the parameter that it gets for the layer; None for a method, whose first it is.
        weights: Parameters of a helper that are made of the layer's own tensors.
        own: The one of them that is the layer; empty if none is.
    """

    def __init__(
        self,
        work: _Work,
        function: Any,
        inner: types.FunctionType,
        *,
        layer: str | None = None,
        weights: tuple[str, ...] = (),
        own: str = "",
    ) -> None:
        self._tree = parsed(inner, work.float_class)
        super().__init__(work, Names(inner, self._tree, layer=layer, weights=weights, own=own))
        self.methods: set[str] = set()
        self._work: _Work = work
        self._function = function
        self._inner = inner
        self._callees = Callees(work, self._names)

    def remade(self) -> Any:
        """The function with quantized operands; None if nothing changes."""
        tree = self._tree
        tree.body = self.statements(tree.body)
        if not self.changed:
            return None
        takes = _LAYER if self._names.layer == _LAYER else None
        made = compiled(self._inner, tree, self.given, takes=takes)
        return decorated(self._function, made, takes, self._work.float_class)

    # --- the operations ------------------------------------------------------------------------

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """``x + y``."""
        operation = self._work.wanted.operator(type(node.op).__name__)
        is_arithmetic = is_number(node.left) or is_number(node.right)
        weights = self._are_weights([node.left, node.right])
        self.generic_visit(node)  # first what is computed first
        if operation is not None and not is_arithmetic:
            for position, name, _ in self._place(operation, (0, 1), weights):
                if position == 0:
                    node.left = self._quantized(name, node.left)
                else:
                    node.right = self._quantized(name, node.right)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        """``x += y``: x is quantized first, and then added to in place, as it would have been."""
        operation = self._work.wanted.operator(type(node.op).__name__)
        if operation is None or is_number(node.value):
            return self.generic_visit(node)
        if any(isinstance(part, (ast.Call, ast.NamedExpr)) for part in ast.walk(node.target)):
            raise self._work.refuse(node, "what is added to is found by a call, which must not be made twice")
        weights = self._are_weights([node.target, node.value])
        names = {position: name for position, name, _ in self._place(operation, (0, 1), weights)}
        if 1 in names:
            node.value = self._quantized(names[1], node.value)
        if 0 not in names:
            return self.generic_visit(node)
        target = ast.parse(ast.unparse(node.target), mode="eval").body
        before = ast.Assign([node.target], self._quantized(names[0], target))
        ast.copy_location(before, node)
        return [self.generic_visit(before), self.generic_visit(node)]

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """``torch.add(x, y)``, ``x.add(y)``, and calls of functions that may have such inside."""
        function = node.func
        found = self._names.meaning(function)
        if found is torch.backends.mha.get_fastpath_enabled:  # which has no operands to quantize
            return ast.copy_location(ast.Constant(False), node)
        operation, skipped = (None if found is None else self._work.wanted.called(found)), 0
        if found is None and isinstance(function, ast.Attribute) and not self._is_part(function.value):
            operation, skipped = self._work.wanted.method(function.attr), 1
        given = in_order(node, operation, skipped, self._work) if operation is not None else {}
        weights = {n for n, place in given.items() if not self._names.depends.depends(get(*place))}
        target = self._callees.target(node, found) if operation is None else None
        parameters = () if target is None else self._callees.parameters(node, *target)
        handed = [] if operation is not None else self._callees.handed_on(node, found)
        self.generic_visit(node)
        for owner, key, handed_function in handed:
            copy = self._work.helper(handed_function, (), "")
            if copy is not None:
                put(owner, key, self._partial(get(owner, key), handed_function, copy))
        if operation is not None:
            return self._wrapped(node, operation, given, weights)
        if target is not None:
            copy = self._work.helper(target[0], *parameters)
            if copy is not None:
                return self._exchanged(node, target[0], copy)
        return node

    def _wrapped(
        self, node: ast.Call, operation: Any, given: dict[int, tuple[Any, Any]], weights: set[int]
    ) -> ast.AST:
        """Quantizes the operands of a call, or its result."""
        known = self._work.wanted.operations[operation]
        count = len(known.operands)
        if any(n < count and known.operands[n] and is_number(get(*place)) for n, place in given.items()):
            return node
        axes = None if known.equation is None else equation(node, known.equation)
        placed = self._place(operation, given, weights, axes)
        if known.of_result:
            return self._quantized(placed[0][1], node)
        names = {position: name for position, name, _ in placed}
        if operation is F.scaled_dot_product_attention and names.get(3):
            operands = [ast.Constant(quantizer_name(names[n]) if n in names else None) for n in range(4)]
            self.given[_ATTEND] = attend_quantized
            called = call(_ATTEND, read(self._names.layer), ast.Tuple([*operands], ast.Load()), *node.args)
            called.keywords = node.keywords
            return ast.copy_location(called, node)
        for position, name in names.items():
            if position in given:
                put(*given[position], self._quantized(name, get(*given[position])))
        return node

    def _place(
        self,
        operation: Callable[..., Any],
        given: Any,
        weights: set[int],
        axes: Mapping[int, Operand] | None = None,
    ) -> list[tuple[int, str, Operand]]:
        placed = self._work.wanted.place(operation, given)
        for position, name, operand in placed:
            operand = (axes or {}).get(position, operand)
            is_weight = position in weights and not self._work.wanted.is_named(operation)
            known = self._work.wanted.operations[operation]
            self._work.operands[name] = InnerOperand(known.name, operand, is_weight)
        self.changed |= bool(placed)
        return placed

    def _are_weights(self, operands: list[ast.expr]) -> set[int]:
        return {n for n, operand in enumerate(operands) if not self._names.depends.depends(operand)}

    def _quantized(self, name: str, operand: Any) -> ast.expr:
        inner = self._work.operands[name]
        is_weight = inner.is_weight
        if is_weight and self._work.asked.is_vector(operand, self._names.own, self._names.where):
            one_axis = attrs.evolve(inner.operand, channels=None, summed=-1)
            self._work.operands[name] = attrs.evolve(inner, operand=one_axis)
        function = _QUANTIZE_WEIGHT if is_weight else _QUANTIZE
        self.given[function] = quantized_weight if is_weight else quantized
        called = call(function, read(self._names.layer), ast.Constant(quantizer_name(name)), operand)
        return ast.copy_location(called, operand)

    # --- functions that are called -------------------------------------------------------------

    def _calling(self, target: Any, copy: Any) -> str:
        name = f"_calling_{len(self.given)}"
        self.given[name] = calling(getattr(target, "__func__", target), copy)
        self.changed = True
        return name

    def _partial(self, function: ast.expr, target: Any, copy: Any) -> ast.expr:
        """A function that is handed on, to be called by others."""
        self.given[_PARTIAL] = functools.partial
        made = call(_PARTIAL, read(self._calling(target, copy)), function, read(self._names.layer))
        return ast.copy_location(made, function)

    def _exchanged(self, node: ast.Call, target: Any, copy: Any) -> ast.Call:
        called = call(self._calling(target, copy), node.func, read(self._names.layer))
        called.args += node.args
        called.keywords = node.keywords
        return ast.copy_location(called, node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """``self.fc.weight`` and ``self.method``, handed on to be called."""
        owner = node.value
        match owner:
            case ast.Attribute(attr=child) if self._names.is_own(owner.value) and node.attr == "weight":
                self._work.read.add(child)
        if self._names.is_own(owner) and self._names.own == self._names.layer:
            static = inspect.getattr_static(self._work.float_class, node.attr, None)
            if not isinstance(static, staticmethod) and plain(static) is not None:
                self.methods.add(node.attr)
        return self.generic_visit(node)

    def _is_part(self, node: ast.expr) -> bool:
        """``self.a.b``: a module, or something else of the layer that is not a tensor."""
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        if not self._names.is_own(root):
            return False
        return not self._work.asked.is_tensor(node, self._names.own, self._names.where)
