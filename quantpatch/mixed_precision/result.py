"""What a search found: which layer gets which recipe, and what others would cost and give."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from rich.console import Group
from rich.table import Table
from rich.text import Text

from quantpatch.errors import ArgumentError, MissingExtraError, listed
from quantpatch.mixed_precision.evaluations import difference
from quantpatch.recipes.descriptor import Recipe
from quantpatch.reports.folding import alike, folded_names, starred
from quantpatch.reports.render import as_percent
from quantpatch.reports.report import Report, by_reason, table_of
from quantpatch.torch_tools.atomic_files import written_whole


@attrs.frozen
class SearchRow:
    """Layers that share a format, and which one they got.

    Attributes:
        layers: Their names.
        recipe: Name of the recipe; ``"float"`` for none.
        cost: What they cost so.
        float_cost: What they cost in float.
        noise: What they add to the noise of the model's output, by the name of each candidate: the power of
            the difference by that of the float output, with these layers alone quantized.
    """

    layers: tuple[str, ...]
    recipe: str
    cost: float
    float_cost: float
    noise: Mapping[str, float]


@attrs.frozen
class SearchPoint:
    """A configuration that was evaluated.

    Attributes:
        cost: What it costs.
        metric: What ``evaluate`` returned for it.
        noise: What noise it was expected to have: those of its layers, added up.
        keeps: Whether its metric is good enough.
        recipes: Name of the recipe of each row, in their order.
    """

    cost: float
    metric: Any
    noise: float
    keeps: bool
    recipes: tuple[str, ...]


@attrs.frozen
class SearchResult(Report):
    """What ``search`` found; prints as two tables.

    Attributes:
        model: Class of the model.
        unit: What costs are counted in.
        float_metric: The metric in float.
        metric: That of the configuration that was chosen.
        float_cost: What the layers cost in float.
        cost: What they cost as chosen.
        evaluations: How often ``evaluate`` ran.
        resumed: How many results were in the file of ``resume``.
        seconds: How long the search took.
        spread: By how much two evaluations of the float model differ, which should be 0; None if that is no
            number.
        stopped: Why the search ended before it was done; empty if it was.
        rows: A row for each group of layers, the noisiest first.
        frontier: The configurations that were evaluated and that none beats in both cost and metric, the
            cheapest first.
        points: All that were evaluated, the cheapest first.
        skipped: The layers that were left out and stay float, with the reason.
    """

    model: str
    unit: str
    float_metric: Any
    metric: Any
    float_cost: float
    cost: float
    evaluations: int
    resumed: int
    seconds: float
    spread: float | None
    stopped: str
    rows: tuple[SearchRow, ...]
    frontier: tuple[SearchPoint, ...]
    points: tuple[SearchPoint, ...]
    skipped: Mapping[str, str]
    _patterns: Mapping[str, str] = attrs.field(repr=False)
    _values: Mapping[str, str | Recipe | None] = attrs.field(repr=False)

    @property
    def rules(self) -> dict[str, str | Recipe | None]:
        """The rules by which ``configure`` makes a model what was chosen."""
        return self._rules(row.recipe for row in self.rows)

    def rules_of(self, point: SearchPoint) -> dict[str, str | Recipe | None]:
        """The rules by which ``configure`` makes a model what another configuration was.

        Args:
            point: One of ``frontier`` or ``points``. Calibrate the model afterwards.
        """
        return self._rules(point.recipes)

    def _rules(self, recipes: Any) -> dict[str, str | Recipe | None]:
        names = {
            layer: recipe for row, recipe in zip(self.rows, recipes, strict=True) for layer in row.layers
        }
        return {
            pattern: self._values.get(names.get(layer, ""), None) for layer, pattern in self._patterns.items()
        }

    def _fields(self) -> dict[str, Any]:
        return {name: value for name, value in super()._fields().items() if not name.startswith("_")}

    def __rich__(self) -> Group:
        return self._shown([((*row.layers,), row) for row in self.rows])

    def folded(self) -> Group:
        """The tables with one row for groups that are alike and whose names differ in numbers alone."""
        groups = alike(self.rows, lambda row: (tuple(map(starred, row.layers)), row.recipe))
        return self._shown(
            [
                (
                    tuple(folded_names(name for row in group for name in row.layers)),
                    attrs.evolve(
                        group[0],
                        cost=math.fsum(row.cost for row in group),
                        float_cost=math.fsum(row.float_cost for row in group),
                        noise={
                            name: math.fsum(row.noise.get(name, 0.0) for row in group)
                            for name in group[0].noise
                        },
                    ),
                )
                for group in groups
            ]
        )

    def _shown(self, rows: list[tuple[tuple[str, ...], SearchRow]]) -> Group:
        title = f"{self.model}: {self.unit} {self._share(self.cost)} of float, metric {_shown(self.metric)}"
        drop = difference(self.float_metric, self.metric)
        title += f" (float {_shown(self.float_metric)}{'' if drop is None else f', drop {drop:.4g}'})"
        numbers = ("cost", "of float", "noise")
        layers = table_of("layers", "recipe", *numbers, right=numbers, title=title)
        for names, row in rows:
            share = as_percent(row.cost / row.float_cost) if row.float_cost else "-"
            noise = row.noise.get(row.recipe, 0.0)
            layers.add_row(
                "\n".join(name or "(model)" for name in names),
                row.recipe,
                f"{row.cost:.4g}",
                share,
                f"{noise:.2g}",
            )
        return Group(layers, self._frontier(), Text(self._caption()))

    def _frontier(self) -> Table:
        numbers = ("cost", "of float", "metric", "drop")
        table = table_of(*numbers, "recipes", "", right=numbers, title="Frontier: cost against metric")
        chosen = tuple(row.recipe for row in self.rows)
        for point in self.frontier:
            drop = difference(self.float_metric, point.metric)
            counts = Counter(point.recipes)
            table.add_row(
                f"{point.cost:.4g}",
                self._share(point.cost),
                _shown(point.metric),
                "-" if drop is None else f"{drop:.4g}",
                ", ".join(f"{count} {name}" for name, count in counts.most_common()),
                "chosen" if point.recipes == chosen else "" if point.keeps else "too low",
            )
        return table

    def _share(self, cost: float) -> str:
        return as_percent(cost / self.float_cost) if self.float_cost else f"{cost:.4g}"

    def _caption(self) -> str:
        known = f", {self.resumed} more from the file" if self.resumed else ""
        parts = [f"{self.evaluations} evaluations{known} in {self.seconds:.3g} s"]
        if self.stopped:
            parts.append(f"stopped: {self.stopped}")
        if self.spread:
            parts.append(f"evaluate is not deterministic: spread {self.spread:.3g}")
        parts += [
            f"left float, {reason}: {listed(names)}" for reason, names in by_reason(self.skipped).items()
        ]
        return "; ".join(parts)

    def picture(self, path: str | os.PathLike[str]) -> Path:
        """Draws cost against metric of all that was evaluated, with the frontier as a line.

        Args:
            path: The file; its ending says the kind, such as ``.svg``, ``.png`` or ``.pdf``.

        Returns:
            The file.

        Raises:
            MissingExtraError: matplotlib is not installed.
            ArgumentError: The metrics are not numbers, or there is no such kind of file.
            FileError: The file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingExtraError.of("report", "matplotlib", "the picture of a search") from None
        path = Path(path)
        if not all(isinstance(point.metric, float) for point in self.points):
            raise ArgumentError(
                "the metrics are not numbers, so there is no picture of them", metric=self.metric
            )
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        supported = figure.canvas.get_supported_filetypes()
        if path.suffix.lstrip(".") not in supported:
            raise ArgumentError(
                f"{path.name!r}: the ending says the kind of picture, one of {', '.join(sorted(supported))}",
                path=path,
            )
        all_float = [(self.float_cost, self.float_metric)]
        for label, style, points in (
            ("good enough", {"marker": "o", "color": "tab:blue"}, self._coordinates(True)),
            ("too low", {"marker": "x", "color": "tab:gray"}, self._coordinates(False)),
            ("float", {"marker": "s", "color": "tab:orange"}, all_float),
            ("chosen", {"marker": "*", "s": 200, "color": "tab:green"}, [(self.cost, self.metric)]),
        ):
            if points:
                axes.scatter(*zip(*points, strict=True), label=label, **style)
        line = [(point.cost, point.metric) for point in self.frontier]
        axes.plot(*zip(*line, strict=True), color="tab:blue", linewidth=1, drawstyle="steps-post", zorder=0)
        axes.set_xlabel(self.unit)
        axes.set_ylabel("metric")
        axes.set_title(self.model)
        axes.legend()
        with written_whole(path) as folder:
            figure.savefig(folder / path.name)
        return path

    def _coordinates(self, keeps: bool) -> list[tuple[float, float]]:
        return [(point.cost, point.metric) for point in self.points if point.keeps is keeps]


def _shown(metric: Any) -> str:
    return f"{metric:.4g}" if isinstance(metric, float) else str(metric)
