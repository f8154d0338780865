"""The tables of a page, out of the library's own reports."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from quantpatch.analysis import ComparisonReport, CoverageReport, SensitivityReport
from quantpatch.mixed_precision import SearchResult
from quantpatch.page import charts
from quantpatch.page.seen import Seen
from quantpatch.reports import Summary
from quantpatch.reports.render import as_percent
from quantpatch.reports.report import Report

#: Where a layer is looked up.
LAYERS = "layers"


@attrs.frozen
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        order: What it is sorted by, if that is a number.
        find: The layer that it leads to; empty for none.
        goal: The section that has it.
    """

    text: str
    order: float | None = None
    find: str = ""
    goal: str = LAYERS

    @property
    def key(self) -> str:
        """What a browser sorts it by, where that is not the text itself."""
        key = "" if self.order is None else f"{self.order:.7g}"
        return "" if key == self.text else key


@attrs.frozen
class Section:
    """A table with what belongs to it.

    Attributes:
        id: Its anchor.
        title: Stands above it.
        caption: What a row is.
        columns: Their headings.
        numbers: Those of columns of numbers.
        rows: The table.
        note: A sentence before it.
        picture: An SVG before it.
    """

    id: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numbers: tuple[str, ...] = ()
    note: str = ""
    picture: str = ""


def section(
    id: str,
    title: str,
    caption: str,
    rows: Iterable[Mapping[str, Any]],
    *,
    layer: str = "",
    note: str = "",
    picture: str = "",
) -> Section:
    """A table of values.

    Args:
        id: Its anchor.
        title: Stands above it.
        caption: What a row is.
        rows: Values, or cells, by heading.
        layer: The heading of the column with names of layers, which lead to the layers' own table.
        note: A sentence before it.
        picture: An SVG before it.
    """
    found = list(rows)
    columns = tuple(dict.fromkeys(heading for row in found for heading in row))
    made = tuple(
        tuple(_cell(row.get(heading), heading == layer and id != LAYERS) for heading in columns)
        for row in found
    )
    numbers = tuple(
        heading for n, heading in enumerate(columns) if any(row[n].order is not None for row in made)
    )
    return Section(id, title, caption, columns, made, numbers, note, picture)


def _cell(value: Any, is_layer: bool) -> Cell:
    if isinstance(value, Cell):
        return value
    if is_layer and isinstance(value, str):
        return Cell(value or "(model)", find=value)
    if isinstance(value, bool) or value is None:
        return Cell("" if value is None else "yes" if value else "no")
    if isinstance(value, (int, float)):
        return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", float(value))
    if isinstance(value, (list, tuple)):
        return Cell(", ".join(map(str, value)))
    return Cell(str(value))


def formats_of(coverage: CoverageReport, summary: Summary) -> list[str]:
    """What each row of an audit multiplies in: formats, or ``"float"``."""
    known = {row.name: row.format.partition(",")[0] for row in summary.rows}
    return [
        " x ".join(dict.fromkeys(known.get(str(quantizer), "quantized") for _, quantizer in row.operands))
        if row.quantized
        else "float"
        for row in coverage.rows
    ]


def layers(coverage: CoverageReport, summary: Summary) -> Section:
    """The layers that multiply, by their share."""
    macs = coverage.macs
    rows = (
        {
            "layer": row.module or "(model)",
            "class": row.layer,
            "operation": row.operation,
            "format": format,
            "multiply-accumulates": row.macs,
            "share": Cell(as_percent(row.macs / macs) if macs else "-", row.macs),
            "float because": row.reason,
        }
        for row, format in zip(coverage.rows, formats_of(coverage, summary), strict=True)
        if not row.of_weight
    )
    ordered = sorted(rows, key=lambda row: -row["multiply-accumulates"])  # type: ignore[operator]
    return section(LAYERS, "Layers", "What each layer multiplies, and in which format", ordered)


def quantizers(summary: Summary, seen: Mapping[str, Seen]) -> Section:
    """The quantizers, with what their ranges cut off."""
    rows = []
    for row in summary.rows:
        look = seen.get(row.name)
        clipped = None if look is None else look.clipped
        layer = row.name.rpartition(".")[0]
        rows.append(
            {
                "quantizer": Cell(row.name, find=layer),
                "format": row.format,
                "bits": row.bits,
                "range": "" if row.amax_max is None else Cell(f"{row.amax_max:.4g}", row.amax_max),
                "ranges": row.ranges,
                "clipped": "" if clipped is None else Cell(as_percent(clipped), clipped),
                "zero point": "" if look is None or look.zero_point is None else look.zero_point,
                "state": row.state,
            }
        )
    return section(
        "quantizers", "Quantizers", "Each quantizer, and what its range cuts off in this run", rows
    )


def noise(compared: ComparisonReport) -> Section:
    """The layers by noise."""
    rows = (
        {"layer": r.layer, "class": r.kind, "SQNR (dB)": r.sqnr, "cosine": r.cosine} for r in compared.rows
    )
    return section(
        "noise",
        "Noise",
        "Outputs of each layer, quantized against float, the noisiest first",
        rows,
        layer="layer",
    )


def cost(measured: SensitivityReport) -> Section:
    """The layers by what quantizing them costs."""
    rows = ({"layer": r.layer, "metric": r.metric, "loss": r.loss} for r in measured.rows)
    note = (
        f"The metric is {measured.float_metric:.4g} in float and {measured.quantized_metric:.4g} quantized."
    )
    caption = (
        f"The metric with each layer alone {'quantized' if measured.mode == 'quantize_one' else 'float'}"
    )
    return section("cost", "Cost", caption, rows, layer="layer", note=note)


def found(result: SearchResult) -> list[Section]:
    """What a search found: the recipes, and the frontier."""
    recipes = (
        {"layers": Cell(", ".join(row.layers), find=row.layers[0]), "recipe": row.recipe, "cost": row.cost,
         **{f"noise, {name}": value for name, value in row.noise.items()}}
        for row in result.rows
    )  # fmt: skip
    points = (
        {
            "cost": p.cost,
            "metric": p.metric,
            "good enough": p.keeps,
            "recipes": ", ".join(f"{count} {name}" for name, count in Counter(p.recipes).most_common()),
        }
        for p in result.frontier
    )
    shown = [
        (p.cost, p.metric, "good enough" if p.keeps else "too low")
        for p in result.points
        if isinstance(p.metric, float)
    ]
    picture = charts.frontier(shown, result.unit) if shown else ""
    return [
        section("recipes", "Recipes", f"The recipe of each group of layers; cost in {result.unit}", recipes),
        section(
            "frontier",
            "Frontier",
            "Configurations that none beats in cost and metric",
            points,
            picture=picture,
        ),
    ]


def other(result: Report, number: int) -> Section:
    """Any other report, row by row."""
    name = type(result).__name__
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).removesuffix(" Report")
    return section(f"result-{number}", words, f"What a {name} has", result.to_dicts())


def sections_of(results: Sequence[Report]) -> list[Section]:
    """The sections of what was handed over."""
    made: list[Section] = []
    for number, result in enumerate(results):
        if isinstance(result, ComparisonReport):
            made.append(noise(result))
        elif isinstance(result, SensitivityReport):
            made.append(cost(result))
        elif isinstance(result, SearchResult):
            made += found(result)
        else:
            made.append(other(result, number))
    return made
