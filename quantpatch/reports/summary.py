"""``summary``: a table with a line for each quantizer of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import nn

from quantpatch.layers.base import QuantizedLayer, is_quantizer, weight_owner
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.reports.folding import alike, folded_name, starred
from quantpatch.reports.report import Report, table_of
from quantpatch.torch_tools.class_swap import written_name
from quantpatch.torch_tools.forward import demand_model
from quantpatch.torch_tools.sharded import local_part

if TYPE_CHECKING:
    from rich.table import Table


@attrs.frozen
class QuantizerRow:
    """A line of a summary.

    Attributes:
        name: Qualified name of the quantizer.
        layer: Class of the module that holds it.
        format: Name of the number format.
        bits: Bits an element.
        axis: Kept axes; empty for one range per tensor.
        ranges: How many ranges it has (0 while they are not known).
        amax_min: The smallest of them, or None.
        amax_max: The largest of them, or None.
        state: What it does with a tensor, such as ``"calibrated"`` or ``"dynamic (not calibrated)"``.
    """

    name: str
    layer: str
    format: str
    bits: int
    axis: tuple[int, ...]
    ranges: int
    amax_min: float | None
    amax_max: float | None
    state: str


@attrs.frozen
class Summary(Report):
    """The quantizers of a model; prints as a table.

    Attributes:
        model: Class of the model.
        rows: A row for each quantizer, in the model's order.
        float_layers: Qualified name and class of each module that has parameters of its own and no
            quantizer.
    """

    model: str
    rows: tuple[QuantizerRow, ...]
    float_layers: tuple[tuple[str, str], ...]

    def __rich__(self) -> Table:
        return self._table(self.rows)

    def folded(self) -> Table:
        """The table with one row for quantizers that are alike and whose names differ in numbers alone."""
        groups = alike(self.rows, lambda r: (starred(r.name), r.layer, r.format, r.bits, r.axis, r.state))
        return self._table([_folded(group) for group in groups])

    def _table(self, rows: Sequence[QuantizerRow]) -> Table:
        numbers = ("bits", "axis", "amax")
        headings = ("quantizer", "layer", "format", *numbers, "state")
        title = f"{self.model}: {len(self.rows)} quantizers"
        table = table_of(*headings, right=numbers, title=title, caption=self._caption())
        for row in rows:
            axis = ", ".join(map(str, row.axis)) or "-"
            table.add_row(row.name, row.layer, row.format, str(row.bits), axis, _range(row), row.state)
        return table

    def _caption(self) -> str:
        states = Counter(row.state for row in self.rows)
        parts = [f"{count} {state}" for state, count in states.most_common()]
        if self.float_layers:
            kinds = Counter(kind for _, kind in self.float_layers)
            left = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            parts.append(f"without quantizers: {left}")
        return "; ".join(parts)


def _folded(rows: list[QuantizerRow]) -> QuantizerRow:
    lows = [row.amax_min for row in rows if row.amax_min is not None]
    highs = [row.amax_max for row in rows if row.amax_max is not None]
    return attrs.evolve(
        rows[0],
        name=folded_name([row.name for row in rows]),
        ranges=max(row.ranges for row in rows) if len(rows) == 1 else sum(row.ranges for row in rows),
        amax_min=min(lows, default=None),
        amax_max=max(highs, default=None),
    )


def _range(row: QuantizerRow) -> str:
    if row.amax_min is None or row.amax_max is None:
        return "-"
    if row.ranges == 1:
        return f"{row.amax_max:.4g}"
    return f"{row.amax_min:.4g} .. {row.amax_max:.4g}"


def _row(name: str, holder: nn.Module, quantizer: Any) -> QuantizerRow:
    if isinstance(quantizer, TensorQuantizer):
        amax = None if quantizer.descriptor.dynamic else quantizer.amax
        kind, bits = quantizer.format_name, quantizer.format.bits
        axis, state = quantizer.descriptor.kept_axes, quantizer.state
    else:  # of a plugin's own kind
        amax = getattr(quantizer, "amax", None)
        kind, bits = (
            getattr(quantizer, "format_name", type(quantizer).__name__),
            getattr(quantizer, "bits", 0),
        )
        axis, state = getattr(quantizer, "axis", None), _state_of(quantizer, amax)
    # Of a range in pieces those of this rank: another may not be here to ask.
    here = None if amax is None else local_part(amax.detach()).abs()
    known = here is not None and not here.is_meta and here.numel() > 0
    return QuantizerRow(
        name=name,
        layer=written_name(type(holder)),
        format=kind,
        bits=bits,
        axis=() if axis is None else axis if isinstance(axis, tuple) else (axis,),
        ranges=0 if amax is None else amax.numel(),
        amax_min=float(here.min()) if here is not None and known else None,
        amax_max=float(here.max()) if here is not None and known else None,
        state=state,
    )


def _state_of(quantizer: Any, amax: Any) -> str:
    """What a quantizer of a plugin's own kind does, in the words for this library's."""
    if quantizer.disabled:
        return "disabled"
    if not quantizer.quantizing:
        return "not quantizing"
    return "dynamic (not calibrated)" if amax is None else "calibrated"


def _is_operand(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """Whether a module is a part of a layer that has a quantizer for its weight."""
    owners = (weight_owner(lambda n: type(modules.get(n)), f"{name}.{own}") for own in module._parameters)
    layers: list[tuple[Any, str]] = [(modules.get(layer), operand) for layer, operand in owners]
    return any(
        isinstance(layer, QuantizedLayer) and type(layer).quantizer(layer, operand) is not None
        for layer, operand in layers
    )


def summary(model: nn.Module) -> Summary:
    """What quantizers a model has, what they do, and which layers have none.

    Args:
        model: Any model; it is not run.

    Returns:
        A value to print, to look through, or to keep as JSON.

    Raises:
        ArgumentTypeError: ``model`` is not a model.
    """
    demand_model(model, "summary")
    modules = dict(model.named_modules())
    rows = tuple(
        _row(name, modules[name.rpartition(".")[0]] if name else model, module)
        for name, module in modules.items()
        if is_quantizer(module)
    )
    without = tuple(
        (name, written_name(type(module)))
        for name, module in modules.items()
        if not (isinstance(module, QuantizedLayer) or is_quantizer(module))
        and module._parameters
        and not _is_operand(name, module, modules)
    )
    return Summary(written_name(type(model)), rows, without)
