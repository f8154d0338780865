"""Pieces of syntax trees: what is read off them, and what is put into them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from quantpatch.layers.operations.table import Operand


def is_number(node: ast.expr) -> bool:
    """Whether an operand is plainly no tensor: a constant, a size, a display."""
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str)  # which says how to multiply, in einsum
    if isinstance(node, (ast.JoinedStr, ast.Dict, ast.Set)):
        return True
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    if isinstance(node, ast.Subscript):
        return is_number(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr in ("shape", "ndim")
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):  # .float() and .int() of a tensor are tensors
            return node.func.attr in ("size", "dim", "numel", "item")
        return isinstance(node.func, ast.Name) and node.func.id in ("len", "int", "float", "range")
    return False


def assignments(tree: ast.AST) -> dict[str, list[ast.expr]]:
    """What is assigned to plain names, in their order."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for name, value in _unpacked(target, node.value):
                    found.setdefault(name, []).append(value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found.setdefault(node.target.id, []).append(node.value)
    return found


def _unpacked(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """The names in a target of an assignment, each with what it gets."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple) and not any(isinstance(part, ast.Starred) for part in target.elts):
        for number, part in enumerate(target.elts):
            yield from _unpacked(part, ast.Subscript(value, ast.Constant(number), ast.Load()))


def equation(node: ast.Call, stands: int) -> dict[int, Operand]:
    """The axes of einsum's operands, where its equation is written out.

    Args:
        node: The call.
        stands: Where the equation does: 0 for the first argument, as torch has it, a letter for each axis; -1
            for the last, as einops has it, a word for each.
    """
    given = node.args[stands] if node.args else None
    if not (isinstance(given, ast.Constant) and isinstance(given.value, str)):
        return {}
    of_words = stands != 0
    left, _, result = (given.value if of_words else given.value.replace(" ", "")).partition("->")
    terms = [side.split() if of_words else list(side) for side in left.split(",")]
    results = result.split() if of_words else list(result)
    found: dict[int, Operand] = {}
    for position, term in enumerate(terms):
        others = {axis for n, t in enumerate(terms) if n != position for axis in t}
        own = [i - len(term) for i, axis in enumerate(term) if axis in results and axis not in others]
        summed = [i - len(term) for i, axis in enumerate(term) if axis not in results and axis in others]
        role = ("left", "right")[position] if position < 2 else f"operand_{position}"
        plain_term = all(axis.isidentifier() for axis in term)
        found[position if of_words else position + 1] = Operand(
            role, own[-1] if own and plain_term else None, summed[-1] if summed and plain_term else None
        )
    return found


def read(name: str) -> ast.Name:
    """A name that is read."""
    return ast.Name(name, ast.Load())


def call(function: str, *args: ast.expr) -> ast.Call:
    """A call of a function by its name."""
    return ast.Call(read(function), list(args), [])


def get(owner: Any, key: Any) -> Any:
    """An item of a list, or an attribute."""
    return owner[key] if isinstance(owner, list) else getattr(owner, key)


def put(owner: Any, key: Any, value: Any) -> None:
    """Exchanges an item of a list, or an attribute."""
    if isinstance(owner, list):
        owner[key] = value
    else:
        setattr(owner, key, value)


def as_list(value: Any) -> list[Any]:
    """What a visit gave: several statements, or one node."""
    return value if isinstance(value, list) else [value]
