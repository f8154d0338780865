"""The quantizers of every candidate, ready with their ranges, and put into a model layer by layer."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from quantpatch.errors import ArgumentError, ArgumentTypeError
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.late_ranges import warning_of_late_ranges
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.mixed_precision.layers import own_quantizers, pattern
from quantpatch.plugins.registry import registry
from quantpatch.quantize.calibrate import calibrate
from quantpatch.quantize.configure import configure
from quantpatch.recipes.descriptor import Recipe

#: A layer's quantizers, by their names in it.
Quantizers = Mapping[str, TensorQuantizer]
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


def checked_candidates(given: Sequence[str | Recipe | None]) -> tuple[Candidate, ...]:
    """The candidates.

    Raises:
        ArgumentTypeError: One is not a recipe.
        ArgumentError: There is none but float, one is there twice, or one has rules of its own.
        UnknownNameError: There is no recipe of a name.
    """
    if isinstance(given, (str, Recipe)) or not isinstance(given, Sequence):
        raise ArgumentTypeError(
            f"candidates={given!r}: expected a list of recipes, such as ['int8', 'int4', None]",
            candidates=given,
        )
    found: list[Candidate] = []
    for each in given:
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
        for candidate in candidates:
            rules = {pattern(name, module): candidate.given for name, module in layers.items()}
            configure(model, {**rules, **self._off})
            if any(map(wants_range, named_quantizers(model).values())):
                calibrate(model, batches, existing="overwrite", progress=False)
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
            _look_for_fast_paths(layer)
            self._in_place[name] = candidate

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
        with warning_of_late_ranges([model]):
            for name, candidate in chosen.items():
                known = self.of(name, candidate)
                for own_name, quantizer in own_quantizers(self._layers[name]).items():
                    found = known.get(own_name)
                    if found is None or found.disabled:
                        quantizer.disable()
                    elif not found.descriptor.dynamic and found.amax is not None:
                        quantizer.replace_range(found.amax.detach())


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
