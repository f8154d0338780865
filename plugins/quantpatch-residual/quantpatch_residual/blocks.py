"""Residual blocks with quantized additions, one class for each float block, made when it is first wanted.

A class's qualified name says all that it is made of. So an entry can name it as text, before the block's own
package is imported, and a pickle finds it again in a process that has not made it yet.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any, ClassVar

import torch

from quantpatch import Entry, QuantDescriptor, QuantizedLayer, Recipe
from quantpatch.errors import EntryError
from quantpatch.layers import make_replacement

__all__ = ["QuantizedResidual", "residual_entry"]

_NAME = re.compile(r"Quant(\w+)\[([\w/]+)\((\w*),(\w*)\)(?: if (\w+))?\]")


class QuantizedResidual(QuantizedLayer):
    """Mixin for a residual block: both operands of its additions are quantized.

    Attributes:
        only_if: Attribute of the block that says whether it adds at all; None if every block does.
    """

    feature_axis = -3  # channels of (batch, channels, height, width)
    only_if: ClassVar[str | None] = None

    def descriptors(self, recipe: Recipe) -> Iterable[tuple[str, QuantDescriptor]]:
        """Those of the additions; none for a block that does not add."""
        adds = self.only_if is None or getattr(self, self.only_if)
        return super().descriptors(recipe) if adds else ()


def residual_entry(
    module: str | ModuleType,
    name: str,
    *,
    operands: tuple[str | None, str | None] = ("left", "right"),
    only_if: str | None = None,
    optional: bool = False,
) -> Entry:
    """The entry that quantizes the residual additions of a block: each ``+``, ``+=`` and ``torch.add``.

    ::

        with quantize_modules(custom=[residual_entry("my_package.blocks", "Block")]):
            model = build_model()

    Args:
        module: The module that the block's class is in, or its dotted name. It is not imported here.
        name: The class.
        operands: Names for the operands, left and right of the ``+``; their quantizers are called after
            them. None leaves an operand float.
        only_if: Attribute of a block that says whether it adds at all, such as ``"use_res_connect"``. A
            block without an addition gets no quantizers, which would wait for data in vain.
        optional: See ``quantpatch.Entry``.

    Raises:
        EntryError: A name is not an identifier, or no operand has one.
    """
    path = module.__name__ if isinstance(module, ModuleType) else module
    names = [n for n in (*operands, only_if) if n is not None]
    wrong = next((n for n in names if not (isinstance(n, str) and n.isidentifier())), None)
    if wrong is not None or len(operands) != 2 or not any(operands):
        raise EntryError(
            f"operands={operands!r}, only_if={only_if!r}: expected names for the operands left and right of "
            f"the `+`, at least one, such as operands=('branch', 'skip'), and the name of an attribute",
            entry=(module, name, operands),
        )
    left, right = (operand or "" for operand in operands)
    condition = f" if {only_if}" if only_if else ""
    made = f"Quant{name}[{path.replace('.', '/')}({left},{right}){condition}]"
    return Entry(module, name, f"{__name__}:{made}", optional=optional)


def __getattr__(name: str) -> Any:
    """The class of such a name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    target, path, left, right, only_if = match.groups()
    float_class = getattr(importlib.import_module(path.replace("/", ".")), target)
    members = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"``{float_class.__module__}.{target}`` with quantized residual additions.",
        "operations": {torch.add: (left or None, right or None)},
        "only_if": only_if,
    }
    made = make_replacement(f"Quant{target}", (QuantizedResidual, float_class), members)
    return globals().setdefault(name, made)  # another thread may have been first
