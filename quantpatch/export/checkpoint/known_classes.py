"""Classes of quantized layers by the names that a file gives them; nothing is imported because of a file.

A class is found if it exists in this process already, or if an active plugin replaces the float class of a
layer of the model at hand by it, whatever the file says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.subclass import replacement_of
from quantpatch.plugins.entry import Entry
from quantpatch.plugins.registry import registry
from quantpatch.torch_tools.class_swap import dotted


class KnownClasses:
    """What exists here when it is asked first."""

    def __init__(self) -> None:
        self._existing: dict[str, list[type[Any]]] | None = None
        self._by_name: dict[type[Any], list[Entry]] | None = None

    def find(self, name: str, float_class: type[Any]) -> type[Any] | None:
        """The quantized layer of a dotted name that can stand for layers of a class, if it is known.

        Raises:
            QuantPatchError: A plugin has one, and it cannot be imported.
        """
        for cls in self._existing_ones().get(name, ()):
            if issubclass(float_class, cls.float_class):
                return cls
        for base in float_class.__mro__:
            for entry in self._entries_by_name().get(base, ()):
                found = entry.load_replacement()
                if isinstance(found, type) and issubclass(found, QuantizedLayer) and dotted(found) == name:
                    return found
        return None

    def _existing_ones(self) -> dict[str, list[type[Any]]]:
        if self._existing is None:
            self._existing = {}
            for cls in _below(QuantizedLayer):
                name = dotted(cls)
                # torch.export makes a class of each layer's class, of its name, for the time of a trace.
                is_made_of_it = any(dotted(base) == name for base in cls.__mro__[1:])
                if hasattr(cls, "float_class") and replacement_of(cls) is cls and not is_made_of_it:
                    # One that was defined again (in a notebook, say) comes before what it was.
                    self._existing.setdefault(name, []).insert(0, cls)
        return self._existing

    def _entries_by_name(self) -> dict[type[Any], list[Entry]]:
        """The entries whose replacement has not been imported yet, by target."""
        if self._by_name is None:
            self._by_name = {}
            for entry in registry.entries():
                module = entry.loaded_module()
                # Not getattr: a module may import others when it is asked for what it does not have yet.
                target = None if module is None else vars(module).get(entry.name)
                if isinstance(entry.replacement, str) and isinstance(target, type):
                    self._by_name.setdefault(target, []).append(entry)
        return self._by_name


def _below(cls: type[Any]) -> Iterator[type[Any]]:
    """Every subclass of a class, each once, in the order of their definition."""
    seen: dict[type[Any], None] = {}
    waiting = [cls]
    while waiting:
        for child in waiting.pop().__subclasses__():
            if child not in seen:
                seen[child] = None
                waiting.append(child)
    return iter(seen)
