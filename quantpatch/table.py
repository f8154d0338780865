"""Which entry wins for which target: ``custom`` before plugins before built-ins, less what is skipped.

A table maps each target to a choice: the entry that applies, or the reason why the target stays float.
Targets whose module is not imported yet are known by name alone; the others by their slot, so that two
dotted names of one class are one target.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from quantpatch.classes import dotted, written_name
from quantpatch.descriptor import Recipe
from quantpatch.entries import Entry, EntryLike
from quantpatch.errors import EntryConflictError, EntryError, ScopeError, UnknownNameError, near_misses
from quantpatch.interception import Slot
from quantpatch.plugins import BUILTIN, Offer
from quantpatch.registry import registry
from quantpatch.snapshot import Change, Setting, protected
from quantpatch.tracing import listed

__all__ = [
    "PARTS",
    "Choice",
    "Key",
    "Pattern",
    "Table",
    "compose",
    "key_of",
    "load",
    "load_all",
    "load_checked",
    "nearest",
    "outermost",
    "slot_of",
]

Pattern = str | type
Key = Slot | str


@attrs.frozen
class Choice:
    """What applies to one target.

    Attributes:
        offer: The entry, and whose it is.
        float_because: Why the target stays float all the same; empty if it is replaced.
        replacement: What takes its place, once it has been loaded.
    """

    offer: Offer
    float_because: str = ""
    replacement: Any = attrs.field(default=None, eq=False)

    @property
    def is_skipped(self) -> bool:
        """Whether a ``skip``, here or in a block around, leaves it float."""
        return self.float_because.startswith(_SKIP)


Table = dict[Key, Choice]

#: Classes that are parts of a target, which reads their weights and never calls them.
PARTS = frozenset({"torch.nn.modules.linear.NonDynamicallyQuantizableLinear"})  # MultiheadAttention's

_SKIP = "skip="


def entry_error(offer: Offer, what: str, hint: str = "") -> EntryError:
    """The error for an entry that cannot be used, naming it and whose it is."""
    return EntryError(
        f"{offer.source}: entry {offer.entry} cannot be used: {what}. {hint}".rstrip(),
        entry=offer.entry,
        plugin=offer.plugin,
    )


def slot_of(offer: Offer) -> Slot | None:
    """The slot of an entry's target; None while its module is not imported, or lacks an optional one.

    Raises:
        EntryError: The module has no such name, or what it names cannot be replaced.
    """
    entry = offer.entry
    module = entry.loaded_module()
    if module is None:
        return None
    try:
        return Slot.of(module, entry.name)
    except AttributeError:
        if entry.optional:
            return None
        hint = near_misses(entry.name, (name for name in dir(module) if not name.startswith("_")))
        raise entry_error(offer, f"module {entry.module_name} has no {entry.name!r}", hint) from None
    except TypeError as error:
        raise entry_error(offer, str(error)) from error


def load_checked(offer: Offer, slot: Slot) -> Any:
    """The entry's replacement, imported and fit to take the target's place.

    Raises:
        EntryError: It is not; or it comes from a plugin and cannot be pickled, or changes torch when it is
            imported.
    """
    try:
        replacement = _imported(offer)
    except EntryError as error:
        raise entry_error(offer, str(error)) from error
    try:
        slot.check(replacement)
    except TypeError as error:
        name = offer.entry.name
        hint = (
            f"Write a subclass: class Quant{name}(quantpatch.QuantizedLayer, {name}): ..."
            if isinstance(slot.target, type)
            else f"Write a function that takes the arguments of {name}"
        )
        raise entry_error(offer, f"the replacement cannot take the target's place: {error}", hint) from error
    if offer.plugin is not None and isinstance(replacement, type) and not _is_importable(replacement):
        # In code of one's own, given as custom, that is a matter of one's own.
        name = written_name(replacement)
        raise entry_error(
            offer,
            f"{replacement.__module__}.{replacement.__qualname__} is not found under that name, so that the "
            f"layers built from it could not be pickled",
            f"Define the class at the top of a module, and name it as text: 'package.module:{name}'",
        )
    return replacement


def _imported(offer: Offer) -> Any:
    """The replacement; importing that of a plugin may not change torch."""
    if offer.plugin in (None, BUILTIN) or not isinstance(offer.entry.replacement, str):
        return offer.entry.load_replacement()
    changes: list[Change | Setting] = []
    with protected(changes):
        replacement = offer.entry.load_replacement()
    if changes:
        what = listed(map(str, changes))
        raise EntryError(f"importing it changes PyTorch: {what}. That was taken back")
    return replacement


def _is_importable(cls: type) -> bool:
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def nearest(table: Table, cls: type) -> tuple[Slot, Choice] | None:
    """The nearest base class of ``cls`` (or itself) that a table knows, and what applies to it.

    None if there is none, if ``cls`` is a replacement's already, or if it is a part of a target, which
    multiplies with its weights itself.
    """
    if dotted(cls) in PARTS:
        return None
    known = {key.target: (key, choice) for key, choice in table.items() if isinstance(key, Slot)}
    if any(choice.replacement in cls.__mro__ for _, choice in known.values()):
        return None
    return next((known[base] for base in cls.__mro__ if base in known), None)


def key_of(offer: Offer) -> Key:
    """What a table knows an entry's target by."""
    return slot_of(offer) or offer.entry.dotted


