"""Commands that say what there is: plugins, recipes, layers, and what a block does with one class."""

from __future__ import annotations

import itertools
import json
from typing import Annotated, Any

import attrs
import typer
from rich.table import Table

from quantpatch.cli.app import AsJson, app, look_here, print_report, print_text, with_block
from quantpatch.errors import shown
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import registry
from quantpatch.quantize.compose import compose
from quantpatch.quantize.explain import explain
from quantpatch.quantize.reasons import NotByDefault
from quantpatch.quantize.resolve import Decision
from quantpatch.recipes.builtin import DEFAULT_RECIPE
from quantpatch.recipes.descriptor import CHANNEL, REDUCTION, QuantDescriptor
from quantpatch.reports.folding import alike
from quantpatch.reports.report import table_of


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def _add_row(table: Table, *cells: Any) -> None:
    """Adds a row of what may come from plugins, whose names and messages a terminal is not to act on."""
    table.add_row(*(shown(cell, 4000, keep="\n") for cell in cells))


@app.command()
def plugins(as_json: AsJson = False) -> None:
    """List the plugins that are installed, and whether they take part."""
    found = registry.plugins()
    if as_json:
        _print_json(
            [{**attrs.asdict(p, recurse=False), "entries": [str(e) for e in p.entries]} for p in found]
        )
        return
    table = table_of("plugin", "distribution", "state", "hooks", "entries")
    for plugin in found:
        distribution = f"{plugin.distribution} {plugin.version}" if plugin.distribution else "-"
        state = f"{plugin.state}: {plugin.reason}" if plugin.reason else plugin.state
        hooks = ", ".join(hook.removeprefix("quantpatch_") for hook in plugin.hooks) or "-"
        _add_row(table, plugin.name, distribution, state, hooks, len(plugin.entries))
    print_text(table)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes: how each quantizes what layers take and hold, what it costs, and what it is for."""
    found = registry.recipes()
    operands: tuple[str, ...] = ("input", "weight", "output", "hidden")
    if as_json:
        rows = [
            {
                "name": name,
                "plugin": plugin,
                "about": recipe.about,
                "bits_per_weight": _bits(recipe.weight),
                **{o: _descriptor(getattr(recipe, o)) for o in operands},
            }
            for name, (recipe, plugin) in found.items()
        ]
        _print_json(rows)
        return
    # No column for what every recipe leaves float.
    operands = tuple(o for o in operands if any(getattr(recipe, o) for recipe, _ in found.values()))
    # Nor for who has a recipe, if all are the library's own.
    others = any(plugin != BUILTIN for _, plugin in found.values())
    bits = "bits a weight"
    table = table_of("recipe", *operands, bits, "for", *["plugin"] * others, right=(bits,))
    for name, (recipe, plugin) in found.items():
        said = (f"{_bits(recipe.weight):g}", recipe.about, *[plugin] * others)
        _add_row(table, name, *(_in_words(getattr(recipe, o)) for o in operands), *said)
    print_text(table)


def _bits(weight: QuantDescriptor | None) -> float:
    """Storage of a weight's element, with its share of a block's scale."""
    return 32.0 if weight is None else float(registry.format(weight).bits_with_scale)


def _descriptor(descriptor: QuantDescriptor | None) -> dict[str, Any] | None:
    if descriptor is None:
        return None
    return {**attrs.asdict(descriptor, recurse=False), "format": registry.format(descriptor).name}


def _in_words(descriptor: QuantDescriptor | None) -> str:
    """A descriptor for a cell of a table: its format, which ranges it has, and where they are from."""
    if descriptor is None:
        return "float"
    format = registry.format(descriptor)
    parts = [format.name]
    if descriptor.axis not in (None, REDUCTION):  # blocks run along it by nature
        parts.append("per channel" if descriptor.axis == CHANNEL else f"axis {descriptor.axis}")
    if descriptor.dynamic and format.block_size is None:  # whose scales are from each tensor by nature
        parts.append("dynamic")
    return ", ".join(parts)


@app.command()
@with_block
def layers(block: Any, as_json: AsJson = False) -> None:
    """List what a block would replace, by what, and which plugin says so."""
    look_here()
    recipe = registry.recipe(block.pop("recipe") or DEFAULT_RECIPE)
    include = (*recipe.include, *block.pop("include"))
    table = compose(registry.entries(block["plugins"]), include=include, **block)
    decisions = list(table.values())
    if as_json:
        headings = ("target", "replacement", "plugin", "state")
        _print_json([dict(zip(headings, _cells(decision), strict=True)) for decision in decisions])
        return
    print_text(Layers(decisions))


def _cells(decision: Decision) -> tuple[str | None, ...]:
    """A target, what replaces it, the plugin with the entry, and whether a block replaces it."""
    entry = decision.entry
    assert entry is not None
    waits = "replaced if its module gets imported" if decision.target is None else "replaced"
    state = waits if decision.reason is None else str(decision.reason)
    return decision.name, entry.replacement_name, entry.plugin, state


def _likeness(decision: Decision) -> Any:
    """What targets have in common that can be shown as one."""
    reason = decision.reason
    why = NotByDefault if isinstance(reason, NotByDefault) else reason
    package, _, _ = decision.name.partition(".")
    return package, None if decision.entry is None else decision.entry.plugin, why, decision.target is None


@attrs.frozen
class Layers:
    """What a block would replace, as a table."""

    decisions: list[Decision]

    def __rich__(self) -> Table:
        return self._table([_cells(decision) for decision in self.decisions])

    def folded(self) -> Table:
        """One row for the targets in a package that are replaced alike; their modules are in JSON."""
        return self._table([self._folded(group) for group in alike(self.decisions, _likeness)])

    @staticmethod
    def _folded(group: list[Decision]) -> tuple[str | None, ...]:
        if len(group) == 1:
            return _cells(group[0])
        rows = [_cells(decision) for decision in group]
        parts = [decision.name.split(".") for decision in group]
        same = itertools.takewhile(
            lambda found: len(set(found)) == 1, zip(*(p[:-1] for p in parts), strict=False)
        )
        modules, names = ".".join(found[0] for found in same), [p[-1] for p in parts]
        made = (str(replacement).rpartition(":")[2] for _, replacement, _, _ in rows)
        by_rule = all(m.startswith(f"Quant{name}") for name, m in zip(names, made, strict=True))
        replaced_by = "Quant..." if by_rule else "each by its own"
        _, _, plugin, state = rows[0]
        if isinstance(group[0].reason, NotByDefault):
            state = str(NotByDefault(tuple(names)))
        return f"{modules}: {', '.join(names)}", replaced_by, plugin, state

    @staticmethod
    def _table(rows: list[tuple[str | None, ...]]) -> Table:
        table = table_of("target", "replacement", "plugin", "state")
        for row in rows:
            _add_row(table, *(cell or "custom" for cell in row))
        return table


@app.command("explain")
@with_block
def explain_command(
    target: Annotated[str, typer.Argument(help="A class or function, such as torch.nn.Linear.")],
    block: Any,
    as_json: AsJson = False,
) -> None:
    """Say who would replace a class in a block, who would not, and why."""
    look_here()
    print_report(explain(target, **block), as_json)
