"""``explain``: who would replace a class (or function) in a block, who would not, and why."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable
from typing import Any, Literal

import attrs
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text
from torch import nn

from quantpatch.errors import EntryConflictError, EntryError, ScopeError, UnknownNameError
from quantpatch.interception.hooks import Slot
from quantpatch.layers.subclass import combine, why_float
from quantpatch.plugins.entry import Entry, EntryLike
from quantpatch.plugins.plugin import BUILTIN, Offer
from quantpatch.plugins.registry import registry
from quantpatch.quantize.options import Settings
from quantpatch.quantize.resolve import PARTS, Choice, Pattern, Table, compose, key_of, nearest
from quantpatch.quantize.targets import load_checked, own_class, slot_of
from quantpatch.recipes.builtin import DEFAULT_RECIPE
from quantpatch.recipes.descriptor import Recipe
from quantpatch.report.render import as_text
from quantpatch.torch_tools.class_swap import dotted

__all__ = ["Claim", "Explanation", "explain"]

State = Literal["replaced", "float", "conflict", "waiting", "error"]


@attrs.frozen
class Claim:
    """What one plugin (or ``custom``) has to do with the target.

    Attributes:
        plugin: Name of the plugin; None for an entry given as ``custom``.
        distribution: Name and version of its distribution, or None.
        replacement: What it would put in the target's place; None if it was not asked.
        verdict: ``"wins"``, ``"loses"``, ``"left float"``, ``"in conflict"``, ``"blocked"``, ``"failed"``
            or ``"-"`` where it is not decided.
        reason: Why.
    """

    plugin: str | None
    distribution: str | None
    replacement: str | None
    verdict: str
    reason: str


@attrs.frozen
class Explanation:
    """What a block does with one target; prints as a table.

    Attributes:
        target: Dotted name of the class or function.
        state: ``"replaced"``; ``"float"``; ``"conflict"``, where no block opens before it is settled;
            ``"waiting"`` for its module to be imported; ``"error"``, where no block opens at all.
        replacement: Dotted name of what takes its place, or None.
        because: Why, in one sentence.
        ways: What to write to have it otherwise.
        claims: What each plugin has to do with it, the winner first.
    """

    target: str
    state: State
    replacement: str | None
    because: str
    ways: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(attrs.asdict(self), indent=2)

    def __rich__(self) -> Group:
        by = f" by {self.replacement}" if self.state == "replaced" else ""
        parts: list[Any] = [Text(f"{self.target}: {self.state}{by}"), Text(f"  {self.because}")]
        parts += [Text(f"  or: {way}") for way in self.ways]
        if self.claims:
            table = RichTable()
            for heading in ("plugin", "distribution", "replacement", "verdict", "reason"):
                table.add_column(heading, overflow="fold")
            for claim in self.claims:
                table.add_row(
                    claim.plugin or "custom",
                    claim.distribution or "-",
                    claim.replacement or "-",
                    claim.verdict,
                    claim.reason,
                )
            parts.append(table)
        return Group(*parts)

    def __str__(self) -> str:
        return as_text(self)


def explain(
    target: Any,
    skip: Iterable[Pattern] | Pattern = (),
    custom: Iterable[EntryLike] | EntryLike = (),
    recipe: str | Recipe | None = None,
    plugins: Iterable[str] | None = None,
    *,
    include: Iterable[Pattern] | Pattern = (),
    subclasses: bool | None = None,
) -> Explanation:
    """Says what a block does with a class or function, and why.

    Args:
        target: The class or function, its dotted name (``"torch.nn.Linear"``), or the bare name of
            something that there is an entry for (``"Linear"``). A module that no entry names is imported to
            look at what the name means.
        skip: As in ``quantize_modules``, like the rest.
        custom: See there.
        recipe: See there.
        plugins: See there.
        include: See there.
        subclasses: See there.

    Returns:
        The explanation; conflicts and failures of plugins are part of it.

    Raises:
        UnknownNameError: Nothing goes by that name, or by one in ``skip``, ``include``, ``recipe`` or
            ``plugins``.
        ScopeError: A bare name means several targets.
    """
    settings = Settings.of(skip, custom, recipe, plugins, include, subclasses)
    return _Case(settings).explain(target)


class _Case:
    """The plugins and their entries, as a block with these settings would find them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._custom = [Offer(Entry.of(given), None) for given in settings.custom]
        self._infos = {info.name: info for info in registry.plugins()}
        named = settings.plugins
        for name in named or ():
            if name not in self._infos:
                raise UnknownNameError.of("plugin", name, self._infos)
        left_out = {n for n in self._infos if named is not None and n not in named and n != BUILTIN}
        self._blocked = [
            self._claim(info.name, None, "blocked", info.reason or "plugins=[...] does not name it")
            for info in self._infos.values()
            if info.state == "blocked" or info.name in left_out
        ]
        self._failed = [
            self._claim(info.name, None, "failed", info.reason)
            for info in self._infos.values()
            if info.state == "failed" and info.name not in left_out
        ]
        self._offers = [
            Offer(entry, info.name)
            for info in self._infos.values()
            if info.state == "active" and info.name not in left_out
            for entry in info.entries
        ]

    def _claim(self, plugin: str | None, offer: Offer | None, verdict: str, reason: str) -> Claim:
        info = None if plugin is None else self._infos[plugin]
        distribution = f"{info.distribution} {info.version}" if info and info.distribution else None
        replacement = None if offer is None else str(offer.entry).partition(" -> ")[2]
        return Claim(plugin, distribution, replacement, verdict, reason)

    # --- what the target is ----------------------------------------------------------------------

    def _find(self, target: Any) -> tuple[str, Any]:
        """Its dotted name, and the object if its module is imported (or no entry names it)."""
        if not isinstance(target, str):
            if not callable(target) or not hasattr(target, "__qualname__"):
                raise ScopeError(f"explain takes a class, a function or its dotted name, not {target!r}")
            return dotted(target), target
        target = target.replace(":", ".")
        entries = {o.entry.dotted: o.entry for o in (*self._offers, *self._custom)}
        if "." not in target:
            same = sorted(name for name, entry in entries.items() if entry.name == target)
            if len(same) > 1:
                raise ScopeError(f"{target!r} means several targets: {', '.join(same)}; write one of these")
            if not same:
                raise UnknownNameError.of("layer", target, entries)
            target = same[0]
        if target not in entries:
            target = _exported_as(target, entries.values()) or target
        if target in entries:
            module = entries[target].loaded_module()
            found = None if module is None else getattr(module, entries[target].name, None)
            return target, own_class(entries[target], found) if isinstance(found, type) else found
        return target, _imported(target, entries)

    def _claimants(self, name: str, found: Any) -> list[Offer]:
        return [offer for offer in (*self._custom, *self._offers) if self._is_for(offer, name, found)]

    def _is_for(self, offer: Offer, name: str, found: Any) -> bool:
        if offer.entry.dotted == name:
            return True
        try:
            slot = slot_of(offer)
        except EntryError:
            return False
        return slot is not None and slot.target is found

    # --- what a block does with it ---------------------------------------------------------------

    def explain(self, target: Any) -> Explanation:
        name, found = self._find(target)
        claimants = self._claimants(name, found)
        if self._failed:
            claims = [*self._failed, *(self._claim(o.plugin, o, "-", "") for o in claimants), *self._blocked]
            return Explanation(
                name,
                "error",
                None,
                f"no block opens as long as plugin {self._failed[0].plugin!r} fails",
                tuple(f"QUANTPATCH_BLOCK={claim.plugin} switches it off" for claim in self._failed),
                tuple(claims),
            )
        try:
            table = self._table(claimants)
        except EntryConflictError as error:
            return self._conflict(name, error, claimants)
        key, choice = next(
            ((key, c) for key, c in table.items() if claimants and c.offer in claimants), (None, None)
        )
        if choice is None:
            return self._without_entry(name, found, table)
        ranked = self._ranked(choice.offer, claimants, choice.float_because)
        if choice.float_because:
            return Explanation(name, "float", None, choice.float_because, (), ranked)
        if not isinstance(key, Slot):
            module = choice.offer.entry.module_name
            because = f"{module} is not imported; a block takes the entry up once it is, also inside"
            return Explanation(name, "waiting", None, because, (), ranked)
        try:
            replacement = dotted(load_checked(choice.offer, key))
        except EntryError as error:
            return Explanation(name, "error", None, str(error), (f"skip=[{name!r}] leaves it float",), ranked)
        ways = () if choice.offer.plugin is None else (f"skip=[{choice.offer.entry.name!r}] leaves it float",)
        return Explanation(name, "replaced", replacement, f"by {choice.offer.source}", ways, ranked)

    def _table(self, claimants: list[Offer]) -> Table:
        """The block's table; conflicts about other targets are no concern here."""
        of_plugins = [(key_of(offer), offer) for offer in self._offers if offer.plugin != BUILTIN]
        first = dict(reversed(of_plugins))
        offers = [offer for offer in self._offers if offer.plugin == BUILTIN]
        offers += [offer for key, offer in of_plugins if offer in claimants or first[key] is offer]
        settings = self._settings
        recipe = registry.recipe(DEFAULT_RECIPE if settings.recipe is None else settings.recipe)
        return compose(
            Table(),
            offers,
            plugins=settings.plugins,
            skip=settings.skip,
            include=(*recipe.include, *settings.include),
            custom=settings.custom,
        )

    def _ranked(self, winner: Offer, claimants: list[Offer], float_because: str) -> tuple[Claim, ...]:
        verdict, reason = ("left float", float_because) if float_because else ("wins", "")
        claims = [self._claim(winner.plugin, winner, verdict, reason)]
        before = "custom comes before plugins" if winner.plugin is None else "plugins come before built-ins"
        claims += [
            self._claim(o.plugin, o, "loses", f"to {winner.source}: {before}")
            for o in claimants
            if o != winner
        ]
        return (*claims, *self._blocked)

    def _conflict(self, name: str, error: EntryConflictError, claimants: list[Offer]) -> Explanation:
        rivals = " and ".join(map(repr, error.plugins))
        claims = [
            self._claim(o.plugin, o, "in conflict", f"{rivals} both replace it")
            if o.plugin in error.plugins
            else self._claim(o.plugin, o, "loses", "plugins come before built-ins")
            for o in claimants
        ]
        ways = (
            f"skip=[{name!r}] leaves it float",
            "custom=[(module, name, replacement)] decides for it",
            f"QUANTPATCH_BLOCK={error.plugins[-1]} switches one plugin off",
        )
        because = f"{rivals} both replace it, and no block opens before one is chosen"
        return Explanation(name, "conflict", None, because, ways, (*claims, *self._blocked))

    def _without_entry(self, name: str, found: Any, table: Table) -> Explanation:
        blocked = tuple(self._blocked)
        if not isinstance(found, type) or not issubclass(found, nn.Module):
            because = "there is no entry for it, and it is no class of layers"
            return Explanation(name, "float", None, because, (_CUSTOM,), blocked)
        of = next((o for o in self._offers if _replaces(o, found)), None)
        if of is not None:
            because = f"it is quantized itself: it replaces {of.entry.dotted} ({of.source})"
            return Explanation(name, "float", None, because, (), blocked)
        if name in PARTS:
            because = "it is a part of another layer, which multiplies with its weights itself"
            return Explanation(name, "float", None, because, (), blocked)
        base = nearest(table, found)
        if base is None:
            return Explanation(name, "float", None, "there is no entry for it", (_CUSTOM,), blocked)
        return self._subclass(name, found, *base)

    def _subclass(self, name: str, found: type, slot: Slot, choice: Choice) -> Explanation:
        target = choice.offer.entry.dotted
        claims = (self._claim(choice.offer.plugin, choice.offer, "-", f"is for {target}"), *self._blocked)
        if choice.float_because:
            because = f"a subclass of {target}, which stays float: {choice.float_because}"
            return Explanation(name, "float", None, because, (_CUSTOM,), claims)
        wanted = bool(self._settings.subclasses)
        replacement = load_checked(choice.offer, slot)
        because = why_float(replacement, found, target, wanted=wanted)
        if because:
            return Explanation(name, "float", None, because, (_CUSTOM,), claims)
        because = f"a subclass of {target} that computes as it does; subclasses=True"
        return Explanation(name, "replaced", dotted(combine(replacement, found)), because, (), claims)


_CUSTOM = "custom=[(module, name, replacement)] gives an entry for it"


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


def _replaces(offer: Offer, cls: type) -> bool:
    replacement = offer.entry.replacement
    if isinstance(replacement, str):  # not imported for this: then nothing could be made of it either
        return replacement == f"{cls.__module__}:{cls.__qualname__}"
    return replacement is cls


def _imported(name: str, known: Iterable[str]) -> Any:
    """What a dotted name means; imports its module."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise ScopeError(f"{name} cannot be imported: {error}") from error
            continue
        except Exception as error:
            raise ScopeError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
        for part in parts[end:]:
            found = getattr(found, part, None)
        if callable(found):
            return found
        break
    raise UnknownNameError.of("layer", name, known, "`quantpatch layers` lists what there are entries for")
