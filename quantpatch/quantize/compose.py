"""The table of a block: ``custom`` before plugins before built-ins, less what is skipped, and what is around.

Targets whose module is not imported yet are known by name alone; the others by their slot, so that two
dotted names of one class are one target.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from quantpatch.errors import ArgumentTypeError, UnknownNameError, near_misses
from quantpatch.interception.hooks import Slot
from quantpatch.plugins.entry import Entry, EntryLike
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import registry
from quantpatch.quantize.reasons import Conflict, NameTaken, NotByDefault, Pattern, SkippedBy
from quantpatch.quantize.resolve import Decision, Key, Table, means, names, resolve
from quantpatch.quantize.targets import entry_error, missing_module, slot_of, stranger_under
from quantpatch.recipes.descriptor import Recipe
from quantpatch.torch_tools.class_swap import dotted


def key_of(entry: Entry) -> Key:
    """What a table knows an entry's target by."""
    return slot_of(entry) or entry.dotted


def compose(
    entries: Iterable[Entry],
    *,
    around: Table | None = None,
    plugins: Sequence[str] | None = None,
    skip: Sequence[Pattern] = (),
    include: Sequence[Pattern] = (),
    custom: Sequence[EntryLike] = (),
    subclasses: bool | None = None,
) -> Table:
    """The table of a block. Plugins that want the same target are in it as a ``Conflict``.

    Args:
        entries: Those of the active plugins, built-ins first.
        around: The table of the block around it, if there is one. What it decides stands where ``entries``
            has nothing for a target.
        plugins: If given, what the table around has from other plugins falls away.
        skip: Targets to leave float.
        include: Targets to replace although they are left float by default (or skipped outside).
        custom: Entries that override all others.
        subclasses: Whether subclasses of targets are replaced as well; None: as in the block around.

    Raises:
        EntryError: An entry cannot be used.
        UnknownNameError: A pattern matches no target.
    """
    around = around or Table()
    inherited, entries, given = _inherited(around, plugins), tuple(entries), _customized(custom)
    table = Table(inherited, skip=(*around.skip, *skip))
    rivals: dict[Key, list[Entry]] = {}
    for entry in entries:
        key = key_of(entry)
        reason = None if entry.default else NotByDefault((entry.name,))
        if entry.plugin == BUILTIN:
            table.setdefault(key, Decision.on(key, entry, reason))
        elif key not in inherited or inherited.entry(key).plugin is not None:  # custom outside goes on
            rivals.setdefault(key, []).append(entry)
            skipped = key in inherited and inherited[key].is_skipped
            table[key] = Decision.on(key, entry, inherited[key].reason if skipped else reason)

    for key in _matching(table, include, "include"):
        table[key] = attrs.evolve(table[key], reason=None)
    for key, pattern in _matching(table, skip, "skip").items():
        table[key] = attrs.evolve(table[key], reason=SkippedBy(pattern))
    table.update(given)
    _leave_lazy_forms_out(table)
    for entry in (*entries, *map(given.entry, given)):
        _add_stranger(table, entry)

    for key, several in rivals.items():
        if len(several) > 1 and key not in given and not table[key].is_skipped:
            conflict = Conflict(tuple(sorted(several, key=lambda entry: str(entry.plugin))))
            table[key] = attrs.evolve(table[key], reason=conflict)
    finished = table.with_all(table.items())
    finished.subclasses = around.subclasses if subclasses is None else subclasses
    return finished


def _inherited(around: Table, plugins: Sequence[str] | None) -> Table:
    """What a table around has for a block in it."""
    table = Table()
    for key, decision in around.items():
        entry = around.entry(key)
        if plugins is not None and entry.plugin not in (None, BUILTIN, *plugins) and not decision.is_skipped:
            continue
        if isinstance(decision.reason, SkippedBy) and decision.reason.lazily:
            decision = attrs.evolve(decision, reason=None)
        # Imported since, perhaps, and then known under another name already.
        now = key_of(entry) if isinstance(key, str) else key
        if now is key or isinstance(now, str):
            table[key] = decision
        else:
            table.setdefault(now, Decision.on(now, entry, decision.reason))
    return table


def _leave_lazy_forms_out(table: Table) -> None:
    """What becomes a layer of a class that is skipped, once it sees its first input, is skipped as well."""
    skips = {d.target: d.reason for d in table.values() if isinstance(d.reason, SkippedBy)}
    skips.pop(None, None)  # of what is not imported
    if not skips:
        return
    for key, decision in table.items():
        skip = skips.get(getattr(decision.target, "cls_to_become", None))
        if skip is not None and decision.reason is None and table.entry(key).plugin is not None:
            table[key] = attrs.evolve(decision, reason=attrs.evolve(skip, lazily=True))


def _add_stranger(table: Table, entry: Entry) -> None:
    """A class that has taken a target's name stays float, and is reported."""
    found = stranger_under(entry)
    slot = None if found is None else slot_of(entry)
    if found is None or slot is None or issubclass(found, slot.target):
        return  # a subclass is reported as such
    try:
        taken = Slot.of_class(found)
    except TypeError:
        return
    reason = NameTaken(entry, dotted(slot.target))
    table.setdefault(taken, Decision(dotted(found), entry, reason, found))


# --- patterns ----------------------------------------------------------------------------------


