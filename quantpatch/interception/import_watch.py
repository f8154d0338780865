"""Calls a block when a module it waits for gets imported, or reloaded, without importing it.

The watch is an item of its own on ``sys.meta_path``, there only while a block waits for something. It
lets the other finders find the module and only stands around its execution; the module keeps its real
loader and specification.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

Notify = Callable[[ModuleType], None]


class ImportWatch(importlib.abc.MetaPathFinder):
    """Calls ``notify(module)`` after any of the named modules has been imported.

    Args:
        names: Dotted names of modules, imported or not.
        notify: Called in the importing thread, right after the module's code has run.
    """

    def __init__(self, names: Iterable[str], notify: Notify) -> None:
        self.names = frozenset(names)
        self._notify = notify

    def start(self) -> None:
        """Starts watching."""
        sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Stops watching; harmless if it does not, or if other code has taken the item away."""
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The specification that the other finders give, with a loader that notifies."""
        if fullname not in self.names or self not in sys.meta_path:
            return None
        # Those before this one have been asked; among those after it may be the watch of another block.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find_spec = getattr(finder, "find_spec", None)
            if find_spec is None:
                continue
            spec: importlib.machinery.ModuleSpec | None = find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _NotifyingLoader(spec.loader, self._notify)
                return spec
        return None


class _NotifyingLoader(importlib.abc.Loader):
    def __init__(self, loader: Any, notify: Notify) -> None:
        self._loader = loader
        self._notify = notify

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # Whatever happens next, the module is left with the loader it would have had without us.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._notify(module)
