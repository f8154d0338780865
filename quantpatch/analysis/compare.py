"""``compare``: how far each quantized layer's output is from the float model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import attrs
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantpatch.errors import ArgumentError
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.reports.report import Report, table_of
from quantpatch.torch_tools.class_swap import written_name
from quantpatch.torch_tools.fast_paths import without_fast_paths
from quantpatch.torch_tools.forward import as_batches, demand_model, evaluating, run_batch


@attrs.frozen
class ComparisonRow:
    """A layer's output, quantized against float.

    Attributes:
        layer: Qualified name.
        kind: Class of the quantized layer.
        sqnr: Signal-to-quantization-noise ratio in dB, ``10 log10(sum(f^2) / sum((f - q)^2))`` over all
            batches; infinite if there is no difference, NaN if an output holds NaN or infinity.
        cosine: Cosine of the angle between the two outputs, 1 if they point the same way.
    """

    layer: str
    kind: str
    sqnr: float
    cosine: float


@attrs.frozen
class ComparisonReport(Report):
    """What ``compare`` found, worst layer first; prints as a table."""

    rows: tuple[ComparisonRow, ...]

    def __rich__(self) -> Table:
        numbers = ("SQNR (dB)", "cosine")
        table = table_of(
            "layer", "kind", *numbers, right=numbers, title="Quantized against float, worst first"
        )
        for row in self.rows:
            table.add_row(row.layer or "(model)", row.kind, f"{row.sqnr:.1f}", f"{row.cosine:.5f}")
        return table


@attrs.define
class _Sums:
    """Running sums over all outputs of a layer, in float64."""

    signal: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    other: float = 0.0

    def add(self, expected: Tensor, got: Tensor) -> None:
        f, q = expected.double(), got.double()
        self.signal += f.square().sum().item()
        self.noise += (f - q).square().sum().item()
        self.product += (f * q).sum().item()
        self.other += q.square().sum().item()

    def sqnr(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    def cosine(self) -> float:
        norms = math.sqrt(self.signal * self.other)
        if norms:
            return self.product / norms
        return 1.0 if self.noise == 0 else 0.0


def compare(model: nn.Module, float_model: nn.Module, data: Iterable[Any]) -> ComparisonReport:
    """Runs a model beside its float version and compares what each quantized layer puts out.

    Each layer gets the input that its own model makes, so errors of the layers before are in it.

    Args:
        model: A quantized model.
        float_model: The reference: a model with the same layer names.
        data: Batches, as ``calibrate`` takes them.

    Returns:
        A row for each quantized layer that ran, worst first.

    Raises:
        ArgumentError: The models are one or have no layer in common, there is no batch, or a layer's
            outputs have different shapes.
        ArgumentTypeError: One is not a model, or the data not batches.
        InputError: The data is on another device.
    """
    for given in (model, float_model):
        demand_model(given, "compare")
    if model is float_model:
        raise ArgumentError(
            "both are the same model, so there is nothing to compare. convert() changes a model in "
            "place: keep a float one, float_model = copy.deepcopy(model), before it",
            float_model=model,
        )
    references = dict(float_model.named_modules())
    layers = {
        name: module for name, module in model.named_modules() if name in references and _is_quantized(module)
    }
    if not layers and any(map(_is_quantized, float_model.modules())):
        raise ArgumentError(
            "the second model has quantized layers and the first has none: write compare(quantized_model, "
            "float_model, data)",
            model=model,
        )
    if not layers:
        raise ArgumentError(
            f"{written_name(type(model))} has no quantized layer by a name that "
            f"{type(float_model).__name__} has; compare a model with its own quantized version",
            model=model,
        )
    sums = {name: _Sums() for name in layers}
    ran: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(evaluating(float_model))
        stack.enter_context(evaluating(model))
        stack.enter_context(without_fast_paths())
        expected: dict[str, list[Tensor]] = {}
        got: dict[str, list[Tensor]] = {}
        for name, layer in layers.items():
            stack.callback(references[name].register_forward_hook(_keep(expected, name)).remove)
            stack.callback(layer.register_forward_hook(_keep(got, name)).remove)
        with torch.no_grad():
            for batch in as_batches(data):
                expected.clear()
                got.clear()
                run_batch(float_model, batch)
                run_batch(model, batch)
                for name in got:
                    ran.add(name)
                    _add_all(name, sums[name], expected.get(name, []), got[name])
    if not ran:
        raise ArgumentError("no batch of the data reaches a quantized layer", data=data)
    rows = [
        ComparisonRow(name, written_name(type(layers[name])), sums[name].sqnr(), sums[name].cosine())
        for name in layers
        if name in ran
    ]
    # NaN, which compares with nothing, is worse than any noise.
    return ComparisonReport(tuple(sorted(rows, key=lambda row: (row.sqnr == row.sqnr, row.sqnr, row.layer))))


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLayer) or any(
        isinstance(m, TensorQuantizer) for m in module.children()
    )


def _keep(kept: dict[str, list[Tensor]], name: str) -> Callable[[Any, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        first = next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None)
        if first is not None:
            kept.setdefault(name, []).append(first.detach())

    return hook


def _add_all(name: str, sums: _Sums, expected: list[Tensor], got: list[Tensor]) -> None:
    if len(expected) != len(got) or any(f.shape != q.shape for f, q in zip(expected, got, strict=True)):
        raise ArgumentError(
            f"layer {name!r} ran {len(expected)} times with outputs of shapes "
            f"{[tuple(t.shape) for t in expected]} in the float model, and {len(got)} times with "
            f"{[tuple(t.shape) for t in got]} in the quantized one",
            float_model=expected,
        )
    for f, q in zip(expected, got, strict=True):
        sums.add(f, q)
