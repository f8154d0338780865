"""Where the arguments of an operation stand in a call."""

from __future__ import annotations

import ast
import functools
import inspect
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import get_testing_overrides

from quantpatch.layers.operations.progress import Progress


@functools.cache
def _signatures() -> dict[Any, Any]:
    return dict(get_testing_overrides())


@functools.cache
def _parameters(operation: Any) -> tuple[str, ...]:
    """Names of an operation's parameters."""
    if operation is F.scaled_dot_product_attention:
        return ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    described = _signatures().get(operation, operation)
    try:
        return tuple(inspect.signature(described).parameters)
    except (TypeError, ValueError):
        return ()


def in_order(node: ast.Call, operation: Any, skipped: int, work: Progress) -> dict[int, tuple[Any, Any]]:
    """Where the arguments of an operation stand, by position, each as an owner and the key in it.

    Args:
        node: The call.
        operation: The operation's function.
        skipped: 1 for a method, whose first argument is what it is called on.
        work: Of the class.

    Raises:
        LayerError: Operands may be hidden in a starred argument.
    """
    starred = any(isinstance(argument, ast.Starred) for argument in node.args)
    parameters = _parameters(operation)
    where: dict[int, tuple[Any, Any]] = {0: (node.func, "value")} if skipped else {}
    where |= {n + skipped: (node.args, n) for n, a in enumerate(node.args) if not starred}
    where |= {parameters.index(k.arg): (k, "value") for k in node.keywords if k.arg in parameters}
    known = work.wanted.operations[operation]
    operands = known.operands
    if known.equation == -1:
        where.pop(len(node.args) - 1, None)
    hides = starred or any(keyword.arg is None for keyword in node.keywords)
    needed = [n for n, operand in enumerate(operands) if operand is not None][:2]
    if hides and any(n not in where for n in needed):
        if operation is torch.einsum and len(node.args) > 1:  # operands in a starred list
            return {1: (node.args, 1)}
        raise work.refuse(node, "its operands may be hidden in a starred argument")
    if node.keywords and not parameters:
        raise work.refuse(node, "it is not known which operand a keyword means")
    return where
