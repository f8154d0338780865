"""The quantizers of every candidate, ready with their ranges, and put into a model layer by layer."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from quantpatch.errors import ArgumentError, ArgumentTypeError, listed
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.before_tuning import held, put_back, remember
from quantpatch.layers.input_factor import drop_input_factor, named_input_factors
from quantpatch.layers.late_ranges import warning_of_late_ranges
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.mixed_precision.layers import own_quantizers, pattern
from quantpatch.plugins.registry import registry
from quantpatch.quantize.calibrate import calibrate
from quantpatch.quantize.configure import configure
from quantpatch.recipes.descriptor import Recipe
from quantpatch.tuning import tune

#: A layer's quantizers, by their names in it.
Quantizers = Mapping[str, TensorQuantizer]
#: For each tensor of a layer that was tuned: its module, its name there, what it became, and its notes.
TunedWeights = list[tuple[nn.Module, str, Tensor, tuple[Tensor, int, str]]]
FLOAT = "float"


@attrs.frozen
class Candidate:
    """What a layer may become.

    Attributes:
        name: The recipe's; ``"float"`` for none.
        recipe: The recipe, or None.
        given: What the user wrote for it, as a rule of ``configure`` takes it.
    """

    name: str
    recipe: Recipe | None
    given: str | Recipe | None


#: What a layer may become: a recipe, or one with methods of ``tune``.
Given = str | Recipe | tuple[str | Recipe, Any] | None


def checked_candidates(given: Sequence[Given]) -> tuple[Candidate, ...]:
    """The candidates.

    Raises:
        ArgumentTypeError: One is not a recipe, nor a recipe with methods.
        ArgumentError: There is none but float, one is there twice, or one has rules of its own.
        UnknownNameError: There is no recipe of a name.
    """
    if isinstance(given, (str, Recipe)) or not isinstance(given, Sequence):
        raise ArgumentTypeError(
            f"candidates={given!r}: expected a list of recipes, such as ['int8', 'int4', None]",
            candidates=given,
        )
    found: list[Candidate] = []
    for each in map(_with_methods, given):
        if not (each is None or isinstance(each, (str, Recipe))):
            raise ArgumentTypeError(
                f"candidates: {each!r} is neither a Recipe, the name of one, nor None for float",
                candidates=each,
            )
        recipe = registry.recipe(each) if isinstance(each, str) else each
        name = FLOAT if recipe is None else recipe.name
        if any(other.name == name for other in found):
            raise ArgumentError(
                f"candidates: there are two called {name!r}; give recipes names of their own, "
                f"recipe.replace(name=...)",
                candidates=each,
            )
        if recipe is not None and recipe.rules:
            raise ArgumentError(
                f"candidates: {name!r} has rules, and a candidate is for one layer: write "
                f"recipe.replace(rules=())",
                candidates=each,
            )
        found.append(Candidate(name, recipe, each))
    if not any(candidate.recipe for candidate in found):
        raise ArgumentError(
            "candidates: there is nothing to choose from; give recipes, such as ['int8', 'int4', None]",
            candidates=given,
        )
    return tuple(found)


def _with_methods(given: Given) -> str | Recipe | None:
    """A recipe with the methods that are given beside it."""
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], (str, Recipe))):
        return given
    recipe = registry.recipe(given[0])
    methods = list(given[1]) if isinstance(given[1], (list, tuple)) else [given[1]]
    names = [method if isinstance(method, str) else str(method) for method in methods]
    return recipe.replace(name=" + ".join([recipe.name, *names]), tune=methods)


class Formats:
    """The quantizers of each layer by candidate.

    Args:
        model: The model, whose quantizers are those of ``working_copies``.
        layers: The layers that are searched, by name.
        skipped: Those that stay float.
        candidates: What they may become.
        batches: To find ranges from.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        skipped: Mapping[str, nn.Module],
        candidates: Iterable[Candidate],
        batches: Sequence[Any],
    ) -> None:
        self._layers = layers
        self._in_place: dict[str, int | None] = {}
        self._off = {pattern(name, module): None for name, module in skipped.items()}
        self._of: list[dict[str, dict[str, TensorQuantizer]]] = []
        self._tuned: list[dict[str, TunedWeights]] = []
        for candidate in candidates:
            rules = {pattern(name, module): candidate.given for name, module in layers.items()}
            configure(model, {**rules, **self._off})
            if any(map(wants_range, named_quantizers(model).values())):
                calibrate(model, batches, existing="overwrite", progress=False)
            self._tuned.append(_tuned(model, layers, candidate, batches))
            # Copied in one go, so that layers that share a quantizer go on sharing it.
            self._of.append(copy.deepcopy({name: own_quantizers(layer) for name, layer in layers.items()}))
        configure(
            model, {pattern(name, module): None for name, module in (*layers.items(), *skipped.items())}
        )
        self._float = copy.deepcopy({name: own_quantizers(layer) for name, layer in layers.items()})

    def of(self, layer: str, candidate: int | None) -> Quantizers:
        """The quantizers that a candidate, or None for float, gives a layer."""
        return (self._float if candidate is None else self._of[candidate])[layer]

    def put(self, chosen: Mapping[str, int]) -> None:
        """Makes each layer what a candidate says, by its number; float those that are not named."""
        for name, layer in self._layers.items():
            candidate = chosen.get(name)
            if name in self._in_place and self._in_place[name] == candidate:
                continue
            for own_name in own_quantizers(layer):
                del layer._modules[own_name]
            layer._modules.update(self.of(name, candidate))
            self._put_weights(name, candidate)
            _look_for_fast_paths(layer)
            self._in_place[name] = candidate

    def tuned(self, layer: str, candidate: int | None) -> tuple[Any, ...]:
        """The methods that have tuned the weights that a candidate gives a layer."""
        methods = () if candidate is None else self._tuned[candidate].get(layer, ())
        return tuple((attribute, notes[2]) for _, attribute, _, notes in methods)

    def _put_weights(self, layer: str, candidate: int | None) -> None:
        """Gives a layer the weights that a candidate was tuned to, or those in float."""
        with torch.no_grad():
            for of in self._tuned:
                for module, attribute, _, (in_float, *_) in of.get(layer, ()):
                    module._parameters[attribute].copy_(in_float)  # type: ignore[union-attr]
            for module, attribute, value, _ in (
                () if candidate is None else self._tuned[candidate].get(layer, ())
            ):
                module._parameters[attribute].copy_(value)  # type: ignore[union-attr]

    def ranges(self) -> list[Any]:
        """The ranges that were found, as numbers."""
        return [
            (name, own_name, None if q.amax is None else q.amax.tolist())
            for of in self._of
            for name, quantizers in of.items()
            for own_name, q in quantizers.items()
        ]

    def settle(self, model: nn.Module, rules: Mapping[str, Any], chosen: Mapping[str, int]) -> None:
        """Configures a model, and gives its quantizers the ranges that were found."""
        configure(model, rules)
        for name, candidate in chosen.items():
            self._put_weights(name, candidate)
            for module, attribute, _, (in_float, _, by) in self._tuned[candidate].get(name, ()):
                remember(module, attribute, in_float, rounded_by=by)
        with warning_of_late_ranges([model]):
            for name, candidate in chosen.items():
                known = self.of(name, candidate)
                for own_name, quantizer in own_quantizers(self._layers[name]).items():
                    found = known.get(own_name)
                    if found is None or found.disabled:
                        quantizer.disable()
                    elif not found.descriptor.dynamic and found.amax is not None:
                        quantizer.replace_range(found.amax.detach())


