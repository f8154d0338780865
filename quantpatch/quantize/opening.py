"""One opening of a block: what it replaces, what it makes of what is built in it, and its end."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import attrs
from torch import nn

from quantpatch.errors import EntryError, QuantPatchWarning
from quantpatch.interception import hooks
from quantpatch.interception.built_modules import Built
from quantpatch.interception.construction import settle, when_constructed
from quantpatch.interception.hooks import Activation, Policy, Slot
from quantpatch.interception.import_watch import ImportWatch
from quantpatch.layers.subclass import combine, own_ways, take_over, why_float
from quantpatch.quantize.outcome import Outcome
from quantpatch.quantize.resolve import Choice, Key, Table, load, nearest
from quantpatch.quantize.targets import slot_of
from quantpatch.recipes.descriptor import Recipe
from quantpatch.torch_tools import debug_trace
from quantpatch.torch_tools.class_swap import dotted, own_class

__all__ = ["Opening"]


class Opening(Policy):
    """What belongs to one opening of a scope: its table, its recipe, and the watch for late imports."""

    def __init__(
        self,
        scope: object,
        table: Table,
        recipe: Recipe,
        *,
        outcome: Outcome,
        float_because: str = "",
        subclasses: bool = False,
        built: Built | None = None,
        applies_rules: bool = False,
    ) -> None:
        self.scope = scope
        self.outcome = outcome
        self.float_because = float_because  # if not empty, nothing is replaced
        self.table = table  # may be another opening's as well: copied before it is changed
        self.recipe = recipe
        self.subclasses = subclasses
        self.built = built  # what the recipe's rules will be applied to ...
        self.applies_rules = applies_rules  # ... by the opening that brought the recipe
        self._late: dict[type, Callable[[Any], None] | None] = {}  # by class, for objects that came by late
        watched = table.waits_for | table.may_be_reloaded
        self.activation = Activation(self, ImportWatch(watched, self._imported) if watched else None)

    def open(self) -> None:
        """Puts in the hooks."""
        slots = self.table.slots
        watches = bool(slots) or self.built is not None
        self.activation.open((*slots, _module_slot()) if watches else ())
        if debug_trace.is_on():
            self._say_what_it_replaces()

    def _say_what_it_replaces(self) -> None:
        choices = self.table.values()
        float_ = sum(bool(self.float_because or choice.float_because) for choice in choices)
        waiting = self.table.waits_for
        later = f"; waits for {', '.join(sorted(waiting))}" if waiting else ""
        debug_trace.say(
            f"{self.scope!r} opened, recipe {self.recipe.name}: replaces {len(choices) - float_} targets, "
            f"leaves {float_} float{later}"
        )

    # --- what is built -------------------------------------------------------------------------

    def replacement_for(self, slot: Slot) -> Any | None:
        """The replacement, unless the target stays float here."""
        choice = self.table.get(slot)
        if choice is None or self._because(choice):
            return None
        return self._loaded(slot, choice).replacement

    def came_out(self, slot: Slot) -> None:
        """Counts it."""
        choice = self.table.get(slot)
        if choice is not None:
            self.outcome.count(choice.offer, self._because(choice), target=choice.stranger)

    def subclass_came_out(self, slot: Slot, thing: Any) -> None:
        """Sees to what is no module."""
        if not isinstance(thing, nn.Module):  # modules are seen at their root
            self._met(thing)

    def passed_root(self, thing: Any) -> None:
        """Sees to modules: what recipes' rules are for, and what no hook has replaced."""
        if self.built is not None:
            self.built.add(thing)
        self._met(thing)

    def _met(self, thing: Any) -> None:
        """Sees an object that no hook has replaced: of a subclass, or built by ways that pass the hook by."""
        cls = type(thing)
        late = self._late[cls] if cls in self._late else self._late.setdefault(cls, self._late_for(cls))
        if late is not None:
            late(thing)

    def _late_for(self, cls: type) -> Callable[[Any], None] | None:
        found = nearest(self.table, cls)
        if found is None:
            return None
        slot, choice = found
        because, exact = self._because(choice), cls is slot.target
        if because and exact:
            return None  # its hook has told of it
        if not because and (self.subclasses or exact):
            choice = self._loaded(slot, choice)
        target = choice.offer.entry.dotted
        if exact:
            because = own_ways(choice.replacement, cls)
            because = (
                because and f"built by an __init__ saved or wrapped by other code; it is a class {because}"
            )
        else:
            because = because or why_float(choice.replacement, cls, target, wanted=self.subclasses)

        def late(thing: Any) -> None:
            if exact and hooks.is_being_replaced(slot):
                return
            if because:
                self.outcome.count(choice.offer, because, target=dotted(cls))
            else:
                when_constructed(thing, functools.partial(self._take_over, thing, cls, choice))

        return late

    def _take_over(self, layer: Any, cls: type, choice: Choice) -> None:
        if own_class(layer) is not cls:  # two of its bases have come by
            return
        exact = issubclass(choice.replacement, cls)
        combined = choice.replacement if exact else combine(choice.replacement, cls)
        take_over(layer, combined, self.recipe)
        names = {} if exact else {"target": dotted(cls), "replacement": dotted(combined)}
        self.outcome.count(choice.offer, **names)

    def _because(self, choice: Choice) -> str:
        return self.float_because or choice.float_because

    def _loaded(self, slot: Slot, choice: Choice) -> Choice:
        """The choice with its replacement, also if the target was imported since the block was opened."""
        if choice.replacement is None:
            choice = load(slot, choice)
            self._put(slot, choice)
        return choice

    # --- what is imported ----------------------------------------------------------------------

    def _put(self, key: Slot, choice: Choice, instead_of: Key | None = None) -> None:
        with hooks.lock:
            choices = {k: c for k, c in self.table.items() if k != instead_of}
            choices[key] = choice
            self.table = Table(choices, self.table.skip)
            self._late = {}

    def _imported(self, module: ModuleType) -> None:
        """Takes up the entries that waited for a module, and targets that it defines again."""
        for key, choice in self.table.items():
            if isinstance(key, Slot):
                self._reloaded(key, choice, module)
            elif choice.offer.entry.module_name == module.__name__:
                self._take_up(key, choice)

    def _reloaded(self, key: Slot, choice: Choice, module: ModuleType) -> None:
        target = key.target
        if key.owner is module:  # a function, and reloading has put another one in the place of the hook
            self.activation.add(key)
        elif isinstance(target, type) and target.__module__ == module.__name__:
            found = vars(module).get(target.__name__)
            if isinstance(found, type) and found is not target and dotted(found) == dotted(target):
                # Whether the replacement fits the new class is seen at its first use: by then whoever
                # reloads has had the time to update the old one, which the replacement is made from.
                slot = Slot.of_class(found)
                self._put(slot, attrs.evolve(choice, replacement=None))
                self.activation.add(slot)

    def _take_up(self, key: str, choice: Choice) -> None:
        try:
            slot = slot_of(choice.offer)
        except EntryError as error:  # an exception here would break an import that is not ours
            warnings.warn(f"{error}; nothing was replaced", QuantPatchWarning, stacklevel=2)
            return
        if slot is None:  # an optional one, which this version of its package does not have
            return
        earlier = self.table.get(slot)
        # The replacement is imported at its first use: here its own imports may be half done.
        self._put(slot, earlier or choice, instead_of=key)
        self.activation.add(slot)
        if earlier is not None and earlier.offer.plugin != choice.offer.plugin:
            warnings.warn(
                f"{choice.offer.entry.dotted} is replaced by {earlier.offer.source}; the entry of "
                f"{choice.offer.source} is not used",
                QuantPatchWarning,
                stacklevel=2,
            )

    def close(self) -> list[str]:
        """Ends it; returns the names of targets whose hook somebody else has displaced."""
        displaced = self.activation.close()
        settle()
        return sorted(
            self.table[slot].offer.entry.dotted if slot in self.table else dotted(slot.target)
            for slot in displaced
        )


def _module_slot() -> Slot:
    """Where every module comes by while it is built."""
    return Slot.of_root(nn.Module)
