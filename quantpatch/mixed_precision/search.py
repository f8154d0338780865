"""``search``: which layer gets which recipe, so that the metric stays and the model is cheapest."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import attrs
from torch import nn

from quantpatch.analysis.measuring import Changes, Results, demand_evaluate
from quantpatch.errors import ArgumentError, SearchError, listed
from quantpatch.layers.base import named_layers
from quantpatch.layers.placed import placed_in
from quantpatch.mixed_precision.costs import CostFunction, CostName, checked_cost
from quantpatch.mixed_precision.evaluations import (
    Budget,
    Evaluations,
    Keeps,
    OutOfBudget,
    keeps_within,
    read_metric,
    warn_of_spread,
)
from quantpatch.mixed_precision.formats import (
    Candidate,
    Given,
    checked_candidates,
    weights_kept,
    working_copies,
)
from quantpatch.mixed_precision.layers import layers_of, own_quantizers
from quantpatch.mixed_precision.outputs import demand_batches
from quantpatch.mixed_precision.result import SearchPoint, SearchResult, SearchRow
from quantpatch.mixed_precision.strategy import Choice, Search, expected_evaluations, pareto
from quantpatch.mixed_precision.task import Task, prepared
from quantpatch.quantize.convert import convert, revert
from quantpatch.reports.render import as_percent
from quantpatch.torch_tools.class_swap import written_name
from quantpatch.torch_tools.forward import demand_model, evaluating, uncompiled
from quantpatch.torch_tools.progress import progress_bar


def search(
    model: nn.Module,
    evaluate: Callable[[nn.Module], Any] | None = None,
    *,
    max_drop: float | Keeps = 0.01,
    candidates: Sequence[Given] = ("int8", "w4a8", "int4", None),
    cost: CostName | CostFunction = "bits",
    data: Any = None,
    budget: int | timedelta | None = None,
    groups: Iterable[Iterable[str] | str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Finds which layer gets which recipe, so that the metric is kept and the model costs least.

    ::

        result = search(model, accuracy, data=batches, max_drop=0.01)
        print(result)
        result.picture("frontier.svg")

    The model is configured and calibrated so afterwards. It starts from the noise that each layer's
    quantization puts into the model's output, found without ``evaluate``. The configurations that save most
    for the noise they add are evaluated, half of the remaining ones being ruled out each time; then others
    that are cheaper, the most promising first, until those that are left promise nothing.

    Args:
        model: A float model, which is converted, or a quantized one; not one that ``prepare`` has placed
            quantizers in: search first. Layers whose quantizers are all disabled stay float.
        evaluate: Gets the model in eval mode, returns a metric; more is better. It may be anything with an
            order. None: how near the outputs are to those in float, 1 less the power of the difference by
            that of the float outputs, so that 0.99 is a signal-to-noise ratio of 20 dB.
        max_drop: How much less than in float the metric may be; or a function of the float metric and
            another that says whether that is good enough.
        candidates: What a layer may become: recipes or their names, None for float; or a recipe with methods
            of ``tune`` that change weights and biases alone, as a pair, ``("int4", "gptq")``, or as its
            ``tune``.
        cost: What is to be least: ``"bits"`` of weights with the scales of blocks, ``"macs"`` (bit
            operations: multiply-accumulates times the bits of both operands), ``"latency"`` (of each layer
            alone in ONNX Runtime, measured; needs the extra ``onnx``), or a function of a layer's name, the
            layer and its recipe (None for float), whose values are added up.
        data: Batches, as ``calibrate`` takes them, to find ranges and noise. Default: what ``evaluate`` calls
            the model with in float, the first 16 calls.
        budget: How much to evaluate at most: a number of evaluations, or a ``timedelta``. What is in
            ``resume`` does not count. If it allows every configuration that is cheaper than the best one, all
            are evaluated.
        groups: The layers that share a format, as names and globs: ``[("q", "k", "v"), "blocks.*.fc1"]``; the
            others are on their own. Default: those that read one tensor, whose results an addition takes
            directly, or that share a weight or a quantizer, as a run of the model shows.
        resume: A file that keeps each result as soon as it is there. What it holds is not evaluated again; it
            has to be of the same model, weights, candidates and ranges.
        progress: Whether to show what is being done (on a terminal or in a notebook only).

    Returns:
        What was chosen and evaluated.

    Raises:
        SearchError: No configuration keeps the metric; its ``result`` is the one with the best.
        ArgumentError: An argument has an impossible value, ``evaluate`` returns NaN, or the model has nothing
            to search. Like any error, and whatever ``evaluate`` raises, it leaves the model as it was.
        ArgumentTypeError: An argument is of another type, or what ``evaluate`` returns has no order.
        CalibrationError: The data cannot give ranges.
        ConversionError: The model is float and cannot be converted.
        FileError: ``resume`` is a file of something else.
        MissingExtraError: A package that ``cost="latency"`` needs is not installed.

    Warns:
        QuantPatchWarning: ``evaluate`` does not return the same for the same model, or changes it.
    """
    demand_model(model, "search")
    keeps = keeps_within(max_drop)
    checked, cost, limit = checked_candidates(candidates), checked_cost(cost), Budget.of(budget)
    if evaluate is not None:
        demand_evaluate(evaluate, "search(model, lambda model: accuracy(model, loader))")
    elif data is None:
        raise ArgumentError(
            "search needs something to go by: evaluate, a function that gets the model and returns a metric, "
            "or data, batches on which the model's outputs are compared with those in float",
            evaluate=None,
        )
    batches = None if data is None else demand_batches(data)
    given, model = model, uncompiled(model)
    with _converted(model, checked) as fresh:
        layers, skipped = _searched(model, fresh, checked)
        with evaluating(model), working_copies({**layers, **skipped}), weights_kept(model, checked):
            evaluator = None if evaluate is None else functools.partial(evaluate, given)
            task = prepared(model, layers, skipped, checked, cost, groups, batches, evaluator, progress)
            result, assignment = _found(task, evaluator, keeps, max_drop, limit, resume, progress)
        if not any(point.keeps for point in result.points):
            raise SearchError(_why_none(result, checked), result=result)
        task.formats.settle(model, result.rules, assignment)
    return result


