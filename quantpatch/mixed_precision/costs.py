"""What a layer costs in a format: bits of its weights, its multiplications, or a measured latency."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantpatch.dataflow import Dataflow
from quantpatch.errors import ArgumentError, ArgumentTypeError, MissingExtraError, QuantPatchError
from quantpatch.export import export_onnx, prepare
from quantpatch.export.onnx.comparison import Latency
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.operations import quantizer_name
from quantpatch.layers.quantizer import named_quantizers
from quantpatch.layers.stand_ins import without_stand_in
from quantpatch.mixed_precision.formats import Candidate, Quantizers, signature, wants_range
from quantpatch.mixed_precision.layers import own_quantizers
from quantpatch.quantize.calibrate import calibrate
from quantpatch.recipes.descriptor import Recipe

CostName = Literal["bits", "macs", "latency"]
#: Gets a layer's name, the layer and its recipe (None: float); gives what it costs, in a unit of its own.
CostFunction = Callable[[str, nn.Module, Recipe | None], float]
#: Gets a layer's name and its quantizers.
LayerCost = Callable[[str, Candidate, Quantizers], float]

UNITS: Mapping[str, str] = {
    "bits": "bits of weights",
    "macs": "bit operations",
    "latency": "ms in ONNX Runtime",
}


def checked_cost(cost: Any) -> Any:
    """The same.

    Raises:
        ArgumentError: It is none of the names.
        ArgumentTypeError: It is neither a name nor a function.
    """
    if callable(cost):
        return cost
    if not isinstance(cost, str):
        raise ArgumentTypeError(
            f"cost={cost!r}: expected 'bits', 'macs', 'latency' or a function of a layer's name, the "
            f"layer and its recipe (None for float)",
            cost=cost,
        )
    if cost not in get_args(CostName):
        raise ArgumentError(
            f"cost={cost!r}: expected {', '.join(map(repr, get_args(CostName)))} or a function",
            cost=cost,
        )
    return cost


def layer_cost(
    cost: Any, layers: Mapping[str, nn.Module], flow: Dataflow, calls: Mapping[str, Any]
) -> LayerCost:
    """The function that says what a layer costs.

    Args:
        cost: As ``search`` takes it.
        layers: The layers, by name.
        flow: What the model computes for a batch.
        calls: The arguments and keywords that each layer got there, by name.
    """
    if cost == "bits":
        return _Bits(layers)
    if cost == "macs":
        return _BitOperations(layers, flow)
    if cost == "latency":
        return _Latency(layers, flow, calls)

    def asked(name: str, candidate: Candidate, quantizers: Quantizers) -> float:
        value = cost(name, layers[name], candidate.recipe)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise ArgumentError(
                f"cost returned {value!r} for {name!r} as {candidate.name}: expected a finite number >= 0",
                cost=value,
            )
        return number

    return asked


def _weights(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each weight of a layer, by the name of its quantizer."""
    if isinstance(layer, QuantizedLayer):
        for operand in layer.weight_axes():
            weight = without_stand_in(layer, operand)
            if isinstance(weight, Tensor):
                yield quantizer_name(operand), weight


def _bits(quantizers: Quantizers, name: str, in_float: float) -> float:
    """Bits an element of what a quantizer is for, with its share of a block's scale."""
    quantizer = quantizers.get(name)
    if quantizer is None or quantizer.disabled:
        return in_float
    return quantizer.format.bits_with_scale


class _Bits:
    """Bits of weights; those that layers share count once."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._own: dict[str, list[tuple[str, int, int]]] = {}
        seen: set[int] = set()
        for name, layer in layers.items():
            weights = [(own_name, w) for own_name, w in _weights(layer) if id(w) not in seen]
            if not getattr(layer, "parametrizations", None):  # what is computed has an identity for a moment
                seen.update(id(w) for _, w in weights)
            self._own[name] = [(own_name, w.numel(), 8 * w.element_size()) for own_name, w in weights]

    def __call__(self, name: str, candidate: Candidate, quantizers: Quantizers) -> float:
        return sum(count * _bits(quantizers, own, width) for own, count, width in self._own[name])


class _BitOperations:
    """Multiply-accumulates, each as many as the bits of the one operand times those of the other."""

    def __init__(self, layers: Mapping[str, nn.Module], flow: Dataflow) -> None:
        self._weights = {
            name: {own: 8 * weight.element_size() for own, weight in _weights(layer)}
            for name, layer in layers.items()
        }
        self._macs = dict.fromkeys(layers, 0)
        for operator in flow.operators:
            if operator.module in self._macs:
                self._macs[operator.module] += sum(product.macs for product in operator.products)

    def __call__(self, name: str, candidate: Candidate, quantizers: Quantizers) -> float:
        weights = self._weights[name]
        width = max(weights.values(), default=32)
        others = [own for own in quantizers if own not in weights and own != quantizer_name("output")]
        left = max((_bits(quantizers, own, width) for own in others), default=width)
        right = max((_bits(quantizers, own, width) for own in weights), default=left)
        return self._macs[name] * left * right


class _Latency:
    """What a layer alone takes in ONNX Runtime, on what it got in the model; float is to be asked last."""

    def __init__(self, layers: Mapping[str, nn.Module], flow: Dataflow, calls: Mapping[str, Any]) -> None:
        self._layers, self._flow, self._calls = layers, flow, calls
        self._times: dict[Any, Latency] = {}
        self._in_float: dict[str, float] = {}

    def __call__(self, name: str, candidate: Candidate, quantizers: Quantizers) -> float:
        if not signature(quantizers):  # what no candidate quantizes costs nothing that could be saved
            return self._in_float.get(name, 0.0)
        layer, (args, kwargs) = self._layers[name], self._calls[name]
        shapes = [(tuple(x.shape), x.dtype) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        key = (type(layer), layer.extra_repr(), repr(shapes), signature(quantizers))
        if key not in self._times:
            self._times[key] = self._measured(name, candidate, quantizers)
        count, times = self._flow.calls[name], self._times[key]
        self._in_float.setdefault(name, times.float_ms * count)
        return times.ms * count

    def _measured(self, name: str, candidate: Candidate, quantizers: Quantizers) -> Latency:
        args, kwargs = self._calls[name]
        layer = copy.deepcopy(self._layers[name])
        for own_name in own_quantizers(layer):
            del layer._modules[own_name]
        layer._modules.update(copy.deepcopy(dict(quantizers)))
        alone = _Alone(layer)
        try:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # that it is slower than float is what is asked here
                prepare(alone, args, kwargs=kwargs)
                if any(wants_range(q) and q.amax is None for q in named_quantizers(alone).values()):
                    calibrate(alone, lambda model: model(*args, **kwargs), existing="keep", progress=False)
                path = Path(folder) / "layer.onnx"
                report = export_onnx(alone, args, path, kwargs=kwargs, progress=False)
        except MissingExtraError:
            raise
        except QuantPatchError as error:
            raise ArgumentError(
                f"cost='latency' measures each layer in ONNX Runtime, and {name!r} as {candidate.name} does "
                f"not export: {error}. Leave out that candidate, or write cost='bits' or cost='macs'",
                cost="latency",
            ) from error
        compared = report.comparison
        if compared is None or compared.latency is None:
            raise ArgumentError(
                f"cost='latency': {name!r} as {candidate.name} does not run in ONNX Runtime here"
                f"{'' if compared is None else f' ({compared.not_run})'}; write cost='bits' or cost='macs'",
                cost="latency",
            )
        return compared.latency


class _Alone(nn.Module):
    """A model of one layer, with keywords as that takes them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)
