"""``sensitivity``: what each layer's quantization costs, measured one layer at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import attrs
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from quantpatch.errors import ComparisonError
from quantpatch.files import written_whole
from quantpatch.layers.base import QuantizedLayer
from quantpatch.quantizer import TensorQuantizer
from quantpatch.report.render import as_text

__all__ = ["SensitivityReport", "SensitivityRow", "sensitivity"]

Mode = Literal["quantize_one", "float_one"]


@attrs.frozen
class SensitivityRow:
    """A layer and what it costs.

    Attributes:
        layer: Qualified name.
        metric: The metric with this layer alone quantized (or alone float).
        loss: What quantizing it costs, in units of the metric, more being worse: ``float - metric``
            with this layer alone quantized, ``metric - all quantized`` with it alone float.
    """

    layer: str
    metric: float
    loss: float


@attrs.frozen
class SensitivityReport:
    """What ``sensitivity`` measured, the costliest layer first; prints as a table.

    Attributes:
        mode: Which way it was measured.
        float_metric: The metric with every layer float.
        quantized_metric: The metric with every layer quantized.
        rows: A row for each quantized layer.
    """

    mode: Mode
    float_metric: float
    quantized_metric: float
    rows: tuple[SensitivityRow, ...]

    def keep_float(self, loss: float) -> tuple[str, ...]:
        """The layers to leave float so that the others together cost at most ``loss``.

        Costs are added up as if layers were independent, which they are not quite: measure the result.
        """
        left = sum(max(row.loss, 0.0) for row in self.rows)
        names = []
        for row in self.rows:
            if left <= loss:
                break
            names.append(row.layer)
            left -= max(row.loss, 0.0)
        return tuple(names)

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(attrs.asdict(self), indent=2)

    def __rich__(self) -> Table:
        alone = "quantized" if self.mode == "quantize_one" else "float"
        table = Table(caption=f"metric: with this layer alone {alone}")
        table.add_column("layer", overflow="fold", min_width=12)
        table.add_column("metric", justify="right")
        table.add_column("loss", justify="right")
        table.add_row("all float", f"{self.float_metric:.4g}", "")
        table.add_row("all quantized", f"{self.quantized_metric:.4g}", "", end_section=True)
        for row in self.rows:
            table.add_row(row.layer or "(model)", f"{row.metric:.4g}", f"{row.loss:+.4g}")
        return table

    def __str__(self) -> str:
        return as_text(self)


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    mode: Mode = "quantize_one",
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SensitivityReport:
    """Evaluates a quantized model with one layer at a time quantized (or one at a time float).

    Quantizers are switched by disabling them; their state is as before afterwards, also if ``evaluate``
    raises.

    Args:
        model: A calibrated model.
        evaluate: Gets the model, returns a metric; more is better.
        mode: ``"quantize_one"`` or ``"float_one"``.
        resume: A file that keeps each result as soon as it is there. If it exists, what it holds is not
            measured again.
        progress: Whether to show a progress bar (on a terminal only).

    Raises:
        ComparisonError: The model has no quantized layer, ``evaluate`` is no function, or ``resume`` holds
            something else.
    """
    if not callable(evaluate):
        raise ComparisonError(
            f"evaluate is a {type(evaluate).__name__}, expected a function that gets the model and returns a "
            f"metric: sensitivity(model, lambda model: accuracy(model, loader))"
        )
    groups = {
        name: [q for q in layer.quantizers().values() if not q.disabled]
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
    }
    groups = {name: quantizers for name, quantizers in groups.items() if quantizers}
    if not groups:
        raise ComparisonError(f"{type(model).__name__} has no quantized layer whose quantizers are on")
    results = _Results(resume, mode)
    everything = [quantizer for quantizers in groups.values() for quantizer in quantizers]
    quantizing_one = mode == "quantize_one"

    def measure(key: str, quantized: list[TensorQuantizer]) -> float:
        if key not in results:
            with _only(everything, quantized):
                results.put(key, float(evaluate(model)))
        return results.get(key)

    float_metric, all_metric = measure("float", []), measure("quantized", everything)
    rows = []
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    for name in track(groups, description="Sensitivity", console=console, transient=True, disable=hidden):
        chosen = groups[name]
        on = chosen if quantizing_one else [q for q in everything if q not in chosen]
        metric = measure(f"layer:{name}", on)
        rows.append(
            SensitivityRow(name, metric, float_metric - metric if quantizing_one else metric - all_metric)
        )
    rows.sort(key=lambda row: (-row.loss, row.layer))
    return SensitivityReport(mode, float_metric, all_metric, tuple(rows))


@contextlib.contextmanager
def _only(everything: list[TensorQuantizer], quantized: list[TensorQuantizer]) -> Iterator[None]:
    try:
        for quantizer in everything:
            quantizer.disabled = quantizer not in quantized
        yield
    finally:
        for quantizer in everything:
            quantizer.disabled = False


class _Results:
    """Results by key, kept in a file if there is one; the file is replaced whole each time."""

    def __init__(self, path: str | os.PathLike[str] | None, mode: Mode) -> None:
        self._path = None if path is None else Path(path)
        self._mode = mode
        self._found: dict[str, float] = {}
        if self._path is not None and self._path.exists():
            try:
                data = json.loads(self._path.read_text())
                mode_found, self._found = data["mode"], dict(data["results"])
            except (ValueError, KeyError, TypeError) as error:
                raise ComparisonError(f"{self._path} holds no results of sensitivity: {error}") from error
            if mode_found != mode:
                raise ComparisonError(f"{self._path} holds results of mode {mode_found!r}, not {mode!r}")

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def get(self, key: str) -> float:
        return self._found[key]

    def put(self, key: str, value: float) -> None:
        self._found[key] = value
        if self._path is None:
            return
        with written_whole(self._path) as folder:
            text = json.dumps({"mode": self._mode, "results": self._found})
            (folder / self._path.name).write_text(text)
