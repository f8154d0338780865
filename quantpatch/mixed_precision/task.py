"""All that a search knows before it evaluates a configuration."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from quantpatch.dataflow import dataflow
from quantpatch.errors import ArgumentError, listed
from quantpatch.layers.fingerprint import fingerprint
from quantpatch.mixed_precision.costs import UNITS, layer_cost
from quantpatch.mixed_precision.evaluations import as_metric
from quantpatch.mixed_precision.formats import FLOAT, Candidate, Formats, signature
from quantpatch.mixed_precision.layers import found_groups, given_groups, layers_of, pattern
from quantpatch.mixed_precision.outputs import Calls, Outputs
from quantpatch.mixed_precision.strategy import Choice, Option, Space
from quantpatch.quantize.configure import configure
from quantpatch.torch_tools.class_swap import written_name
from quantpatch.torch_tools.forward import run_batch
from quantpatch.torch_tools.progress import progress_over

_NOISE_BATCHES = 4  # that the noise of each layer is estimated on


@attrs.frozen(eq=False)
class Task:
    """All that is known before a configuration is evaluated.

    Attributes:
        model: The model, in float.
        layers: Those that are searched, by name.
        skipped: Why the others stay float, by name.
        candidates: What layers may become.
        formats: Their quantizers.
        groups: Names of the layers that share a format.
        space: What groups may become.
        unit: Of costs.
        float_costs: What each group costs in float.
        noises: What noise each group adds, by candidate.
        outputs: What the model gives in float.
        metric: What ``evaluate`` returned in float, if it had to be asked already.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    skipped: Mapping[str, str]
    candidates: Sequence[Candidate]
    formats: Formats
    groups: Sequence[tuple[str, ...]]
    space: Space
    unit: str
    float_costs: Sequence[float]
    noises: Sequence[Mapping[str, float]]
    outputs: Outputs
    metric: Any

    def candidates_of(self, choice: Choice) -> list[int]:
        """The number of the candidate of each group."""
        return [options[n].candidate for options, n in zip(self.space.options, choice, strict=True)]

    def assignment(self, choice: Choice) -> dict[str, int]:
        """The number of the candidate of each layer."""
        chosen = zip(self.groups, self.candidates_of(choice), strict=True)
        return {name: candidate for group, candidate in chosen for name in group}

    def key(self, choice: Choice) -> str:
        """What a file knows a configuration by."""
        assignment = self.assignment(choice)
        return ",".join(self.candidates[assignment[name]].name for name in self.layers)

    def is_float(self, choice: Choice) -> bool:
        """Whether no layer is quantized."""
        return not any(signature(self.formats.of(*chosen)) for chosen in self.assignment(choice).items())

    def patterns(self) -> dict[str, str]:
        """The pattern of each layer, of those that stay float as well, by name."""
        known = layers_of(self.model)
        return {name: pattern(name, known[name]) for name in (*self.layers, *self.skipped)}

    def fingerprint(self) -> str:
        """A digest of all that metrics depend on, apart from ``evaluate``."""
        recipes = [(candidate.name, candidate.recipe) for candidate in self.candidates]
        return fingerprint(self.model, tuple(self.layers), recipes, self.formats.ranges())


def prepared(
    model: nn.Module,
    layers: dict[str, nn.Module],
    switched_off: Mapping[str, nn.Module],
    candidates: Sequence[Candidate],
    cost: Any,
    groups: Any,
    batches: list[Any] | None,
    evaluate: Callable[[], Any] | None,
    progress: bool,
) -> Task:
    """Finds the layers that run, what shares a format, ranges, costs, and the noise of each layer."""
    everything = {**layers, **switched_off}
    configure(model, {pattern(name, layer): None for name, layer in everything.items()})
    metric = None
    if batches is None:
        assert evaluate is not None
        with Calls(model) as calls:
            metric = as_metric(evaluate(), "the float model")
        batches = calls.batches
        if not batches:
            raise ArgumentError(
                f"evaluate does not call the {written_name(type(model))} that it is given, so there is no "
                f"data to find ranges from: give some, search(model, evaluate, data=batches)",
                data=None,
            )
    outputs = Outputs(model, batches if evaluate is None else batches[:_NOISE_BATCHES])
    first = next(candidate.given for candidate in candidates if candidate.recipe)
    configure(model, {pattern(name, layer): first for name, layer in layers.items()})
    with _called(layers) as arguments:
        flow = dataflow(model, lambda: run_batch(model, batches[0]))
    reached = {name: layer for name, layer in layers.items() if flow.calls[name]}
    if not reached:
        raise ArgumentError(
            f"the data reaches none of the layers of {written_name(type(model))}: {listed(layers, 4)}",
            data=None,
        )
    skipped = dict.fromkeys(switched_off, "its quantizers are disabled")
    skipped |= {name: "the data does not reach it" for name in layers if name not in reached}
    shared = found_groups(flow, reached) if groups is None else given_groups(groups, reached)
    others = {name: everything[name] for name in skipped}
    with progress_over(candidates, "Finding ranges", progress=progress) as each_candidate:
        formats = Formats(model, reached, others, each_candidate, batches)
    formats.put({})
    costs = layer_cost(cost, reached, flow, arguments)
    in_float = Candidate(FLOAT, None, None)
    options: list[tuple[Option, ...]] = []
    noises: list[dict[str, float]] = []
    float_costs: list[float] = []
    with progress_over(shared, "Noise of each layer", progress=progress) as each:
        for group in each:
            found, of = _options(group, candidates, formats, costs, outputs)
            options.append(found)
            noises.append(of)
            float_costs.append(math.fsum(costs(name, in_float, formats.of(name, None)) for name in group))
    formats.put({})
    unit = UNITS.get(cost, "") if isinstance(cost, str) else "cost"
    space = Space(tuple(options))
    return Task(
        model,
        reached,
        skipped,
        candidates,
        formats,
        shared,
        space,
        unit,
        float_costs,
        noises,
        outputs,
        metric,
    )


def _options(
    group: tuple[str, ...],
    candidates: Sequence[Candidate],
    formats: Formats,
    costs: Callable[..., float],
    outputs: Outputs,
) -> tuple[tuple[Option, ...], dict[str, float]]:
    """What a group may become, the least noisy first, and the noise of each candidate."""
    known: dict[Any, Option] = {}
    noises: dict[str, float] = {}
    # What is quantized first: how long a layer takes in float is measured beside it.
    for number, candidate in sorted(enumerate(candidates), key=lambda pair: pair[1].recipe is None):
        alike = tuple((signature(formats.of(name, number)), formats.tuned(name, number)) for name in group)
        if alike not in known:
            formats.put(dict.fromkeys(group, number))
            noise = outputs.noise(_NOISE_BATCHES) if any(map(any, alike)) else 0.0
            cost = math.fsum(costs(name, candidate, formats.of(name, number)) for name in group)
            known[alike] = Option(cost, noise, number)
        noises[candidate.name] = known[alike].noise
    ordered = sorted(known.values(), key=lambda option: (option.noise, option.cost))
    return tuple(ordered), {c.name: noises[c.name] for c in candidates}


@contextlib.contextmanager
def _called(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """A block that keeps the arguments and keywords of the first call of each layer, by name."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(name, (args, kwargs))

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(functools.partial(keep, name), with_kwargs=True)
            hooks.callback(handle.remove)
        yield found
