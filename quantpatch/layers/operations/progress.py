"""What comes of a class while its functions are rewritten."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Mapping
from typing import Any

import attrs
from torch import nn

from quantpatch.layers.operations.facts import Asked
from quantpatch.layers.operations.source import BY_HAND, Unreadable, codes, is_in_torch, plain, run_by
from quantpatch.layers.operations.table import Operand, Wanted
from quantpatch.recipes.descriptor import QuantDescriptor, Recipe


@attrs.frozen
class InnerOperand:
    """An operand inside a forward.

    Attributes:
        operation: The operation's name.
        operand: What it is to its operation.
        is_weight: Whether it is made of the layer's own tensors alone.
    """

    operation: str
    operand: Operand
    is_weight: bool

    def descriptor(self, recipe: Recipe, feature_axis: int) -> QuantDescriptor | None:
        """How a recipe quantizes it; None if it leaves it float.

        Args:
            recipe: The recipe.
            feature_axis: The axis of the features of the layer's activations.
        """
        summed = self.operand.summed
        if self.is_weight:
            return recipe.weight and recipe.weight.for_axes(self.operand.channels, summed)
        return recipe.input and recipe.input.for_axes(None, feature_axis if summed is None else summed)


@attrs.frozen
class Rewritten:
    """A class's functions with quantized operands.

    Attributes:
        functions: The functions that changed, by name; ``forward`` is one of them if it did.
        operands: Every operand, by name.
        read_only: Children whose tensors are read, and that are never called, by name.
        hidden: What may multiply and could not be followed, with the reason.
    """

    functions: Mapping[str, Any]
    operands: Mapping[str, InnerOperand]
    read_only: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()


class Progress:
    """The rewriting of one class.

    Args:
        float_class: The class.
        wanted: The operations that are looked for.
        asked: What is known of a layer of it.

    Attributes:
        operands: Those that were found, by name.
        hidden: What may multiply and could not be followed, with the reason.
        read: Children whose tensors are read.
        called: Children that are called.
    """

    def __init__(self, float_class: type, wanted: Wanted, asked: Asked) -> None:
        self.float_class = float_class
        self.wanted = wanted
        self.asked = asked
        self.operands: dict[str, InnerOperand] = {}
        self.hidden: list[str] = []
        self.read: set[str] = set()
        self.called: set[str] = set()
        self._hinted: dict[types.FunctionType, bool] = {}

    def may_multiply(self, function: types.FunctionType) -> bool:
        """Whether a function, or one that it calls, may have one of the operations in it."""
        if function not in self._hinted:
            self._hinted[function] = False  # it may call itself
            self._hinted[function] = any(self._is_hinted(code, function) for code in codes(function.__code__))
        return self._hinted[function]

    def _is_hinted(self, code: types.CodeType, function: types.FunctionType) -> bool:
        if self.wanted.hinted(code):
            return True
        scope = function.__globals__
        for name in code.co_names:
            found = scope.get(name)
            values = [found, *_registered(found)]
            if isinstance(found, types.ModuleType):
                values = [vars(found).get(other) for other in code.co_names]
            for value in values:
                if not callable(value) or isinstance(value, type):
                    continue
                if self.wanted.called(value) is not None:
                    return True
                inner = plain(run_by(value))
                if inner is not None and not is_in_torch(inner) and self.may_multiply(inner):
                    return True
            if not hasattr(nn.Module, name):
                method = plain(inspect.getattr_static(self.float_class, name, None))
                if method is not None and self.may_multiply(method):
                    return True
        return False

    def hide(self, function: Any, why: object) -> None:
        """Notes what could not be followed."""
        self.hidden.append(f"{getattr(function, '__qualname__', function)}: {why}")

    def refuse(self, node: ast.expr | ast.stmt, why: str) -> Unreadable:
        """The error for code that cannot be rewritten."""
        return Unreadable(
            f"`{ast.unparse(node)}` in {self.float_class.__qualname__}: {why}. {BY_HAND}",
            layer=self.float_class,
        )


def _registered(value: Any) -> list[Any]:
    """The functions in a dictionary, or in those of a class that is not a module's: a registry."""
    if isinstance(value, type) and not issubclass(value, nn.Module):
        return [each for held in vars(value).values() if isinstance(held, dict) for each in held.values()]
    return list(value.values()) if type(value) is dict else []