def compose(
    enclosing: Table,
    offers: Iterable[Offer],
    *,
    plugins: Sequence[str] | None = None,
    skip: Sequence[Pattern] = (),
    include: Sequence[Pattern] = (),
    custom: Sequence[EntryLike] = (),
) -> Table:
    """The table of a block.

    Args:
        enclosing: The table of the block around it (empty if there is none). Its choices stand where
            ``offers`` has nothing for a target.
        offers: What the active plugins offer, built-ins first.
        plugins: If given, choices of the enclosing table from other plugins fall away.
        skip: Targets to leave float.
        include: Targets to replace although they are left float by default (or skipped outside).
        custom: Entries that override all others.

    Raises:
        EntryError: An entry cannot be used.
        EntryConflictError: Two plugins want the same target.
        UnknownNameError: A pattern matches no target.
    """
    table: Table = {}
    for key, choice in enclosing.items():
        if plugins is None or choice.offer.plugin in (None, BUILTIN, *plugins) or choice.is_skipped:
            if isinstance(key, Slot):
                table[key] = choice
            else:  # imported since, perhaps, and then known under another name already
                table.setdefault(key_of(choice.offer), choice)
    inherited = dict(table)
    rivals: dict[Key, list[Offer]] = {}
    for offer in offers:
        key = key_of(offer)
        entry, outer = offer.entry, inherited.get(key)
        because = "" if entry.default else f"not replaced by default; write include=[{entry.name!r}]"
        if offer.plugin == BUILTIN:
            table.setdefault(key, Choice(offer, because))
        elif outer is None or outer.offer.plugin is not None:  # a custom entry outside goes on
            because = outer.float_because if outer is not None and outer.is_skipped else because
            rivals.setdefault(key, []).append(offer)
            table[key] = Choice(offer, because)

    for key in _matching(table, include, "include"):
        table[key] = attrs.evolve(table[key], float_because="")
    for key, pattern in _matching(table, skip, "skip").items():
        table[key] = attrs.evolve(table[key], float_because=f"{_SKIP}{pattern!r}")
    given = _customized(custom)
    table.update(given)

    for key, several in rivals.items():
        if len(several) > 1 and key not in given and not table[key].is_skipped:
            raise _conflict(several)
    return table


def _conflict(several: list[Offer]) -> EntryConflictError:
    several = sorted(several, key=lambda offer: str(offer.plugin))
    target = several[0].entry.dotted
    names = tuple(str(offer.plugin) for offer in several)
    return EntryConflictError(
        f"{len(several)} plugins replace {target}: "
        + "; ".join(f"{offer.plugin!r} by {offer.entry.replacement}" for offer in several)
        + f". Choose one: skip=[{target!r}] leaves it float, custom=[(module, name, replacement)] decides "
        f"for it, QUANTPATCH_BLOCK={names[-1]} switches one plugin off",
        target=target,
        plugins=names,
        entries=tuple(offer.entry for offer in several),
    )


