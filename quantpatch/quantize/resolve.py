"""Which entry wins for which target: ``custom`` before plugins before built-ins, less what is skipped.

A table maps each target to a choice: the entry that applies, or the reason why the target stays float.
Targets whose module is not imported yet are known by name alone; the others by their slot, so that two
dotted names of one class are one target.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from quantpatch.errors import EntryConflictError, ScopeError, UnknownNameError, near_misses
from quantpatch.interception.hooks import Slot
from quantpatch.plugins.entry import Entry, EntryLike
from quantpatch.plugins.plugin import BUILTIN, Offer
from quantpatch.plugins.registry import registry
from quantpatch.quantize.targets import entry_error, load_checked, missing_module, slot_of, stranger_under
from quantpatch.recipes.descriptor import Recipe
from quantpatch.torch_tools.class_swap import dotted, written_name

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
    "nearest",
    "outermost",
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
        stranger: Dotted name of another class that has taken the target's name, if it is that one's.
    """

    offer: Offer
    float_because: str = ""
    replacement: Any = attrs.field(default=None, eq=False)
    stranger: str = ""

    @property
    def is_skipped(self) -> bool:
        """Whether a ``skip``, here or in a block around, leaves it float."""
        return self.float_because.startswith(_SKIP)


class Table(dict[Key, Choice]):
    """What applies to each target.

    Args:
        choices: By target.
        skip: Patterns that leave subclasses of targets float.
    """

    def __init__(
        self, choices: Mapping[Key, Choice] | Iterable[tuple[Key, Choice]] = (), skip: Sequence[Pattern] = ()
    ) -> None:
        super().__init__(choices)
        self.skip = tuple(skip)

    @functools.cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Those of the targets that are imported."""
        return tuple(key for key in self if isinstance(key, Slot))

    @functools.cached_property
    def waits_for(self) -> frozenset[str]:
        """Modules of targets that are not imported."""
        return frozenset(c.offer.entry.module_name for key, c in self.items() if isinstance(key, str))

    @functools.cached_property
    def may_be_reloaded(self) -> frozenset[str]:
        """Modules of targets that are imported, but for torch's."""
        modules = {str(key.target.__module__) for key in self.slots if self[key].offer.plugin != BUILTIN}
        return frozenset(name for name in modules if name.partition(".")[0] != "torch")

    @functools.cached_property
    def _by_class(self) -> dict[Any, tuple[Slot, Choice]]:
        return {key.target: (key, choice) for key, choice in self.items() if isinstance(key, Slot)}

    @functools.cached_property
    def _replacements(self) -> frozenset[Any]:
        found = [c.offer.entry.replacement if c.replacement is None else c.replacement for c in self.values()]
        return frozenset(found)

    def choice_of(self, cls: type) -> tuple[Slot, Choice] | None:
        """What applies to exactly this class, if it is a target."""
        return self._by_class.get(cls)

    def has_made(self, cls: type) -> bool:
        """Whether a class is a replacement, or made from one."""
        known = self._replacements
        return any(
            base in known or f"{base.__module__}:{written_name(base)}" in known for base in cls.__mro__
        )


#: Classes that are parts of a target, which reads their weights and never calls them.
PARTS = frozenset({"torch.nn.modules.linear.NonDynamicallyQuantizableLinear"})  # MultiheadAttention's

_SKIP = "skip="
_BECOMES = ", which it becomes"


def nearest(table: Table, cls: type) -> tuple[Slot, Choice] | None:
    """The nearest base class of ``cls`` (or itself) that a table knows, and what applies to ``cls``.

    None if there is none, if ``cls`` is a replacement's already, or if it is a part of a target, which
    multiplies with its weights itself.
    """
    if dotted(cls) in PARTS or table.has_made(cls):
        return None
    skipped: Pattern | None = None
    for base in cls.__mro__:
        found = table.choice_of(base)
        if found is not None:
            slot, choice = found
            if skipped is not None and not choice.float_because:
                return slot, attrs.evolve(choice, float_because=f"{_SKIP}{skipped!r}")
            return found
        if skipped is None:
            skipped = next((pattern for pattern in table.skip if _means(pattern, base)), None)
    return None


def key_of(offer: Offer) -> Key:
    """What a table knows an entry's target by."""
    return slot_of(offer) or offer.entry.dotted