@contextlib.contextmanager
def _converted(model: nn.Module, candidates: Sequence[Candidate]) -> Iterator[bool]:
    """A block in which a model is quantized; if it raises, one that was float is float again.

    Gives whether it was float.
    """
    fresh = not layers_of(model)
    if fresh:
        convert(model, next(candidate.recipe for candidate in candidates if candidate.recipe))
    try:
        yield fresh
    except BaseException:
        if fresh and named_layers(model):
            revert(model)
        raise


def _searched(
    model: nn.Module, fresh: bool, candidates: Sequence[Candidate]
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The layers to search, and those that stay float."""
    outputs = any(candidate.recipe and candidate.recipe.output for candidate in candidates)
    placed = dict(placed_in(model))
    for name, layer in named_layers(model).items():
        quantizer = type(layer).quantizer(layer, "output")
        if quantizer is not None and not quantizer.disabled and not outputs:
            placed[name] = layer
    if placed:
        raise ArgumentError(
            f"prepare has placed quantizers in {type(model).__name__}, at {listed(placed, 4)}, where the "
            f"formats chosen so far want them: search first, then prepare(model, args) and calibrate(model, "
            f"data, existing='keep')",
            model=model,
        )
    found = layers_of(model)
    searched = {
        name: layer
        for name, layer in found.items()
        if fresh or any(not q.disabled for q in own_quantizers(layer).values())
    }
    if not searched:
        raise ArgumentError(
            f"{type(model).__name__} has no quantized layer whose quantizers are enabled", model=model
        )
    return searched, {name: layer for name, layer in found.items() if name not in searched}


def _found(
    task: Task,
    evaluate: Callable[[], Any] | None,
    keeps: Keeps,
    max_drop: Any,
    budget: Budget,
    resume: str | os.PathLike[str] | None,
    progress: bool,
) -> tuple[SearchResult, dict[str, int]]:
    """Evaluates configurations; gives what was found, and the candidate of each layer of the one chosen."""
    header = {"model": "" if resume is None else task.fingerprint()}
    changes = Changes(task.model)

    def ask(assignment: Mapping[str, int]) -> Any:
        task.formats.put(assignment)
        changes.begin()
        for module in task.model.modules():
            if module.training:  # as another evaluation may have left it
                module.training = False
        metric = 1.0 - task.outputs.noise() if evaluate is None else evaluate()
        changes.warn()
        return metric

    results = Results(resume, "search", header, read_metric)
    evaluations = Evaluations(ask, results, budget, is_kept=resume is not None)
    metrics: dict[Choice, Any] = {}
    found = _Found(task, metrics, keeps)
    expected = expected_evaluations(task.space) if budget.evaluations is None else budget.evaluations
    with progress_bar("Searching", expected, progress=progress) as bar:
        bar.step("the float model")
        budget.spent += task.metric is not None
        if evaluate is not None:
            found.reference = evaluations("float", {}, "the float model", task.metric)

        def holds(choice: Choice) -> bool:
            if task.is_float(choice):
                metrics[choice] = found.reference
            else:
                bar.step(f"the best costs {found.percent(finder.best)} of float" if finder.best else "")
                metrics[choice] = evaluations(task.key(choice), task.assignment(choice), "a configuration")
            return found.keeps(choice)

        finder = Search(task.space, holds)
        try:
            if evaluate is not None:
                again = evaluations("float again", {}, "the float model")
                found.spread = warn_of_spread(found.reference, again, max_drop)
            finder.allow(budget.left)
            finder.run()
        except OutOfBudget:
            found.stopped = "the budget is used up"
    if not metrics:
        raise ArgumentError(
            "the budget allows no configuration to be evaluated: the float model takes two evaluations",
            budget=budget.evaluations,
        )
    chosen = found.chosen(finder.best)
    return found.result(chosen, budget, len(evaluations.resumed)), task.assignment(chosen)


@attrs.define
class _Found:
    """What is known so far.

    Attributes:
        task: What is searched.
        metrics: The metric of each configuration that was evaluated.
        accept: Whether a metric is good enough beside the float model's.
        reference: The float model's.
        spread: By how much that differs from evaluation to evaluation.
        stopped: Why the search ended early.
    """

    task: Task
    metrics: dict[Choice, Any]
    accept: Keeps
    reference: Any = 1.0
    spread: float | None = 0.0
    stopped: str = ""

    def keeps(self, choice: Choice) -> bool:
        """Whether a configuration's metric is good enough."""
        return bool(self.accept(self.reference, self.metrics[choice]))

    def percent(self, choice: Choice) -> str:
        """What a configuration costs, of what float does."""
        whole = math.fsum(self.task.float_costs)
        return as_percent(self.task.space.cost(choice) / whole) if whole else "-"

    def chosen(self, best: Choice | None) -> Choice:
        """The configuration to take: of those that cost as little as the best, the one with the best metric.

        Args:
            best: The cheapest that keeps the metric; None if none does: of all the one with the best metric.
        """
        cost = self.task.space.cost
        among = [c for c in self.metrics if best is None or (cost(c) == cost(best) and self.keeps(c))]
        return functools.reduce(lambda a, b: b if self.metrics[b] > self.metrics[a] else a, among)

    def result(self, chosen: Choice, budget: Budget, resumed: int) -> SearchResult:
        """All of it."""
        task, space = self.task, self.task.space
        names = [candidate.name for candidate in task.candidates]
        points = {choice: (space.cost(choice), metric) for choice, metric in self.metrics.items()}

        def point(choice: Choice) -> SearchPoint:
            recipes = tuple(names[candidate] for candidate in task.candidates_of(choice))
            cost, metric = points[choice]
            return SearchPoint(cost, metric, space.noise(choice), self.keeps(choice), recipes)

        rows = [
            SearchRow(group, names[options[n].candidate], options[n].cost, in_float, noises)
            for group, options, n, in_float, noises in zip(
                task.groups, space.options, chosen, task.float_costs, task.noises, strict=True
            )
        ]
        return SearchResult(
            model=written_name(type(task.model)),
            unit=task.unit,
            float_metric=self.reference,
            metric=self.metrics[chosen],
            float_cost=math.fsum(task.float_costs),
            cost=points[chosen][0],
            evaluations=budget.spent,
            resumed=resumed,
            seconds=budget.elapsed,
            spread=self.spread,
            stopped=self.stopped,
            rows=tuple(rows),
            frontier=tuple(map(point, pareto(points))),
            points=tuple(map(point, sorted(points, key=lambda c: points[c][0]))),
            skipped=task.skipped,
            patterns=task.patterns(),
            values={candidate.name: candidate.given for candidate in task.candidates},
        )


def _why_none(result: SearchResult, candidates: Sequence[Candidate]) -> str:
    """Why nothing was good enough, and what stands in the way."""
    noisiest = sorted(result.rows, key=lambda row: -min(row.noise.values()))[:3]
    layers = listed(
        f"{' and '.join(row.layers) or 'the model'} ({min(row.noise, key=lambda n: row.noise[n])}, "
        f"{min(row.noise.values()):.2g})"
        for row in noisiest
    )
    more = "" if any(c.recipe is None for c in candidates) else ", or None, which leaves a layer float"
    stopped = f" ({result.stopped})" if result.stopped else ""
    return (
        f"no configuration keeps the metric: of {len(result.points)} evaluated{stopped} the best gives "
        f"{result.metric!r}, and the float model {result.float_metric!r}. These layers put most noise into "
        f"the output, in the best of their formats: {layers}. Give candidates with more bits{more}; or allow "
        f"a larger max_drop"
    )
