"""What the names in a function mean, before it runs."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from quantpatch.layers.operations.dependence import Dependence
from quantpatch.layers.operations.source import codes
from quantpatch.layers.operations.syntax import assignments


class Names:
    """The names of one function.

    Args:
        function: The function, without its decorators.
        tree: The same, as it stands in its file.
        layer: The name of the parameter that it gets for the layer; None for a method, whose first it is.
        weights: Parameters that get what is made of the layer's own tensors.
        own: The one of them that is the layer; empty if none is.

    Attributes:
        own: What the function's own code calls the layer; empty if it does not know it.
        layer: The name by which the layer is found in it in any case.
        where: The function's name.
        above: The class that it was written in, as ``super()`` finds it; None for a plain function.
        depends: Which values in it depend on what it is called with.
        assigned: What is assigned to its variables.
        known: What those names mean that mean the same at each call.
    """

    def __init__(
        self,
        function: types.FunctionType,
        tree: ast.FunctionDef,
        *,
        layer: str | None,
        weights: tuple[str, ...],
        own: str,
    ) -> None:
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        first = arguments[0].arg if arguments else ""
        self.own = first if layer is None else own
        self.layer = layer or first
        self.where = function.__qualname__
        self.above = _owner_of(function)
        self.depends = Dependence(tree, {self.own, *weights})
        self.assigned = assignments(tree)
        captured = inspect.getclosurevars(function)
        # With those of inner functions, and those that inner functions see.
        variables = {n for c in codes(function.__code__) for n in (*c.co_varnames, *c.co_cellvars)}
        self.known: Mapping[str, Any] = _Without(
            {**captured.builtins, **function.__globals__, **captured.nonlocals}, variables
        )

    def is_own(self, node: ast.expr | None) -> bool:
        """Whether an expression is the layer itself."""
        return isinstance(node, ast.Name) and bool(self.own) and node.id == self.own

    def meaning(self, node: ast.expr) -> Any:
        """The object that a dotted name means, if it starts at a global name; else None."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.meaning(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, (types.ModuleType, type)) else None
        return None


def _owner_of(function: types.FunctionType) -> type | None:
    """The class that a method was written in, as ``super()`` finds it."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name == "__class__":
            owner: type = cell.cell_contents
            return owner
    return None


class _Without(Mapping[str, Any]):
    """A mapping without some of its keys."""

    def __init__(self, mapping: Mapping[str, Any], without: set[str]) -> None:
        self._mapping = mapping
        self._left_out = without

    def __getitem__(self, key: str) -> Any:
        if key in self._left_out:
            raise KeyError(key)
        return self._mapping[key]

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._mapping if key not in self._left_out)

    def __len__(self) -> int:
        return sum(1 for _ in self)
