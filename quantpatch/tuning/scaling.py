"""Factors that neighbours exchange: put, and taken back where the model computes something else in float."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from quantpatch.dataflow import Dataflow, Operator, dataflow
from quantpatch.dataflow.verified import apply_if_same
from quantpatch.layers.input_factor import drop_input_factor, input_factor_of, multiply_input_of
from quantpatch.layers.quantizer import in_float
from quantpatch.quantize.reasons import Reason
from quantpatch.tuning.exchanges import Channels, Exchange, before_moves, exchanges, weight_of
from quantpatch.tuning.operands import Layout, Seen
from quantpatch.tuning.products import Product
from quantpatch.tuning.reasons import Different, NoExchange, NotBetter
from quantpatch.tuning.report import Tuned, relative
from quantpatch.tuning.tuning import Tuning
from quantpatch.tuning.weights import Weight


class Scaling:
    """The exchanges of a model, and the factors that are in force.

    Args:
        tuning: The tuning.
        weights: The weights whose inputs are looked at.
        at_runtime: Whether layers may divide what they are given, where nothing before them can.

    Attributes:
        exchanges: What can be exchanged, in the order of the run. What cannot is noted as skipped.
    """

    def __init__(self, tuning: Tuning, weights: Mapping[str, Weight], *, at_runtime: bool = False) -> None:
        self._tuning = tuning
        names = {id(parameter): name for name, parameter in tuning.model.named_parameters()}
        #: The weights by the names of their parameters.
        self.weights = {names[id(weight.tensor)]: weight for weight in weights.values()}
        with in_float(tuning.model):
            self._flow: Dataflow = dataflow(tuning.model, tuning.outputs)
        found, skipped = exchanges(tuning.model, self._flow, self.weights)
        if at_runtime:
            found += self._at_runtime(skipped)
        self.exchanges: list[Exchange] = found
        for name, reason in skipped.items():
            tuning.skipped[self.weights[name].name] = reason
        self._places: dict[str, tuple[Any, str]] = {}
        for prefix, module in tuning.model.named_modules():
            for attribute in module._parameters:
                self._places.setdefault(f"{prefix}.{attribute}".lstrip("."), (module, attribute))
        used = {name for exchange in found for name in exchange.parameters}
        self._before = {name: self.tensor(name).detach().clone() for name in used}
        self._input_factors: dict[str, Tensor | None] = {}
        self._factors: dict[str, list[tuple[Exchange, Channels, Tensor]]] = {name: [] for name in used}

    def _at_runtime(self, skipped: dict[str, Reason]) -> list[Exchange]:
        """Exchanges of layers that multiply what they are given, for weights taken off the list."""
        groups: dict[int, list[tuple[str, Operator, Layout]]] = {}
        for operator in self._flow.operators:
            name, layout = weight_of(operator)
            weight = None if name is None else self.weights.get(name)
            if name not in skipped or weight is None or layout is None:
                continue
            layer, x = weight.layer, operator.products[-1].operands[0][1]
            fits = (
                tuple(layer.inputs) == ("input",)
                and weight.owner is layer
                and operator.module == weight.layer_name
            )
            if fits and x is not None and self._flow.calls[weight.layer_name] == self._flow.calls[""]:
                groups.setdefault(id(before_moves(x)), []).append((name, operator, layout))
        found = []
        for group in groups.values():
            used_by = tuple(Channels(name, layout, is_input=True) for name, _, layout in group)
            if len({channels.count(self._tensor_of(channels.parameter)) for channels in used_by}) > 1:
                continue
            layers = tuple(self.weights[name].layer_name for name, *_ in group)
            found.append(Exchange(", ".join(layers), (), used_by, (), layers))
            for name, *_ in group:
                del skipped[name]
        return found

    def _tensor_of(self, parameter: str) -> Tensor:
        return self.weights[parameter].tensor.contiguous()

    def tensor(self, parameter: str) -> Tensor:
        """A parameter by its name."""
        module, attribute = self._places[parameter]
        found: Tensor = module._parameters[attribute]
        return found

    def users(self) -> dict[str, Weight]:
        """The weights that use what can be scaled, in the order of the run."""
        names = {channels.parameter for exchange in self.exchanges for channels in exchange.used_by}
        return {weight.name: weight for name, weight in self.weights.items() if name in names}

    def choose(
        self,
        candidates: Callable[[Sequence[Product]], list[Tensor]],
        lost: Callable[[Product, Tensor | None], tuple[float, float]],
        *,
        rows: int = 0,
        always: bool = False,
    ) -> None:
        """Puts for each exchange the factors with which products lose least, if that is less than without.

        Args:
            candidates: Gives the factors to try for the products of an exchange.
            lost: Gives what a product loses with factors, and what there is to lose.
            rows: How many inputs of each product to keep for these; 0: their moments.
            always: Whether to put the best ones also where they lose more.
        """
        chosen: dict[int, Tensor] = {}
        costs: dict[int, tuple[float, float, float]] = {}
        seen: Seen = {}
        waiting = dict(enumerate(self.exchanges))
        with self._tuning.in_blocks(self.users(), in_float=True) as blocks:
            for block in blocks:
                seen |= block.moments(rows=rows, gram=not rows)
                for index, exchange in list(waiting.items()):
                    names = [self.weights[channels.parameter].name for channels in exchange.used_by]
                    if any(name not in seen for name in names):
                        continue
                    products = self._products(waiting.pop(index), seen)
                    for name in names:  # which no other exchange has
                        del seen[name]
                    if not products:
                        continue
                    before, size = _sums(lost(product, None) for product in products)
                    tried = [(_sums(lost(p, f) for p in products)[0], f) for f in candidates(products)]
                    after, factor = min(tried, key=lambda pair: pair[0])
                    if after < before or always:
                        chosen[index], costs[index] = factor, (before, after, size)
                    else:
                        for product in products:
                            self._tuning.skipped[product.weight.name] = NotBetter(relative(before, size))
        kept = self.keep_if_same(chosen)
        for index in kept:
            before, after, size = costs[index]
            for channels in self.exchanges[index].used_by:
                name = self.weights[channels.parameter].name
                note = "with a factor at runtime" if self.exchanges[index].at_runtime else ""
                self._tuning.tuned[name] = Tuned(relative(before, size), relative(after, size), note)

    def _products(self, exchange: Exchange, seen: Seen) -> list[Product]:
        """The products of an exchange; none if one of its weights is multiplied in other ways as well."""
        found = []
        for channels in exchange.used_by:
            weight = self.weights[channels.parameter]
            by_layout = seen[weight.name]
            if channels.layout is None or list(by_layout) != [channels.layout]:
                self._tuning.skipped[weight.name] = NoExchange("is used in several ways")
                return []
            found.append(Product(weight, channels, by_layout[channels.layout]))
        return found

    def put(self, exchange: Exchange, factor: Tensor | None) -> None:
        """Divides the channels where they are made by a factor, and multiplies them where they are used.

        Args:
            exchange: The exchange.
            factor: One for each channel, or a matrix that mixes neighbouring ones; None takes back what is in
                force.
        """
        for channels in (*exchange.made_by, *exchange.used_by):
            name = channels.parameter
            active = [item for item in self._factors[name] if item[0] is not exchange]
            if factor is not None:
                divides = factor.dim() == 1 and not channels.is_input
                active.append((exchange, channels, 1 / factor if divides else factor))
            self._factors[name] = active
            value = self._before[name]
            for _, where, by in active:
                change = where.scaled if by.dim() == 1 else where.rotated
                value = change(value, by.to(value.device))
            with torch.no_grad():
                self.tensor(name).copy_(value)
        for name in exchange.at_runtime:
            self._divide_input_of(name, factor)

    def _divide_input_of(self, name: str, factor: Tensor | None) -> None:
        layer: Any = self._tuning.model.get_submodule(name)
        before = self._input_factors.setdefault(name, input_factor_of(layer))
        if factor is not None:
            # Behind the channels there are as many axes as the layer's features have behind theirs.
            shape = (-1, *[1] * (-layer.feature_axis - 1))
            by = (1 / factor.double()).to(layer.weight).reshape(shape)
            multiply_input_of(layer, by if before is None else by * before)
        elif before is not None:
            multiply_input_of(layer, before)
        else:
            drop_input_factor(layer)

    def guard(self) -> None:
        """Has all be as it was if anything fails from now on."""
        for name, before in self._before.items():
            self._tuning.guard(*self._places[name], before)
        for exchange in self.exchanges:
            for layer in exchange.at_runtime:
                self._tuning.guard_by(functools.partial(self._divide_input_of, layer, None))

    def keep_if_same(self, factors: Mapping[int, Tensor]) -> set[int]:
        """Puts factors for good, but for those with which the model computes something else in float.

        Args:
            factors: By the index of the exchange.

        Returns:
            The indices of those that are in force.
        """
        tuning = self._tuning
        self.guard()
        for exchange in self.exchanges:
            self.put(exchange, None)
        changes = {
            str(index): _Change(self, self.exchanges[index], factor) for index, factor in factors.items()
        }
        wrong = apply_if_same(tuning.model, tuning.outputs, changes)
        for key, how in wrong.items():
            for channels in self.exchanges[int(key)].used_by:
                tuning.skipped[self.weights[channels.parameter].name] = Different(how)
        kept = {index for index in factors if str(index) not in wrong}
        for name, before in self._before.items():
            if self._factors[name]:
                module, attribute = self._places[name]
                tuning.write(module, attribute, self.tensor(name), before=before)
        self._forget(kept)
        return kept

    def _forget(self, kept: set[int]) -> None:
        """Makes the ranges unknown of what sees other values now."""
        parameters = {name for index in kept for name in self.exchanges[index].parameters}
        values = {id(value) for index in kept for value in self.exchanges[index].values}
        for name in parameters:
            if name in self.weights:
                self._tuning.forget(self.weights[name].quantizer)
        for name in (name for index in kept for name in self.exchanges[index].at_runtime):
            self._tuning.changed_factor(name)
            quantizer = self._tuning.model.get_submodule(name).quantizer("input")  # type: ignore[operator]
            if quantizer is not None:
                self._tuning.forget(quantizer)
        for quantizer, seen in self._flow.quantized.items():
            if any(id(value) in values for value in seen):
                self._tuning.forget(quantizer)


def most(values: Iterable[Tensor]) -> Tensor:
    """The largest of each element."""
    return torch.stack(list(values)).amax(0)


def _sums(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    several = list(pairs)
    return sum(a for a, _ in several), sum(b for _, b in several)


@attrs.frozen(eq=False)
class _Change:
    scaling: Scaling
    exchange: Exchange
    factor: Tensor

    def apply(self) -> None:
        self.scaling.put(self.exchange, self.factor)

    def undo(self) -> None:
        self.scaling.put(self.exchange, None)
