"""``resolve(table, target)``: what becomes of a class or function in a block, and why.

Blocks (of what no hook has replaced), ``convert``, ``explain`` and ``audit`` all ask here;
``quantpatch layers`` prints the table that it decides by.
"""

from __future__ import annotations

import fnmatch
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
from torch import nn

from quantpatch.errors import EntryError
from quantpatch.interception.hooks import Slot
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.subclass import cannot_combine, combine, own_ways
from quantpatch.plugins.entry import Entry
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.quantize.reasons import (
    FloatBase,
    IsPart,
    IsQuantized,
    KeptFloat,
    NoEntry,
    Pattern,
    Reason,
    SkippedBy,
    SubclassOf,
)
from quantpatch.quantize.targets import imported_replacement, load_checked
from quantpatch.torch_tools.class_swap import dotted, written_name

#: What a table knows a target by: where its hook stands, or its dotted name while it is not imported.
Key = Slot | str


@attrs.frozen(cache_hash=True)
class Decision:
    """What becomes of one class or function.

    Attributes:
        name: Its dotted name: of a target that by which its entry knows it.
        entry: The entry for it, or for its nearest base that is a target; None if there is none.
        reason: Why it stays float; None if it is replaced.
        target: The class or function; None while it is not imported.
        replacement: What takes its place; None if it stays float, or as long as that is not imported.
    """

    name: str
    entry: Entry | None
    reason: Reason | None = None
    target: Any = attrs.field(default=None, eq=False)
    replacement: Any = attrs.field(default=None, eq=False)

    @classmethod
    def on(cls, key: Key, entry: Entry, reason: Reason | None = None) -> Decision:
        """What becomes of an entry's target."""
        return cls(entry.dotted, entry, reason, key.target if not isinstance(key, str) else None)

    @property
    def is_skipped(self) -> bool:
        """Whether a ``skip``, here or in a block around, leaves it float."""
        return isinstance(self.reason, SkippedBy)

    def __str__(self) -> str:
        if self.reason is not None or self.entry is None:
            return f"{self.name} stays float: {self.reason}"
        by = self.entry.replacement_name if self.replacement is None else dotted(self.replacement)
        return f"{self.name} -> {by} ({self.entry.source})"


class Table(dict[Key, Decision]):
    """What becomes of each target, imported or not. Only what has not been loaded yet changes in it.

    Args:
        decisions: By target.
        skip: Patterns that leave subclasses of targets float.
        subclasses: Whether subclasses of targets are replaced as well.
    """

    def __init__(
        self,
        decisions: Mapping[Key, Decision] | Iterable[tuple[Key, Decision]] = (),
        *,
        skip: Iterable[Pattern] = (),
        subclasses: bool = False,
    ) -> None:
        super().__init__(decisions)
        self.skip = tuple(skip)
        self.subclasses = subclasses

    def with_all(self, decisions: Iterable[tuple[Key, Decision]]) -> Table:
        """A table for the same subclasses."""
        return Table(decisions, skip=self.skip, subclasses=self.subclasses)

    def entry(self, key: Key) -> Entry:
        """The entry for a target."""
        entry = self[key].entry
        assert entry is not None  # it is for classes that are not targets only that there is none
        return entry

    @functools.cached_property
    def kept_float(self) -> Table:
        """The table of ``keep_float()`` in a block of this one."""
        reason = KeptFloat()
        return self.with_all((key, attrs.evolve(found, reason=reason)) for key, found in self.items())

    @functools.cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Where hooks stand: those of the targets that are imported."""
        return tuple(key for key in self if not isinstance(key, str))

    @functools.cached_property
    def waits_for(self) -> frozenset[str]:
        """Modules of targets that are not imported."""
        return frozenset(self.entry(key).module_name for key in self if isinstance(key, str))

    @functools.cached_property
    def may_be_reloaded(self) -> frozenset[str]:
        """Modules of targets that are imported, but for torch's."""
        modules = {str(slot.target.__module__) for slot in self.slots if self.entry(slot).plugin != BUILTIN}
        return frozenset(name for name in modules if name.partition(".")[0] != "torch")

    @functools.cached_property
    def _by_target(self) -> dict[Any, Slot]:
        return {slot.target: slot for slot in self.slots}

    def slot_of(self, target: Any) -> Slot | None:
        """The slot of exactly this class or function, if it is a target."""
        return self._by_target.get(target)

    def loaded(self, slot: Slot) -> Decision:
        """What becomes of a target, with its replacement if it has one.

        Raises:
            EntryError: The replacement cannot be imported, or cannot take the target's place.
        """
        found = self[slot]
        if found.reason is None and found.replacement is None:
            found = attrs.evolve(found, replacement=load_checked(self.entry(slot), slot))
            self.note(slot, found)
        return found

    def note(self, slot: Slot, decision: Decision) -> None:
        """Keeps what was decided of a target, once its replacement is known."""
        self[slot] = decision
        self.__dict__.pop("_replacements", None)

    @functools.cached_property
    def _replacements(self) -> dict[Any, str]:
        """What replaces targets, itself or by the name that its entry has for it, with the target's name."""
        found = {}
        for key, decision in self.items():
            entry = self.entry(key)
            found[entry.replacement if decision.replacement is None else decision.replacement] = entry.dotted
        return found

    def made_for(self, cls: type) -> str | None:
        """The name of the target that a class replaces, if it is a replacement or made from one."""
        known = self._replacements
        for base in cls.__mro__:
            target = known.get(base) or known.get(f"{base.__module__}:{written_name(base)}")
            if target is not None:
                return target
        quantized: Any = cls  # by one whose place another has taken here, or by code of its own
        is_made = issubclass(cls, QuantizedLayer) and hasattr(cls, "float_class")
        return dotted(quantized.float_class) if is_made else None

    @functools.cached_property
    def _parts(self) -> dict[type, str]:
        """Classes that replacements which are imported declare as parts of their targets."""
        return {
            part: decision.name
            for key, decision in self.items()
            for part in getattr(imported_replacement(self.entry(key)), "parts", {}).values()
        }

    def whole_of(self, part: type) -> str | None:
        """The name of the target that a class is a part of."""
        return self._parts.get(part)


