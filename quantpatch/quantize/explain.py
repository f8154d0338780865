"""``explain``: who would replace a class (or function) in a block, who would not, and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import attrs

from quantpatch.errors import EntryError, UnknownNameError
from quantpatch.plugins.entry import Entry, EntryLike
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import registry
from quantpatch.quantize.compose import compose, custom_entry
from quantpatch.quantize.named_target import find_target
from quantpatch.quantize.options import Options
from quantpatch.quantize.reasons import Conflict, FloatBase, NoEntry, Pattern, SubclassOf
from quantpatch.quantize.resolve import Decision, Table, resolve
from quantpatch.quantize.targets import slot_of
from quantpatch.recipes.builtin import DEFAULT_RECIPE
from quantpatch.recipes.descriptor import Recipe
from quantpatch.reports.report import Report, table_of
from quantpatch.torch_tools.class_swap import dotted

if TYPE_CHECKING:
    from rich.console import Group

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
class Explanation(Report):
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

    _of_names = False
    _rows = ("claims",)

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        by = f" by {self.replacement}" if self.state == "replaced" else ""
        parts: list[Any] = [Text(f"{self.target}: {self.state}{by}"), Text(f"  {self.because}")]
        parts += [Text(f"  or: {way}") for way in self.ways]
        if self.claims:
            table = table_of("plugin", "distribution", "replacement", "verdict", "reason")
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


def explain(
    target: Any,
    recipe: str | Recipe | None = None,
    *,
    skip: Iterable[Pattern] | Pattern = (),
    custom: Iterable[EntryLike] | EntryLike = (),
    include: Iterable[Pattern] | Pattern = (),
    plugins: Iterable[str] | None = None,
    subclasses: bool | None = None,
) -> Explanation:
    """Says what a block does with a class or function, and why.

    Args:
        target: The class or function, its dotted name (``"torch.nn.Linear"``), or the bare name of
            something that there is an entry for (``"Linear"``). A module that no entry names is imported to
            look at what the name means.
        recipe: As in ``quantize_modules``, like the rest.
        skip: See there.
        custom: See there.
        include: See there.
        plugins: See there.
        subclasses: See there.

    Returns:
        The explanation; conflicts and failures of plugins are part of it.

    Raises:
        UnknownNameError: There is nothing by that name, or by one in ``skip``, ``include``, ``recipe`` or
            ``plugins``.
        ArgumentError: A bare name means several targets.
    """
    return _Case(Options.of(recipe, skip, custom, include, plugins, subclasses)).explain(target)


class _Case:
    """The plugins and their entries, as a block with these options would find them."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._infos = {info.name: info for info in registry.plugins()}
        named = options.plugins
        for name in named or ():
            if name not in self._infos:
                raise UnknownNameError.of("plugin", name, self._infos)
        self._blocked: list[Claim] = []
        self._failed: list[Claim] = []
        self._of_plugins: list[Entry] = []
        for name, info in self._infos.items():
            if info.state == "blocked" or not (named is None or name in named or name == BUILTIN):
                reason = info.reason or "plugins=[...] does not name it"
                self._blocked.append(self._claim(name, None, "blocked", reason))
            elif info.state == "failed":
                self._failed.append(self._claim(name, None, "failed", info.reason))
            else:
                self._of_plugins += info.entries
        self._entries = [*map(custom_entry, options.custom), *self._of_plugins]

    def _claim(self, plugin: str | None, entry: Entry | None, verdict: str, reason: str) -> Claim:
        info = None if plugin is None else self._infos[plugin]
        distribution = f"{info.distribution} {info.version}" if info and info.distribution else None
        return Claim(plugin, distribution, None if entry is None else entry.replacement_name, verdict, reason)

    def _claims(self, entries: Iterable[Entry], verdict: str, reason: str) -> list[Claim]:
        return [self._claim(entry.plugin, entry, verdict, reason) for entry in entries]

    def _is_for(self, entry: Entry, name: str, found: Any) -> bool:
        if entry.dotted == name:
            return True
        try:
            slot = slot_of(entry)
        except EntryError:
            return False
        return slot is not None and slot.target is found

    def explain(self, target: Any) -> Explanation:
        name, found = find_target(target, self._entries)
        rivals = [entry for entry in self._entries if self._is_for(entry, name, found)]
        if self._failed:
            claims = (*self._failed, *self._claims(rivals, "-", ""), *self._blocked)
            because = f"no block opens as long as plugin {self._failed[0].plugin!r} fails"
            ways = tuple(f"QUANTPATCH_BLOCK={claim.plugin} switches it off" for claim in self._failed)
            return Explanation(name, "error", None, because, ways, claims)
        try:
            decision = resolve(self._table(), name if found is None else found)
        except EntryError as error:
            skip = (f"skip=[{name!r}] leaves it float",)
            claims = tuple(self._ranked(error.entry, rivals, "wins", ""))
            return Explanation(name, "error", None, str(error), skip, claims)
        return self._explained(name, decision, rivals)

    def _table(self) -> Table:
        options = self._options
        recipe = registry.recipe(DEFAULT_RECIPE if options.recipe is None else options.recipe)
        return compose(
            self._of_plugins,
            plugins=options.plugins,
            skip=options.skip,
            include=(*recipe.include, *options.include),
            custom=options.custom,
            subclasses=options.subclasses,
        )

    def _explained(self, name: str, decision: Decision, rivals: list[Entry]) -> Explanation:
        entry, reason = decision.entry, decision.reason
        state: State = "float"
        because, by = str(reason), None
        ways: tuple[str, ...] = ()
        if isinstance(reason, Conflict):
            state, ways = "conflict", reason.ways
        elif isinstance(reason, (FloatBase, SubclassOf, NoEntry)):
            ways = (_CUSTOM,)
        elif entry is not None and reason is None and decision.target is None:
            state = "waiting"
            because = (
                f"{entry.module_name} is not imported; a block takes the entry up once it is, also inside"
            )
        elif entry is not None and reason is None:
            state, by = "replaced", dotted(decision.replacement)
            if entry not in rivals:
                because = f"a subclass of {entry.dotted} that computes as it does; subclasses=True"
            else:
                because = f"by {entry.source}"
                ways = () if entry.plugin is None else (f"skip=[{entry.name!r}] leaves it float",)
        return Explanation(name, state, by, because, ways, tuple(self._ordered(decision, rivals)))

    def _ordered(self, decision: Decision, rivals: list[Entry]) -> list[Claim]:
        """What each plugin has to do with the target, the winner first."""
        entry, reason = decision.entry, decision.reason
        if entry is None:
            return self._blocked
        if entry not in rivals:
            return [*self._claims([entry], "-", f"is for {entry.dotted}"), *self._blocked]
        if isinstance(reason, Conflict):
            others = [other for other in rivals if other not in reason.entries]
            return [
                *self._claims(reason.entries, "in conflict", reason.rivals),
                *self._claims(others, "loses", "plugins come before built-ins"),
                *self._blocked,
            ]
        verdict = "wins" if reason is None else "left float"
        return self._ranked(entry, rivals, verdict, "" if reason is None else str(reason))

    def _ranked(self, winner: Entry, rivals: list[Entry], verdict: str, reason: str) -> list[Claim]:
        before = "custom comes before plugins" if winner.plugin is None else "plugins come before built-ins"
        others = [entry for entry in rivals if entry != winner]
        return [
            *self._claims([winner], verdict, reason),
            *self._claims(others, "loses", f"to {winner.source}: {before}"),
            *self._blocked,
        ]


_CUSTOM = "custom=[(module, name, replacement)] gives an entry for it"
