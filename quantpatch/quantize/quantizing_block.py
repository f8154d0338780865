"""One block: what it replaces, what it makes of what is built in it, and its end."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import attrs
from torch import nn

from quantpatch.errors import ArgumentError, EntryError, QuantPatchWarning, warn_caller
from quantpatch.interception.block import Block, is_being_replaced, open_here
from quantpatch.interception.built_modules import Built
from quantpatch.interception.construction import when_constructed
from quantpatch.interception.hooks import Slot
from quantpatch.interception.import_watch import ImportWatch
from quantpatch.interception.slots import lock
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.subclass import own_ways, take_over
from quantpatch.quantize.configure import apply_rules
from quantpatch.quantize.operations import OperationRule, OperationsOption, quantize_operations
from quantpatch.quantize.outcome import Outcome
from quantpatch.quantize.reasons import BuiltDirectly
from quantpatch.quantize.resolve import Decision, Key, Table, resolve
from quantpatch.quantize.targets import slot_of
from quantpatch.recipes.descriptor import Recipe
from quantpatch.torch_tools import debug_trace
from quantpatch.torch_tools.class_swap import dotted, own_class


def quantize_operations_early(model: nn.Module) -> None:
    """Has a model that was built in a block quantize its operations now instead of when the block ends.

    For what loads it inside the block and asks for its quantizers. Outside of blocks, and in those without
    operations, nothing happens.

    Raises:
        ConversionError: Something may multiply and cannot be followed, and ``strict`` was asked for.
    """
    blocks: Any = open_here()
    inside = next((block.with_operations for block in blocks), None)
    for block in blocks:
        if inside is not None and block.with_operations is inside and block.operations is not None:
            block.quantize_operations(model)
            return


class QuantizingBlock(Block):
    """One opening of a ``Scope``, with its table, its recipe, and the watch for late imports.

    Attributes:
        table: What a block inside starts from.
        recipe: How layers are quantized.
        outcome: Counts what is built.
        built: Which models the recipe's rules will be applied to ...
        applies_rules: ... by this block, which brought the recipe.
        with_operations: Which models get quantized operations ...
        operations: ... from this block; None: from the one around, if from any.
        kept_out_of: Those of the block around, if this one sees to what is built in it.
    """

    def __init__(
        self,
        scope: object,
        table: Table,
        recipe: Recipe,
        *,
        outcome: Outcome,
        keep_float: bool = False,
        built: Built | None = None,
        applies_rules: bool = False,
        with_operations: Built | None = None,
        operations: OperationsOption | None = None,
        kept_out_of: Built | None = None,
        strict: bool = False,
    ) -> None:
        self.recipe = recipe
        self.outcome = outcome
        self.built = built
        self.applies_rules = applies_rules
        self.with_operations = with_operations
        self.operations = operations
        self._used: set[OperationRule] = set()
        self._strict = strict
        self._kept_out_of = kept_out_of
        self._keep_float = keep_float
        self._use(table)
        watched = table.waits_for | table.may_be_reloaded
        super().__init__(scope, ImportWatch(watched, self._imported) if watched else None)

    def _use(self, table: Table) -> None:
        self.table = table
        self._decisions = table.kept_float if self._keep_float else table
        self._late: dict[type, Callable[[Any], None] | None] = {}  # by class, for objects that came by late

    def install(self) -> None:
        """Puts in the hooks."""
        slots = self.table.slots
        watches = bool(slots) or any(
            built is not None for built in (self.built, self.with_operations, self._kept_out_of)
        )
        self.open((*slots, Slot.of_root(nn.Module)) if watches else ())  # where every module comes by
        if debug_trace.is_on():
            self._say_what_it_replaces()

    def _say_what_it_replaces(self) -> None:
        float_ = sum(decision.reason is not None for decision in self._decisions.values())
        waiting = self.table.waits_for
        later = f"; waits for {', '.join(sorted(waiting))}" if waiting else ""
        debug_trace.say(
            f"{self.scope!r} opened, recipe {self.recipe.name}: replaces {len(self.table) - float_} targets, "
            f"leaves {float_} float{later}"
        )

    def name_of(self, slot: Slot) -> str:
        """What a target is called in messages."""
        return self.table[slot].name if slot in self.table else dotted(slot.target)

    # --- what is built -------------------------------------------------------------------------

    def replacement_for(self, slot: Slot) -> Any | None:
        """The replacement, unless the target stays float here."""
        decision = self._decisions.get(slot)
        if decision is None or decision.reason is not None:
            return None
        if decision.replacement is None:  # its target was imported since the block was opened
            decision = self._decisions.loaded(slot)
            self._decisions.note(slot, decision)  # in another table, if its import has brought other targets
        return decision.replacement

    def came_out(self, slot: Slot) -> None:
        """Counts it."""
        decision = self._decisions.get(slot)
        if decision is not None:
            self.outcome.count(decision)

    def subclass_came_out(self, slot: Slot, thing: Any) -> None:
        """Sees to what is not a module."""
        if not isinstance(thing, nn.Module):  # modules are seen at their root
            self._met(thing)

    def passed_root(self, thing: Any) -> None:
        """Sees to modules: what recipes' rules are for, and what no hook has replaced."""
        for built in (self.built, self.with_operations):
            if built is not None:
                built.add(thing)
        if self._kept_out_of is not None:
            self._kept_out_of.leave_out(thing)
        self._met(thing)

    def _met(self, thing: Any) -> None:
        """Sees an object that no hook has replaced: of a subclass, or built by ways that pass the hook by."""
        cls = type(thing)
        late = self._late[cls] if cls in self._late else self._late.setdefault(cls, self._late_for(cls))
        if late is not None:
            late(thing)

    def _late_for(self, cls: type) -> Callable[[Any], None] | None:
        decision, slot = resolve(self._decisions, cls), self._decisions.slot_of(cls)
        if decision.entry is None:
            return None
        if slot is not None:
            if decision.reason is not None:
                return None  # its hook has counted it
            obstacle = own_ways(decision.replacement, cls)
            if obstacle is not None:
                decision = attrs.evolve(decision, reason=BuiltDirectly(obstacle))

        def late(thing: Any) -> None:
            if slot is not None and is_being_replaced(slot):
                return
            if decision.reason is not None:
                self.outcome.count(decision)
            else:
                when_constructed(thing, functools.partial(self._take_over, thing, cls, decision))

        return late

    def _take_over(self, layer: Any, cls: type, decision: Decision) -> None:
        if own_class(layer) is not cls:  # two of its bases have come by
            return
        take_over(layer, decision.replacement, self.recipe)
        self.outcome.count(decision)

    # --- what is imported ----------------------------------------------------------------------

    def _put(self, slot: Slot, decision: Decision, instead_of: Key | None = None) -> None:
        """Notes a target. In a table of this block's own: others may have the one so far as well.

        The replacement is imported at its first use: at this moment its own imports may be half done.
        """
        with lock:
            decisions = {key: found for key, found in self.table.items() if key != instead_of}
            decisions[slot] = attrs.evolve(decision, target=slot.target, replacement=None)
            self._use(self.table.with_all(decisions.items()))

    def _imported(self, module: ModuleType) -> None:
        """Takes up the entries that waited for a module, and targets that it defines again."""
        table = self.table
        for key, decision in table.items():
            if not isinstance(key, str):
                self._reloaded(key, decision, module)
            elif table.entry(key).module_name == module.__name__:
                self._take_up(key, decision)

    def _reloaded(self, slot: Slot, decision: Decision, module: ModuleType) -> None:
        target = slot.target
        if slot.owner is module:  # a function, and reloading has put another one in the place of the hook
            self.add(slot)
        elif isinstance(target, type) and target.__module__ == module.__name__:
            found = vars(module).get(target.__name__)
            if isinstance(found, type) and found is not target and dotted(found) == dotted(target):
                # Whether the replacement fits the new class is seen at its first use: by then whatever
                # reloads has had the time to update the old one, which the replacement is made from.
                new = Slot.of_class(found)
                self._put(new, decision)
                self.add(new)

    def _take_up(self, name: str, decision: Decision) -> None:
        entry = self.table.entry(name)
        try:
            slot = slot_of(entry)
        except EntryError as error:  # an exception here would break an import that is not ours
            warnings.warn(f"{error}; nothing was replaced", QuantPatchWarning, stacklevel=2)
            return
        if slot is None:  # an optional one, which this version of its package does not have
            return
        self._put(slot, self.table.get(slot, decision), instead_of=name)
        self.add(slot)
        used = self.table.entry(slot)
        if used.plugin != entry.plugin:
            warnings.warn(
                f"{entry.dotted} is replaced by {used.source}; the entry of {entry.source} is not used",
                QuantPatchWarning,
                stacklevel=2,
            )

    # --- at its end ----------------------------------------------------------------------------

    def quantize_operations(self, early: nn.Module | None = None) -> None:
        """Has what was built quantize the operations inside forwards.

        Args:
            early: A model that needs it before the end, alone.

        Raises:
            ArgumentError: A rule matches nothing.
            ConversionError: Something may multiply and cannot be followed, and ``strict`` was asked for.
        """
        if self.operations is None or self.with_operations is None:
            return
        inside, table = self.with_operations, self.table
        quantize_operations(
            inside.roots() if early is None else [early],
            self.operations if early is None else attrs.evolve(self.operations, demands=False),
            self.recipe,
            self.outcome,
            leave=lambda module: inside.leaves_out(module) or resolve(table, own_class(module)).is_skipped,
            strict=self._strict,
            used=self._used,
        )

    def apply_rules(self) -> None:
        """Applies the recipe's rules to the models that were built.

        Raises:
            ArgumentError: A pattern matches nothing in any of them; the models are quantized as without
                rules.
        """
        assert self.built is not None
        recipe, roots = self.recipe, self.built.roots()
        if not any(isinstance(module, QuantizedLayer) for root in roots for module in root.modules()):
            if self.built.count:
                warn_caller(
                    f"the rules of recipe {recipe.name!r} were applied to nothing: no quantized layer that "
                    f"was built in the block is left at its end. For copies of layers write "
                    f"configure(model, rules)"
                )
            return
        try:
            apply_rules(roots, recipe.rules)
        except ArgumentError as error:
            built = " and ".join(dict.fromkeys(type(root).__name__ for root in roots))
            raise ArgumentError(
                f"the rules of recipe {recipe.name!r} were not applied to {built}: {error}", rules=error.value
            ) from error
