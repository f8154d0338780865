"""What an entry's target is, and whether its replacement can take its place.

A target is the class that its package defined, found by its own ``__module__`` and ``__qualname__``. Another
class that a library has put under its name since, a *stranger*, is not meant.
"""

from __future__ import annotations

import importlib.util
import sys
from types import FunctionType
from typing import Any

from quantpatch.errors import EntryError, listed, near_misses
from quantpatch.interception.hooks import Slot
from quantpatch.interception.torch_state import Trace, protected
from quantpatch.plugins.entry import Entry
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import registry
from quantpatch.torch_tools.class_swap import dotted, written_name


def class_meant(entry: Entry, found: type) -> type:
    """The class that an entry is for.

    Args:
        entry: The entry.
        found: What stands under its name. A package that exports another one's class under its name, or
            under another, means just that class.

    Returns:
        ``found``; or the class that the entry's own package has defined by that name, if a stranger stands
        there: a subclass has it among its bases, and of whatever else the replacement has.
    """
    if _is_defined_by(entry, found):
        return found
    return next((base for base in (*found.__mro__, *_bases(entry)) if _is_defined_by(entry, base)), found)


def stranger_under(entry: Entry) -> type | None:
    """The class that has taken the name of an entry's target, if one has."""
    found = getattr(entry.loaded_module(), entry.name, None)
    return found if isinstance(found, type) and class_meant(entry, found) is not found else None


def _is_defined_by(entry: Entry, cls: type) -> bool:
    module = entry.module_name
    return cls.__qualname__ == entry.name and f"{cls.__module__}.".startswith(f"{module}.")


def imported_replacement(entry: Entry) -> Any:
    """The replacement of an entry; None as long as it is not imported."""
    replacement: Any = entry.replacement
    if isinstance(replacement, str):
        module, _, name = replacement.partition(":")
        loaded = sys.modules.get(module)
        # Not getattr: a module may import others when it is asked for what it does not have yet.
        return None if loaded is None else vars(loaded).get(name)
    return replacement


def _bases(entry: Entry) -> tuple[type, ...]:
    """The bases of an entry's replacement; none if it is not imported."""
    replacement = imported_replacement(entry)
    return replacement.__mro__[1:] if isinstance(replacement, type) else ()


def missing_module(name: str) -> str | None:
    """What of a dotted name is neither imported nor to be found; None if it is there.

    Looks as far as it can without importing anything: a parent that is not imported yet is taken at
    its word.
    """
    parent, _, _ = name.rpartition(".")
    root = name if not parent or parent in sys.modules else name.partition(".")[0]
    try:
        found = root in sys.modules or importlib.util.find_spec(root) is not None
    except (ImportError, ValueError):
        found = False
    return None if found else root


def entry_error(entry: Entry, what: str, hint: str = "") -> EntryError:
    """The error for an entry that cannot be used, naming it and whose it is."""
    infos = () if entry.plugin is None else registry.plugins()
    dist = next((info.distribution for info in infos if info.name == entry.plugin), None)
    brought = f"The plugin comes with {dist}" if dist else ""
    text = f"{entry.source}: entry {entry} cannot be used: {what}"
    return EntryError(
        ". ".join(part.rstrip(".") for part in (text, hint, brought) if part),
        entry=entry,
        plugin=entry.plugin,
    )


def slot_of(entry: Entry) -> Slot | None:
    """The slot of an entry's target; None while its module is not imported, or lacks an optional one.

    Raises:
        EntryError: The module has no such name, or what it names cannot be replaced.
    """
    module = entry.loaded_module()
    if module is None:
        return None
    try:
        found = getattr(module, entry.name)
        return (
            Slot.of_class(class_meant(entry, found))
            if isinstance(found, type)
            else Slot.of(module, entry.name)
        )
    except AttributeError:
        if entry.optional:
            return None
        hint = near_misses(entry.name, (name for name in dir(module) if not name.startswith("_")))
        raise entry_error(entry, f"module {entry.module_name} has no {entry.name!r}", hint) from None
    except TypeError as error:
        raise entry_error(entry, str(error)) from error


def load_checked(entry: Entry, slot: Slot) -> Any:
    """The entry's replacement, imported and fit to take the target's place.

    Raises:
        EntryError: It is not; or it comes from a plugin and cannot be pickled, or changes torch when it is
            imported.
    """
    try:
        replacement = _imported(entry)
    except EntryError as error:
        raise entry_error(entry, str(error)) from error
    try:
        if replacement is stranger_under(entry):
            raise TypeError("it is the target itself, as it has taken the target's name")
        slot.check(replacement)
    except TypeError as error:
        name = entry.name
        hint = (
            f"Write a subclass: class Quant{name}(quantpatch.QuantizedLayer, {name}): ..."
            if isinstance(slot.target, type)
            else f"Write a function that takes the arguments of {name}"
        )
        raise entry_error(entry, f"the replacement cannot take the target's place: {error}", hint) from error
    _check_base(entry, slot, replacement)
    if entry.plugin is not None and isinstance(replacement, type) and not _is_importable(replacement):
        # In code of one's own, given as custom, that is a matter of one's own.
        name = written_name(replacement)
        raise entry_error(
            entry,
            f"{replacement.__module__}.{replacement.__qualname__} is not found under that name, so that the "
            f"layers built from it could not be pickled",
            f"Define the class at the top of a module, and name it as text: 'package.module:{name}'",
        )
    return replacement


def _imported(entry: Entry) -> Any:
    """The replacement; importing that of a plugin may not change torch."""
    named = entry.replacement
    if entry.plugin in (None, BUILTIN) or not isinstance(named, str) or _is_imported(named):
        return entry.load_replacement()
    changes: list[Trace] = []
    with protected(changes):
        replacement = entry.load_replacement()
    if changes:
        what = listed(changes)
        raise EntryError(f"importing it changes PyTorch: {what}. That was taken back")
    return replacement


def _is_imported(named: str) -> bool:
    """Whether ``"package.module:Name"`` is there already, so that nothing runs to get it."""
    module, _, name = named.partition(":")
    loaded = sys.modules.get(module)
    return loaded is not None and name.partition(".")[0] in vars(loaded)


def _is_importable(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def _check_base(entry: Entry, slot: Slot, replacement: Any) -> None:
    """Raises EntryError if the replacement was written on another class of the target's name.

    That is a stranger that stood there when the replacement was imported, or the class of before its module
    was reloaded: the layers would compute as that one does.
    """
    target = slot.target
    if not isinstance(target, type):
        return
    stranger = stranger_under(entry)
    names = (dotted(target), "" if stranger is None else dotted(stranger))
    for base in replacement.__mro__[1:]:
        if base is target:
            return
        if dotted(base) in names and not _is_up_to_date(base, target):
            module = replacement.__module__
            why = (
                f"it is a subclass of {dotted(base)}, which stood under the name {entry.dotted} when "
                f"{module} was imported"
                if base is stranger
                else f"it is a subclass of the {dotted(base)} from before {target.__module__} was reloaded"
            )
            raise entry_error(entry, why, f"Import {module} again, or earlier")


def _is_up_to_date(old: type, new: type) -> bool:
    """Whether a class does what another one of its name does: notebooks edit classes in place."""
    if dotted(old) != dotted(new):
        return False
    for name, value in vars(new).items():
        function = value if isinstance(value, FunctionType) else None
        before = vars(old).get(name)
        if function is not None and getattr(before, "__code__", None) is not function.__code__:
            return False
    return True