def _matching(table: Table, patterns: Sequence[Pattern], argument: str) -> dict[Key, Pattern]:
    """The targets that patterns mean, each with the last one that does.

    Raises:
        ArgumentTypeError: A pattern is of another type.
        UnknownNameError: A pattern means nothing.
    """
    found: dict[Key, Pattern] = {}
    for pattern in patterns:
        if not isinstance(pattern, (str, type)):
            raise ArgumentTypeError(
                f"{argument} takes class names, dotted names, globs or classes, not {pattern!r}; "
                f"write, for instance: {argument}=['Linear', 'torch.nn.Conv2d', 'AvgPool*', nn.LSTM]",
                **{argument: pattern},
            )
        keys = [key for key, decision in table.items() if _is_meant(pattern, decision)]
        if not keys and not (argument == "skip" and _means_a_subclass(table, pattern)):
            raise _unmatched(pattern, table, argument)
        found.update(dict.fromkeys(keys, pattern))
    return found


def _is_meant(pattern: Pattern, decision: Decision) -> bool:
    if isinstance(decision.reason, NameTaken):
        return False
    target = decision.target
    if isinstance(pattern, type):
        return target is pattern
    _, _, name = decision.name.rpartition(".")
    if names(pattern, name, decision.name):
        return True
    return target is not None and "." in pattern and means(pattern, target)


def _means_a_subclass(table: Table, pattern: Pattern) -> bool:
    """Whether a pattern means a subclass of a target, or may, in a module that is not imported."""
    if isinstance(pattern, type):
        return resolve(table, pattern).entry is not None
    waiting = [key.target for key in table if not isinstance(key, str) and isinstance(key.target, type)]
    seen = set(waiting)
    while waiting:
        new: set[Any] = set(type.__subclasses__(waiting.pop())) - seen
        if any(means(pattern, cls) and table.made_for(cls) is None for cls in new):
            return True
        seen |= new
        waiting.extend(new)
    module, _, _ = pattern.rpartition(".")
    return bool(module) and module not in sys.modules and missing_module(module) is None


def _unmatched(pattern: Pattern, table: Table, argument: str) -> UnknownNameError:
    given = pattern if isinstance(pattern, str) else f"{pattern.__module__}.{pattern.__qualname__}"
    if given in registry.named("quantpatch_recipes", Recipe):
        hint = f"It is a recipe: write recipe={given!r}"
    elif isinstance(pattern, type) and argument == "skip":
        hint = "No entry replaces it, so that it is left float without being named"
    else:
        hint = "`quantpatch layers` lists what a block can replace"
        if argument == "skip":
            hint += (
                "; to leave a layer float by its name in the model, write afterwards: "
                f"qp.configure(model, {{{given!r}: None}})"
            )
    known = [table.entry(key).name for key in table]
    return UnknownNameError.of(f"layer in {argument}", given, known, hint)


# --- custom ------------------------------------------------------------------------------------


def custom_entry(given: EntryLike) -> Entry:
    """The entry that was given as ``custom``; one that a plugin returned is not the plugin's there."""
    return attrs.evolve(Entry.of(given), plugin=None)


def _customized(custom: Sequence[EntryLike]) -> Table:
    found = Table()
    for given in custom:
        entry = custom_entry(given)
        key = key_of(entry)
        if isinstance(key, str):
            _demand_module(entry)
        if key in found:
            raise entry_error(entry, "custom has another entry for the same target")
        found[key] = Decision.on(key, entry)
    return found


def _demand_module(entry: Entry) -> None:
    """Raises EntryError if the module of an entry is neither imported nor to be found."""
    name = entry.module_name
    root = missing_module(name)
    if root is not None:
        raise entry_error(entry, f"there is no module {root!r}", near_misses(name, sys.modules))


# --- ready to use ------------------------------------------------------------------------------


def load_all(table: Table) -> Table:
    """The table, with the replacements of all targets that are imported.

    Raises:
        EntryConflictError: Two plugins want the same target.
        EntryError: A replacement cannot be used.
    """
    for decision in table.values():
        if isinstance(decision.reason, Conflict):
            raise decision.reason.error()
    for slot in table.slots:
        table.loaded(slot)
    return table


def outermost(
    entries: tuple[Entry, ...],
    plugins: tuple[str, ...] | None,
    skip: tuple[Pattern, ...],
    include: tuple[Pattern, ...],
    subclasses: bool,
) -> Table:
    """The loaded table of a block with no block around it and no ``custom``.

    It is remembered as long as the targets' names still mean the same classes and functions.
    """
    targets = tuple([vars(m).get(entry.name) if (m := entry.loaded_module()) else None for entry in entries])
    key = (entries, plugins, skip, include, subclasses, targets)
    try:
        hash(key)
    except TypeError:  # something odd in a module, or in skip: say so in compose's own words
        return _outermost.__wrapped__(*key)
    return _outermost(*key)


@functools.lru_cache(maxsize=32)
def _outermost(
    entries: tuple[Entry, ...],
    plugins: tuple[str, ...] | None,
    skip: tuple[Pattern, ...],
    include: tuple[Pattern, ...],
    subclasses: bool,
    targets: tuple[Any, ...],
) -> Table:
    return load_all(compose(entries, plugins=plugins, skip=skip, include=include, subclasses=subclasses))
