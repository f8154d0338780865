"""Replacements that are a mixin and the class they stand for, made when they are first asked for.

A plugin names its replacements as text, and nothing of transformers may be imported before its own module
is: so ``QuantMixtralExperts`` cannot be written as a class beside that of sixty other models. It is made by
the module's ``__getattr__``, and found there by pickle like any other class.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from quantpatch.layers import make_replacement

__all__ = ["classes_of"]


def classes_of(
    namespace: dict[str, Any], known: Mapping[type[Any], Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a module that offers ``Quant`` classes.

    Args:
        namespace: The module's ``globals()``.
        known: By the mixin that makes them quantized ones, the classes of models, as ``"model.Class"``.
    """
    targets = {
        f"Quant{name}": (mixin, model, name)
        for mixin, names in known.items()
        for model, name in (each.split(".") for each in names)
    }

    def getattribute(name: str) -> Any:
        if name not in targets:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        mixin, model, target = targets[name]
        float_class = getattr(
            importlib.import_module(f"transformers.models.{model}.modeling_{model}"), target
        )
        docstring = f"``{target}`` with the operands of its products quantized."
        members = {"__module__": namespace["__name__"], "__doc__": docstring}
        made = make_replacement(name, (mixin, float_class), members)
        return namespace.setdefault(name, made)  # another thread may have been first

    return getattribute, lambda: sorted({*namespace, *targets})