def _tuned(
    model: nn.Module, layers: Mapping[str, nn.Module], candidate: Candidate, batches: Sequence[Any]
) -> dict[str, TunedWeights]:
    """The weights that a candidate's methods give each layer; the model has those in float again.

    Raises:
        ArgumentError: The methods change more than layers, each on its own, or the model is tuned already.
    """
    recipe = candidate.recipe
    if recipe is None or not recipe.tune:
        return {}
    if was := [name for name, module in model.named_modules() if held(module)]:
        raise ArgumentError(
            f"candidates: {candidate.name!r} has methods of tune, and {type(model).__name__} is tuned "
            f"already, at {listed(was, 3)}: revert it, or search without",
            candidates=candidate.name,
        )
    factors = set(named_input_factors(model))
    tune(model, batches, recipe=recipe, progress=False)
    owner = {module: name for name, layer in layers.items() for module in layer.modules()}
    found: dict[str, TunedWeights] = {}
    others = list(set(named_input_factors(model)) - factors)
    for prefix, module in model.named_modules():
        for attribute, notes in held(module).items():
            parameter = module._parameters[attribute]
            if module in owner and parameter is not None:
                new = (module, attribute, parameter.detach().clone(), notes)
                found.setdefault(owner[module], []).append(new)
            else:
                others.append(f"{prefix}.{attribute}".lstrip("."))
    for name in set(named_input_factors(model)) - factors:
        drop_input_factor(model.get_submodule(name))
    put_back(model)
    if others:
        raise ArgumentError(
            f"candidates: the methods of {candidate.name!r} change {listed(sorted(others), 3)}, and not only "
            f"the weights and biases of layers, of which each is to get its own format. Those that do are "
            f"gptq, adaround and bias_correction",
            candidates=candidate.name,
        )
    return found


@contextlib.contextmanager
def weights_kept(model: nn.Module, candidates: Iterable[Candidate]) -> Iterator[None]:
    """A block after which parameters are what they were, if a candidate has methods that change them."""
    tunes = any(candidate.recipe is not None and candidate.recipe.tune for candidate in candidates)
    kept = [(p, p.detach().clone()) for p in model.parameters()] if tunes else []
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def signature(quantizers: Quantizers) -> tuple[Any, ...]:
    """What of a layer's quantizers decides what it computes, apart from ranges."""
    return tuple((name, q.descriptor) for name, q in sorted(quantizers.items()) if not q.disabled)


def wants_range(quantizer: TensorQuantizer) -> bool:
    """Whether a quantizer takes a range from data."""
    descriptor = quantizer.descriptor
    return not (quantizer.disabled or descriptor.dynamic or descriptor.amax is not None)


def _look_for_fast_paths(layer: nn.Module) -> None:
    if isinstance(layer, QuantizedLayer):
        layer.guard_fast_paths()


@contextlib.contextmanager
def working_copies(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """A block in which layers hold copies of their quantizers; afterwards their own, as they were."""
    held = {layer: dict(layer._modules) for layer in layers.values()}
    copies = copy.deepcopy([own_quantizers(layer) for layer in layers.values()])
    try:
        for layer, quantizers in zip(layers.values(), copies, strict=True):
            layer._modules.update(quantizers)
        yield
    finally:
        for layer, children in held.items():
            layer._modules.clear()
            layer._modules.update(children)
            _look_for_fast_paths(layer)
