"""``sensitivity``: what each layer's quantization costs, measured one layer at a time."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import attrs
from rich.table import Table
from torch import nn

from quantpatch.analysis.measuring import Changes, Results, as_number, demand_evaluate
from quantpatch.errors import ArgumentError
from quantpatch.layers.fingerprint import fingerprint
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.reports.report import Report, table_of
from quantpatch.torch_tools.forward import demand_model, evaluating
from quantpatch.torch_tools.progress import progress_over

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
class SensitivityReport(Report):
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

    def __rich__(self) -> Table:
        alone = "quantized" if self.mode == "quantize_one" else "float"
        numbers, caption = ("metric", "loss"), f"metric: with this layer alone {alone}"
        table = table_of("layer", *numbers, right=numbers, caption=caption)
        table.add_row("all float", f"{self.float_metric:.4g}", "")
        table.add_row("all quantized", f"{self.quantized_metric:.4g}", "", end_section=True)
        for row in self.rows:
            table.add_row(row.layer or "(model)", f"{row.metric:.4g}", f"{row.loss:+.4g}")
        return table


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    mode: Mode = "quantize_one",
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SensitivityReport:
    """Evaluates a quantized model with one layer at a time quantized (or one at a time float).

    Quantizers are switched by disabling them, and ``evaluate`` gets the model in eval mode; state and modes
    are as before afterwards, also if ``evaluate`` raises.

    Args:
        model: A calibrated model. Whatever has quantizers of its own counts as a layer.
        evaluate: Gets the model, returns a metric; more is better.
        mode: ``"quantize_one"`` or ``"float_one"``.
        resume: A file that keeps each result as soon as it is there. If it exists, what it holds is not
            measured again; it has to be of the same model, weights and ranges.
        progress: Whether to show a progress bar (on a terminal or in a notebook only).

    Raises:
        ArgumentError: The model has no quantized layer, ``evaluate`` returns NaN, or there is no such mode.
        ArgumentTypeError: ``model`` is not a model, ``evaluate`` not a function, or what it returns not a
            number.
        FileError: ``resume`` is a file of something else, such as the results of another model.

    Warns:
        QuantPatchWarning: ``evaluate`` changes weights or buffers, so that each layer is measured in another
            model.
    """
    demand_evaluate(evaluate, "sensitivity(model, lambda model: accuracy(model, loader))")
    demand_model(model, "sensitivity")
    if mode not in get_args(Mode):
        raise ArgumentError(f"mode={mode!r}: expected {' or '.join(map(repr, get_args(Mode)))}", mode=mode)
    groups: dict[str, list[TensorQuantizer]] = {}
    for name, quantizer in named_quantizers(model).items():
        if not quantizer.disabled:
            groups.setdefault(name.rpartition(".")[0], []).append(quantizer)
    if not groups:
        raise ArgumentError(
            f"{type(model).__name__} has no quantized layer whose quantizers are enabled", model=model
        )
    model_is = "" if resume is None else fingerprint(model)
    results = Results(resume, "sensitivity", {"mode": mode, "model": model_is})
    everything = {quantizer for quantizers in groups.values() for quantizer in quantizers}
    quantizing_one = mode == "quantize_one"

    def measure(key: str, quantized: set[TensorQuantizer]) -> float:
        if key not in results:
            switch(quantized)
            metric = as_number(evaluate(model))
            if math.isnan(metric):
                raise ArgumentError(f"evaluate returned NaN while measuring {key!r}", evaluate=metric)
            changes.warn()
            results.put(key, metric)
        found: float = results[key]
        return found

    rows = []
    changes = Changes(model)
    with (
        evaluating(model),
        _switching(model, everything) as switch,
        progress_over(groups, "Sensitivity", progress=progress) as each,
    ):
        float_metric, all_metric = measure("float", set()), measure("quantized", everything)
        for name in each:
            chosen = set(groups[name])
            metric = measure(f"layer:{name}", chosen if quantizing_one else everything - chosen)
            loss = float_metric - metric if quantizing_one else metric - all_metric
            rows.append(SensitivityRow(name, metric, loss))
    rows.sort(key=lambda row: (-row.loss, row.layer))
    return SensitivityReport(mode, float_metric, all_metric, tuple(rows))


@contextlib.contextmanager
def _switching(
    model: nn.Module, everything: set[TensorQuantizer]
) -> Iterator[Callable[[set[TensorQuantizer]], None]]:
    """A block with a function that leaves some quantizers on and the others off, in eval mode."""
    modules = list(model.modules())

    def switch(quantized: set[TensorQuantizer]) -> None:
        # Set only where it differs: there are as many measurements as layers.
        for module in modules:
            if module.training:
                module.training = False
        for quantizer in everything:
            if quantizer.disabled == (quantizer in quantized):
                quantizer.disabled = not quantizer.disabled

    try:
        yield switch
    finally:
        for quantizer in everything:
            quantizer.disabled = False