def compose(
    enclosing: Mapping[Key, Choice],
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
    table = Table(skip=(*(enclosing.skip if isinstance(enclosing, Table) else ()), *skip))
    for key, choice in enclosing.items():
        if choice.float_because.endswith(_BECOMES):
            choice = attrs.evolve(choice, float_because="")
        if plugins is None or choice.offer.plugin in (None, BUILTIN, *plugins) or choice.is_skipped:
            if isinstance(key, Slot):
                table[key] = choice
            else:  # imported since, perhaps, and then known under another name already
                table.setdefault(key_of(choice.offer), choice)
    inherited = dict(table)
    rivals: dict[Key, list[Offer]] = {}
    given = _customized(custom)
    offers = tuple(offers)
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
    table.update(given)
    _leave_lazy_forms_out(table)
    for offer in (*offers, *(choice.offer for choice in given.values())):
        _add_stranger(table, offer)

    for key, several in rivals.items():
        if len(several) > 1 and key not in given and not table[key].is_skipped:
            raise _conflict(several)
    return Table(table, table.skip)


def _leave_lazy_forms_out(table: Table) -> None:
    """What becomes a layer of a class that is skipped, once it sees its first input, is skipped as well."""
    by_class = {key.target: choice for key, choice in table.items() if isinstance(key, Slot)}
    for key, choice in table.items():
        found = by_class.get(getattr(key.target, "cls_to_become", None)) if isinstance(key, Slot) else None
        if found is not None and found.is_skipped and not choice.float_because and choice.offer.plugin:
            table[key] = attrs.evolve(choice, float_because=f"{found.float_because}{_BECOMES}")


def _add_stranger(table: Table, offer: Offer) -> None:
    """A class that has taken a target's name stays float, and is told of."""
    found = stranger_under(offer)
    if found is None or issubclass(found, slot_of(offer).target):  # type: ignore[union-attr]
        return  # a subclass is told of as such
    try:
        slot = Slot.of_class(found)
    except TypeError:
        return
    target = dotted(slot_of(offer).target)  # type: ignore[union-attr]
    because = f"it has taken the name {offer.entry.dotted}, but {offer.source} replaces {target}"
    table.setdefault(slot, Choice(offer, because, stranger=dotted(found)))


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
    return target is not None and "." in pattern and _means(pattern, target)


def _means(pattern: Pattern, cls: Any) -> bool:
    """Whether a pattern means a class, by the name that it was given by its own module or by another."""
    if isinstance(pattern, type):
        return cls is pattern
    if any(fnmatch.fnmatchcase(name, pattern) for name in (cls.__name__, dotted(cls))):
        return True
    return "." in pattern and _resolve_dotted(pattern) is cls


def _means_a_subclass(table: Table, pattern: Pattern) -> bool:
    """Whether a pattern means a subclass of a target, or may, in a module that is not imported."""
    if isinstance(pattern, type):
        return nearest(table, pattern) is not None
    targets = [key.target for key in table if isinstance(key, Slot) and isinstance(key.target, type)]
    waiting: list[Any] = targets
    seen = set(targets)
    while waiting:
        new = set(type.__subclasses__(waiting.pop())) - seen
        if any(_means(pattern, cls) and not table.has_made(cls) for cls in new):
            return True
        seen |= new
        waiting.extend(new)
    module, _, _ = pattern.rpartition(".")
    return bool(module) and module not in sys.modules and missing_module(module) is None


def _matching(table: Table, patterns: Sequence[Pattern], argument: str) -> dict[Key, Pattern]:
    found: dict[Key, Pattern] = {}
    for pattern in patterns:
        if not isinstance(pattern, (str, type)):
            raise ScopeError(
                f"{argument} takes class names, dotted names, globs or classes, not {pattern!r}; "
                f"write, for instance: {argument}=['Linear', 'torch.nn.Conv2d', 'AvgPool*', nn.LSTM]"
            )
        keys = [
            key
            for key, choice in table.items()
            if _matches(pattern, key, choice.offer.entry) and not choice.stranger
        ]
        if not keys and not (argument == "skip" and _means_a_subclass(table, pattern)):
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
    table = Table()
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
    """Raises EntryError if the module of an entry is neither imported nor to be found."""
    name = offer.entry.module_name
    root = missing_module(name)
    if root is not None:
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
    loaded = [(key, choice if isinstance(key, str) else load(key, choice)) for key, choice in table.items()]
    return Table(loaded, table.skip)


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
    return load_all(compose(Table(), offers, plugins=plugins, skip=skip, include=include))
