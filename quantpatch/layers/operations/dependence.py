"""Which values in a function are made of a layer's own tensors alone, and so are weights."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

# What of a tensor says nothing of its values.
_OF_SHAPE = {"shape", "device", "dtype", "ndim", "requires_grad"}
_ASKED_OF_SHAPE = {"size", "dim", "numel", "stride", "is_floating_point"}


class Dependence:
    """Which names in a function depend on what it is called with.

    Args:
        tree: The function.
        independent: Those of its parameters that do not: the layer, and what a caller makes of its weights.
    """

    def __init__(self, tree: ast.FunctionDef, independent: Iterable[str]) -> None:
        self._names = _parameters(tree.args) - set(independent)
        self._attributes: set[str] = set()
        for inner in ast.walk(tree):
            if isinstance(inner, (ast.FunctionDef, ast.Lambda)) and inner is not tree:
                self._names |= _parameters(inner.args)
        bound = list(_bindings(tree))
        changed = True
        while changed:  # a loop hands values back
            changed = False
            for targets, value in bound:
                if not self.depends(value):
                    continue
                new = [self._note(target) for target in targets]  # each of them
                changed |= any(new)

    def _note(self, target: ast.expr) -> bool:
        """Notes what is bound; whether that is new."""
        match target:
            case ast.Tuple() | ast.List():
                new = [self._note(part) for part in target.elts]
                return any(new)
            case ast.Starred() | ast.Subscript():
                return isinstance(target.value, ast.Name) and self._note(target.value)
            case ast.Name(id=name):
                known = self._names
            case ast.Attribute(attr=name):
                known = self._attributes
            case _:
                return False
        is_new = name not in known
        known.add(name)
        return is_new

    def depends(self, node: ast.AST | None) -> bool:
        """Whether a value does."""
        if node is None:
            return False
        if isinstance(node, ast.Name):
            return node.id in self._names
        if isinstance(node, ast.Attribute):
            if node.attr in _OF_SHAPE:
                return False
            return node.attr in self._attributes or self.depends(node.value)
        if isinstance(node, ast.Call):
            asked = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if asked in _ASKED_OF_SHAPE or asked == "len":
                return False
        return any(self.depends(child) for child in ast.iter_child_nodes(node))


def _parameters(arguments: ast.arguments) -> set[str]:
    several = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    return {argument.arg for argument in several if argument is not None}


def _bindings(tree: ast.AST) -> Iterator[tuple[list[ast.expr], ast.expr | None]]:
    """Whatever gives values to names, with the values."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign():
                if (
                    len(node.targets) == 1
                    and isinstance(node.targets[0], ast.Tuple)
                    and isinstance(node.value, ast.Tuple)
                    and len(node.targets[0].elts) == len(node.value.elts)
                ):
                    for target, value in zip(node.targets[0].elts, node.value.elts, strict=True):
                        yield [target], value
                else:
                    yield node.targets, node.value
            case ast.AnnAssign() | ast.AugAssign() | ast.NamedExpr():
                yield [node.target], node.value
            case ast.For() | ast.comprehension():
                yield [node.target], node.iter
            case ast.withitem() if node.optional_vars is not None:
                yield [node.optional_vars], node.context_expr
            case ast.Call(func=ast.Attribute(value=ast.Name() as owner, attr="append" | "extend" | "insert")):
                yield [owner], ast.Tuple([*node.args], ast.Load())
