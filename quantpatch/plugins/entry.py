"""An entry says what is replaced by what: ``(module, name, replacement)``.

Entries name their target and may name their replacement as text, so that a plugin can be listed,
skipped or blocked without importing the package it serves.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import attrs

from quantpatch.errors import EntryError


def _module_reference(module: Any) -> Any:
    """A module that can be found by its name is kept by name: entries then compare and print alike."""
    if isinstance(module, ModuleType) and sys.modules.get(module.__name__) is module:
        return module.__name__
    return module


@attrs.frozen(cache_hash=True)
class Entry:
    """What to replace, and by what.

    A target is the class that its package defined. Another class that has taken its name since stays float.
    A function is replaced under its name in its module only: where it was imported earlier under a name of
    its own (``from torch.nn.functional import relu``), the function itself is called.

    Attributes:
        module: The module that holds the target: its dotted name, or the module itself.
        name: The target's name in that module: a class, or a plain function.
        replacement: The class (or function) that takes its place, or ``"package.module:Name"``, which
            is imported only once the target's own module has been.
        default: Whether a block replaces the target without being asked to by ``include``.
        optional: Whether the module may lack the target, as other versions of its package do; there is
            nothing to replace then. Otherwise that is an error.
        reported: Whether ``block.replaced`` lists it. Not what a plugin replaces for its own use, such as
            a function that loads checkpoints: users look there for layers.
        plugin: Name of the plugin that returned it, which is noted then; None for one that was given as
            ``custom``.
    """

    module: str | ModuleType = attrs.field(converter=_module_reference)
    name: str
    replacement: type | Callable[..., Any] | str
    default: bool = attrs.field(default=True, kw_only=True)
    optional: bool = attrs.field(default=False, kw_only=True)
    reported: bool = attrs.field(default=True, kw_only=True)
    plugin: str | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.module, (str, ModuleType)) or not self.module:
            raise self._malformed(f"its module is {self.module!r}, expected a module or its dotted name")
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise self._malformed(f"its name is {self.name!r}, expected the name of a class or function")
        if isinstance(self.replacement, str):
            module, colon, name = self.replacement.partition(":")
            if not (module and colon and name):
                raise self._malformed(
                    f"its replacement is {self.replacement!r}, expected 'package.module:ClassName'"
                )
        elif not callable(self.replacement):
            raise self._malformed(f"its replacement is {self.replacement!r}, expected a class or function")

    def _malformed(self, why: str) -> EntryError:
        given = (self.module, self.name, self.replacement)
        return EntryError(
            f"{given!r} is not an entry: {why}. Write, for instance: (torch.nn, 'Linear', MyQuantLinear) or "
            f"('my_package.layers', 'MyConv', 'my_plugin.layers:QuantMyConv')",
            entry=given,
        )

    @classmethod
    def of(cls, given: EntryLike) -> Entry:
        """The entry meant by an ``Entry`` or a plain tuple.

        Raises:
            EntryError: ``given`` is neither, or a part of it is wrong.
        """
        if isinstance(given, Entry):
            return given
        if isinstance(given, tuple) and len(given) == 3:
            return cls(*given)
        raise EntryError(
            f"{given!r} is not an entry: expected Entry(module, name, replacement) or a tuple of these "
            f"three, such as (torch.nn, 'Linear', MyQuantLinear)",
            entry=given,
        )

    @property
    def module_name(self) -> str:
        """Dotted name of the target's module."""
        return self.module if isinstance(self.module, str) else self.module.__name__

    @property
    def source(self) -> str:
        """Whose it is, for messages."""
        return "custom" if self.plugin is None else f"plugin {self.plugin!r}"

    @property
    def dotted(self) -> str:
        """Dotted name of the target, such as ``"torch.nn.Linear"``."""
        return f"{self.module_name}.{self.name}"

    def loaded_module(self) -> ModuleType | None:
        """The target's module if it has been imported; this class never imports it."""
        return sys.modules.get(self.module) if isinstance(self.module, str) else self.module

    def load_replacement(self) -> Any:
        """The replacement itself; imports it if it was given by name.

        Raises:
            EntryError: The replacement cannot be imported, or its module has no such name.
        """
        if not isinstance(self.replacement, str):
            return self.replacement
        module_name, _, name = self.replacement.partition(":")
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise EntryError(
                f"the replacement {self.replacement!r} of {self.dotted} cannot be imported: "
                f"{type(error).__name__}: {error}",
                entry=self,
            ) from error
        try:
            return getattr(module, name)
        except AttributeError:
            raise EntryError(
                f"the replacement {self.replacement!r} of {self.dotted} does not exist: "
                f"module {module_name} has no {name!r}",
                entry=self,
            ) from None

    @property
    def replacement_name(self) -> str:
        """Where the replacement is found: ``"package.module:Name"``."""
        replacement = self.replacement
        if isinstance(replacement, str):
            return replacement
        return f"{replacement.__module__}:{getattr(replacement, '__qualname__', replacement)}"

    def __str__(self) -> str:
        return f"{self.dotted} -> {self.replacement_name}"


EntryLike = Entry | tuple[Any, str, Any]
