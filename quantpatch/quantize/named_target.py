"""What a user means by the name of a class or function: a target, or what a module has by that name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from quantpatch.errors import ArgumentError, ArgumentTypeError, UnknownNameError
from quantpatch.plugins.entry import Entry
from quantpatch.quantize.targets import slot_of
from quantpatch.torch_tools.class_swap import dotted


def find_target(target: Any, known: Sequence[Entry]) -> tuple[str, Any]:
    """The dotted name of what is meant, and the object; None where it is a target that is not imported.

    Args:
        target: A class or function, its dotted name, or the bare name of an entry's target.
        known: The entries.

    Raises:
        UnknownNameError: There is nothing by that name.
        EntryError: The target of an entry is not in its module.
        ArgumentError: A bare name means several targets, or a module cannot be imported.
    """
    if not isinstance(target, str):
        if not callable(target) or not hasattr(target, "__qualname__"):
            raise ArgumentTypeError(
                f"explain takes a class, a function or its dotted name, not {target!r}", target=target
            )
        return dotted(target), target
    target = target.replace(":", ".")
    entries = {entry.dotted: entry for entry in known}
    if "." not in target:
        same = sorted(name for name, entry in entries.items() if entry.name == target)
        if len(same) > 1:
            raise ArgumentError(
                f"{target!r} means several targets: {', '.join(same)}; write one of these", target=target
            )
        if not same:
            raise UnknownNameError.of("layer", target, entries)
        target = same[0]
    if target not in entries:
        target = _exported_as(target, entries.values()) or target
    if target in entries:
        slot = slot_of(entries[target])
        return target, None if slot is None else slot.target
    return target, _imported(target, entries)


def _exported_as(name: str, entries: Iterable[Entry]) -> str | None:
    """Under which name an entry waits for what a module of the same package, not imported either, defines."""
    module, _, last = name.rpartition(".")
    if module in sys.modules:
        return None
    root = f"{module.partition('.')[0]}."
    waiting = {e.dotted for e in entries if e.name == last and f"{e.module_name}.".startswith(root)}
    return next(iter(waiting)) if len(waiting) == 1 and not _is_there(*waiting) else None


def _is_there(dotted_name: str) -> bool:
    return dotted_name.rpartition(".")[0] in sys.modules


def _imported(name: str, known: Iterable[str]) -> Any:
    """What a dotted name means; imports its module."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise ArgumentError(f"{name} cannot be imported: {error}", target=name) from error
            continue
        except Exception as error:
            raise ArgumentError(
                f"{name} cannot be imported: {type(error).__name__}: {error}", target=name
            ) from error
        for part in parts[end:]:
            found = getattr(found, part, None)
        if callable(found):
            return found
        break
    raise UnknownNameError.of("layer", name, known, "`quantpatch layers` lists what there are entries for")
