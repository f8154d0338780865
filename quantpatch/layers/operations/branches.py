"""Which branches of a function run, as far as that is known once the layer is built."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, TypeVar

from quantpatch.layers.operations.facts import still
from quantpatch.layers.operations.names import Names
from quantpatch.layers.operations.progress import Progress
from quantpatch.layers.operations.syntax import as_list, call, read
from quantpatch.layers.operations.table import Wanted

_STILL = "_still"
_Choice = TypeVar("_Choice", ast.If, ast.IfExp)


class Branches(ast.NodeTransformer):
    """Changes those parts of a function that run; of a branch that cannot, nothing is changed.

    Args:
        work: Of the class.
        names: What names mean in the function.

    Attributes:
        given: Objects that the changed tree uses, by names that are its own.
        changed: Whether anything changed.
    """

    def __init__(self, work: Progress, names: Names) -> None:
        self.given: dict[str, Any] = {}
        self.changed = False
        self._work = work
        self._names = names

    def statements(self, body: list[ast.stmt]) -> list[Any]:
        """A body, changed; what is behind the end of a branch that is sure to run is left as it is."""
        done: list[Any] = []
        for number, statement in enumerate(body):
            if isinstance(statement, ast.If) and (is_true := self._is_true(statement.test)) is not None:
                live = statement.body if is_true else statement.orelse
                ends = bool(live) and isinstance(live[-1], (ast.Return, ast.Raise))
                rest = body[number + 1 :]
                done.append(self._branch(statement, is_true, rest if ends else []))
                if ends:
                    return done + rest
            else:
                done += as_list(self.visit(statement))
        return done

    def _is_true(self, test: ast.expr) -> bool | None:
        return self._work.asked.is_true(test, self._names.known, self._names.own, self._names.where)

    def _branch(self, node: ast.If, is_true: bool, rest: list[ast.stmt]) -> ast.If:
        """A condition whose value is known: the branch that cannot run is left as it is."""
        live, dead = (node.body, node.orelse) if is_true else (node.orelse, node.body)
        visited = self.statements(live)
        node.body, node.orelse = (visited, dead) if is_true else (dead, visited)
        return self._guarded(node, is_true, [*dead, *rest])

    def _guarded(self, node: _Choice, is_true: bool, dead: Sequence[ast.AST]) -> _Choice:
        """Has a choice say when what multiplies in a branch without quantizers runs after all."""
        if _Multiplies(self._names, self._work.wanted).any(dead):
            self.given[_STILL] = still
            expression = ast.Constant(ast.unparse(node.test))
            node.test = call(_STILL, node.test, ast.Constant(is_true), read(self._names.layer), expression)
            self.changed = True
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visits what a node is made of, in place, and bodies as such."""
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.AST):
                setattr(node, field, self.visit(value))
            elif isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                value[:] = self.statements(value)
            elif isinstance(value, list):
                value[:] = [self.visit(part) if isinstance(part, ast.AST) else part for part in value]
        return node

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        """The same of an expression."""
        is_true = self._is_true(node.test)
        if is_true is None:
            return self.generic_visit(node)
        dead = node.orelse if is_true else node.body
        if is_true:
            node.body = self.visit(node.body)
        else:
            node.orelse = self.visit(node.orelse)
        return self._guarded(node, is_true, [dead])


class _Multiplies(ast.NodeVisitor):
    """Whether code that is not rewritten has one of the operations."""

    def __init__(self, names: Names, wanted: Wanted) -> None:
        self._names = names
        self._wanted = wanted
        self._found = False

    def any(self, nodes: Sequence[ast.AST]) -> bool:
        for node in nodes:
            self.visit(node)
        return self._found

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self._found |= self._wanted.operator(type(node.op).__name__) is not None
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        found = self._names.meaning(node.func)
        self._found |= found is not None and self._wanted.called(found) is not None
        if found is None and isinstance(node.func, ast.Attribute):
            self._found |= self._wanted.method(node.func.attr) is not None
        self.generic_visit(node)