# --- patterns ----------------------------------------------------------------------------------


def _resolve_dotted(dotted: str) -> Any:
    """The object that a dotted name means in the modules imported so far, or None."""
    module, _, name = dotted.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _matches(pattern: Pattern, key: Key, entry: Entry) -> bool:
    target = key.target if isinstance(key, Slot) else None
    if isinstance(pattern, type):
        return target is pattern
    if any(fnmatch.fnmatchcase(name, pattern) for name in (entry.name, entry.dotted)):
        return True
    return "." in pattern and target is not None and _resolve_dotted(pattern) is target


def _matching(table: Table, patterns: Sequence[Pattern], argument: str) -> dict[Key, Pattern]:
    found: dict[Key, Pattern] = {}
    for pattern in patterns:
        if not isinstance(pattern, (str, type)):
            raise ScopeError(
                f"{argument} takes class names, dotted names, globs or classes, not {pattern!r}; "
                f"write, for instance: {argument}=['Linear', 'torch.nn.Conv2d', 'AvgPool*', nn.LSTM]"
            )
        keys = [key for key, choice in table.items() if _matches(pattern, key, choice.offer.entry)]
        if not keys:
            raise _unmatched(pattern, table, argument)
        found.update(dict.fromkeys(keys, pattern))
    return found


def _unmatched(pattern: str | type, table: Table, argument: str) -> UnknownNameError:
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
    known = [choice.offer.entry.name for choice in table.values()]
    return UnknownNameError.of(f"layer in {argument}", given, known, hint)


# --- custom ------------------------------------------------------------------------------------


def _customized(custom: Sequence[EntryLike]) -> Table:
    table: Table = {}
    for given in custom:
        offer = Offer(Entry.of(given), None)
        key = key_of(offer)
        if isinstance(key, str):
            _demand_module(offer)
        if key in table:
            raise entry_error(offer, "custom has another entry for the same target")
        table[key] = Choice(offer)
    return table


def _demand_module(offer: Offer) -> None:
    """Raises EntryError if the module of an entry is neither imported nor to be found.

    Looks as far as it can without importing anything: a parent that is not imported yet is taken at
    its word.
    """
    name = offer.entry.module_name
    parent, _, _ = name.rpartition(".")
    root = name if not parent or parent in sys.modules else name.partition(".")[0]
    try:
        found = root in sys.modules or importlib.util.find_spec(root) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise entry_error(offer, f"there is no module {root!r}", near_misses(name, sys.modules))


# --- ready to use ------------------------------------------------------------------------------


def load(slot: Slot, choice: Choice) -> Choice:
    """The choice with its replacement, if it has one and it is not there yet.

    Raises:
        EntryError: The replacement cannot be imported, or cannot take the target's place.
    """
    if choice.float_because or choice.replacement is not None:
        return choice
    return attrs.evolve(choice, replacement=load_checked(choice.offer, slot))


def load_all(table: Table) -> Table:
    """The table with the replacements of all targets that are imported."""
    return {key: choice if isinstance(key, str) else load(key, choice) for key, choice in table.items()}


def outermost(
    offers: tuple[Offer, ...],
    plugins: tuple[str, ...] | None,
    skip: tuple[Pattern, ...],
    include: tuple[Pattern, ...],
) -> Table:
    """The loaded table of a block with no block around it and no ``custom``; not to be changed.

    It is remembered as long as the targets' names still mean the same classes and functions.
    """
    targets = tuple([vars(m).get(o.entry.name) if (m := o.entry.loaded_module()) else None for o in offers])
    key = (offers, plugins, skip, include, targets)
    try:
        hash(key)
    except TypeError:  # something odd in a module, or in skip: say so in compose's own words
        return _outermost.__wrapped__(*key)
    return _outermost(*key)


@functools.lru_cache(maxsize=32)
def _outermost(
    offers: tuple[Offer, ...],
    plugins: tuple[str, ...] | None,
    skip: tuple[Pattern, ...],
    include: tuple[Pattern, ...],
    targets: tuple[Any, ...],
) -> Table:
    return load_all(compose({}, offers, plugins=plugins, skip=skip, include=include))