def resolve(table: Table, target: Any) -> Decision:
    """What becomes of a class (or function) in a block, and why.

    Args:
        table: What the block replaces.
        target: The class or function; or the dotted name of a target that is not imported.

    Raises:
        EntryError: It is to be replaced, and its replacement cannot be imported, or cannot take its place.
    """
    if isinstance(target, str):
        return table.get(target) or Decision(target, None, NoEntry(is_layer=False))
    slot = table.slot_of(target)
    if slot is not None:
        return table.loaded(slot)
    name = dotted(target)
    if not isinstance(target, type):
        return Decision(name, None, NoEntry(is_layer=False), target)
    found, reason, replacement = _of_its_bases(table, target)
    return Decision(name, None if found is None else found.entry, reason, target, replacement)


def _of_its_bases(table: Table, cls: type) -> tuple[Decision | None, Reason | None, Any]:
    """What becomes of its nearest base that is a target; why the class stays float, or what replaces it."""
    made_for, whole = table.made_for(cls), table.whole_of(cls)
    if made_for is not None:
        return None, IsQuantized(made_for), None
    if whole is not None:
        return None, IsPart(whole), None
    skipped: Pattern | None = None
    for base in cls.__mro__:
        slot = table.slot_of(base)
        if slot is not None:
            break
        if skipped is None:
            skipped = next((pattern for pattern in table.skip if means(pattern, base)), None)
    else:
        return None, NoEntry(is_layer=issubclass(cls, nn.Module)), None
    found = table[slot]
    if found.reason is not None:
        kept = isinstance(found.reason, KeptFloat)
        return found, found.reason if kept else FloatBase(found.name, found.reason), None
    if skipped is not None:
        return found, SkippedBy(skipped), None
    try:
        replacement = table.loaded(slot).replacement
    except EntryError:
        if table.subclasses:
            raise
        return found, SubclassOf(found.name, None), None  # it would not be used
    obstacle = own_ways(replacement, cls)
    if obstacle is None and table.subclasses:
        obstacle = cannot_combine(replacement, cls)
        if obstacle is None:
            return found, None, combine(replacement, cls)
    return found, SubclassOf(found.name, obstacle), None


def resolver(table: Table) -> Callable[[Any], Decision]:
    """``resolve`` for a table, once for each class."""
    return functools.cache(functools.partial(resolve, table))


# --- what skip and include mean -----------------------------------------------------------------


def means(pattern: Pattern, cls: Any) -> bool:
    """Whether a pattern means a class, by the name that it was given by its own module or by another."""
    if isinstance(pattern, type):
        return cls is pattern
    return names(pattern, cls.__name__, dotted(cls)) or ("." in pattern and _found_under(pattern) is cls)


def names(pattern: str, name: str, dotted_name: str) -> bool:
    """Whether a pattern is one of two names, or a glob that fits one."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(dotted_name, pattern)


def _found_under(dotted_name: str) -> Any:
    """The object that a dotted name means in the modules imported so far, or None."""
    module, _, name = dotted_name.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
