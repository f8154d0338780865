"""``audit``: the share of a model's multiplications that runs on quantized operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from rich.console import Group
from rich.text import Text
from torch import Tensor
from torch.jit import ScriptModule

from quantpatch.analysis.audit.reasons import FloatOperands, reason_for, why_hidden
from quantpatch.analysis.audit.trace import Trace, trace
from quantpatch.errors import ArgumentError, CheckError, listed, warn_caller
from quantpatch.layers.base import QuantizedLayer, is_quantizer, named_layers, quantized_weights
from quantpatch.layers.operations import quantizer_name
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.numerics.ranges import reduce_amax
from quantpatch.plugins.registry import registry
from quantpatch.quantize.call_ranges import CallRanges
from quantpatch.quantize.compose import compose
from quantpatch.quantize.reasons import Reason
from quantpatch.quantize.resolve import resolver
from quantpatch.reports.folding import alike, folded_name, folded_names, starred
from quantpatch.reports.render import as_percent
from quantpatch.reports.report import Report, table_of
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.class_swap import dotted, own_class, written_name
from quantpatch.torch_tools.forward import arguments, demand_model, explaining, uncompiled
from quantpatch.torch_tools.sharded import is_sharded

# How many times the squared error of its own range a weight has with a range that is not its own any more:
# 6 dB, which no method of calibration gives away.
_OUTGROWN = 4.0


@attrs.frozen
class CoverageRow:
    """Products of one kind in one module.

    Attributes:
        module: Qualified name of the innermost module that ran them.
        layer: Its class.
        operation: What they are, such as ``"matrix product"`` or ``"attention scores"``.
        calls: How often they ran.
        macs: Multiply-accumulates of all calls.
        operands: For each operand its role, and the quantizer it came out of, or None.
        why: Why an operand was float, as a value; None if none was.
        of_weight: Whether it is a step in the making of a weight, by a parametrization or spectral norm's
            hook: the same for every input, and not counted.
        weights: Roles of the operands that are weights.
    """

    module: str
    layer: str
    operation: str
    calls: int
    macs: int
    operands: tuple[tuple[str, str | None], ...]
    why: Reason | None
    of_weight: bool = False
    weights: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why an operand was float, as a sentence; empty if none was."""
        return "" if self.why is None else str(self.why)

    @property
    def quantized(self) -> bool:
        """Whether every operand came out of a quantizer."""
        return all(quantizer is not None for _, quantizer in self.operands)

    @property
    def float_operands(self) -> tuple[str, ...]:
        """Roles of the operands that came out of no quantizer."""
        return tuple(role for role, quantizer in self.operands if quantizer is None)


@attrs.frozen
class CoverageReport(Report):
    """What ``audit`` saw; prints as a table.

    Attributes:
        model: Class of the model.
        rows: A row for each kind of product in each module, in the order they ran.
        unreached: Quantizers that no tensor passed through.
        opaque: Operators that are not torch's own: what they multiply is not counted.
        to_paste: A block whose ``operations`` quantize what classes multiply that nothing covers here; empty
            if there are none.
        replacements: The same as classes that quantize it always, and a block that uses them.
        hidden: Classes that nothing covers, with the reason why ``operations`` would not either.
        outgrown: Quantizers of weights whose range is that of other values, as after an adapter was merged
            into the weight; with how many times the error of a range of its own the weight has now.
    """

    model: str
    rows: tuple[CoverageRow, ...]
    unreached: tuple[str, ...]
    opaque: tuple[str, ...]
    to_paste: str = ""
    replacements: str = ""
    hidden: tuple[tuple[str, str], ...] = ()
    outgrown: tuple[tuple[str, float], ...] = ()

    @property
    def macs(self) -> int:
        """All multiply-accumulates, without those that only make weights."""
        return sum(row.macs for row in self.rows if not row.of_weight)

    @property
    def share(self) -> float:
        """Share of multiply-accumulates with every operand quantized; 0 if there are none."""
        quantized = sum(row.macs for row in self.rows if row.quantized and not row.of_weight)
        return quantized / self.macs if self.macs else 0.0

    @property
    def layers_with_weights(self) -> tuple[int, int]:
        """How many layers multiply weights that are quantized, all of them, and how many multiply weights."""
        layers: dict[str, bool] = {}
        for row in self.rows:
            if row.weights and not row.of_weight:
                floats = not set(row.weights).isdisjoint(row.float_operands)
                layers[row.module] = layers.get(row.module, True) and not floats
        return sum(layers.values()), len(layers)

    _of_names = False

    def _fields(self) -> dict[str, Any]:
        """With the reasons in words, the share, and the layers with weights."""
        counts = {"macs": self.macs, "share": self.share, "layers_with_weights": self.layers_with_weights}
        report = super()._fields()
        for row, written in zip(self.rows, report["rows"], strict=True):
            del written["why"]
            written["reason"] = row.reason
        return {**report, **counts}

    def headline(self) -> str:
        """How much is quantized: products, or where no product is, weights."""
        quantized, layers = self.layers_with_weights
        of_weights = f"weights of {quantized} of {layers} layers quantized"
        by_recipe = [row.why.by_recipe for row in self.rows if isinstance(row.why, FloatOperands)]
        left = list(dict.fromkeys(role for roles in by_recipe for role in roles))
        if left:
            shown = "inputs" if left == ["input"] else " and ".join(left)
            of_weights = f"{of_weights}; {shown} float, as the recipe says"
        if quantized and not self.share:
            return of_weights
        share = f"{as_percent(self.share)} of {self.macs:,} multiply-accumulates quantized"
        return f"{share}; {of_weights}" if left and quantized else share

    def __rich__(self) -> Group:
        return self._shown(self.rows, list)

    def folded(self) -> Group:
        """The same with one row for alike products in modules whose names differ in numbers alone."""
        return self._shown([_folded(group) for group in alike(self.rows, _likeness)], folded_names)

    def _shown(self, rows: Sequence[CoverageRow], names: Callable[[Iterable[str]], list[str]]) -> Group:
        numbers, title = ("calls", "MACs", "share"), f"{self.model}: {self.headline()}"
        headings = ("module", "layer", "operation", *numbers, "float because")
        table = table_of(*headings, right=numbers, title=title)
        macs = self.macs  # a sum over all rows
        for row in rows:
            floats = ", ".join(row.float_operands)
            why = f"{floats}: {row.reason}" if floats else ""
            share = "-" if row.of_weight or not macs else as_percent(row.macs / macs)
            table.add_row(
                row.module or "(model)",
                row.layer,
                row.operation,
                str(row.calls),
                f"{row.macs:,}",
                share,
                why,
                style=None if row.quantized else "dim" if row.of_weight else "yellow",
            )
        notes: list[Any] = [table]
        if self.unreached:
            notes.append(
                Text(f"Quantizers that no tensor passed through: {', '.join(names(self.unreached))}")
            )
        if self.opaque:
            notes.append(Text(f"Operators that cannot be looked into: {', '.join(self.opaque)}"))
        if self.outgrown:
            found = ", ".join(f"{name} ({times:.0f} times)" for name, times in self.outgrown)
            notes.append(
                Text(
                    f"Weights changed since their ranges were found, and have more error than with ranges of "
                    f"their own: {found}. Calibrate again: qp.calibrate(model, data, existing='overwrite')"
                )
            )
        if self.to_paste:
            notes.append(Text("\nForwards multiply by themselves. This quantizes their operands:"))
            notes.append(Text(self.to_paste, no_wrap=True))  # to be pasted as it is
        if self.replacements:
            notes.append(Text("\nOr as replacements, for a plugin:"))
            notes.append(Text(self.replacements, no_wrap=True))
        for name, why in self.hidden:
            notes.append(Text(f"\nNothing covers {name}: {why}"))
        return Group(*notes)


def _likeness(row: CoverageRow) -> Any:
    """What rows have in common that can be shown as one."""
    operands = tuple((role, quantizer and starred(quantizer)) for role, quantizer in row.operands)
    return starred(row.module), row.layer, row.operation, operands, row.why, row.of_weight


def _folded(rows: list[CoverageRow]) -> CoverageRow:
    return attrs.evolve(
        rows[0],
        module=folded_name([row.module for row in rows]),
        calls=sum(row.calls for row in rows),
        macs=sum(row.macs for row in rows),
    )


def audit(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    minimum: float | None = None,
) -> CoverageReport:
    """Runs a model once and reports which of its multiplications ran on quantized operands.

    The report is made from the operators that were really executed, not from the classes of layers: a
    function called in some forward, a fast path, or a layer that was not replaced shows up with its
    share of the work and the reason.

    The model runs in eval mode without gradients; modes and random state are as before afterwards, also
    if it raises. Values count as quantized as long as they are only moved, picked or scaled.

    Args:
        model: The model.
        args: Arguments to run it on: a tensor, or a tuple.
        kwargs: Keyword arguments to run it on.
        minimum: Smallest share to accept, from 0 to 1.

    Returns:
        The report.

    Raises:
        ArgumentTypeError: ``model`` is not a model.
        ArgumentError: ``model`` is an ``nn.DataParallel``, or ``minimum`` is not a share.
        CheckError: The share is below ``minimum``. The error holds the report.
        InputError: The model failed, and its inputs are on a device where it is not.

    Warns:
        QuantPatchWarning: Modules ran in another thread, where products are not seen.
    """
    demand_model(model, "audit")
    if minimum is not None and not 0 <= minimum <= 1:
        raise ArgumentError(
            f"minimum={minimum!r}: expected a share from 0 to 1, such as 0.95", minimum=minimum
        )
    # What torch.compile wraps, since a compiled graph hides its modules.
    runner = uncompiled(model)
    if isinstance(runner, nn.DataParallel):
        raise ArgumentError(
            "nn.DataParallel runs copies of the layers: write audit(model.module, ...)", model=model
        )
    args, kwargs = arguments(args, kwargs)
    with explaining(runner, (args, kwargs)), CallRanges(runner) as calls:
        seen = trace(runner, lambda: runner(*args, **kwargs))
    calls.warn()
    if seen.elsewhere:
        warn_caller(
            f"these modules ran in another thread, where the audit sees no product, so none of theirs is "
            f"counted: {listed(sorted(seen.elsewhere))}. Have the model compute in the thread that calls it "
            f"for the audit, or audit the part that runs there by itself"
        )
    report = report_of(runner, seen)
    if minimum is not None and report.share < minimum:
        floats = (row for row in report.rows if not (row.quantized or row.of_weight))
        worst = max(floats, key=lambda row: row.macs, default=None)
        hint = f" The largest float part is {worst.module!r}: {worst.reason}." if worst else ""
        raise CheckError(
            f"{as_percent(report.share)} of the multiply-accumulates of {report.model} ran on quantized "
            f"operands, expected at least {minimum:.1%}.{hint}",
            report=report,
        )
    return report


def report_of(model: nn.Module, seen: Trace) -> CoverageReport:
    """The report about a model that was recorded while it ran."""
    table = compose(registry.entries())
    decide = resolver(table)
    rows: dict[Any, CoverageRow] = {}
    uncovered: dict[type[Any], nn.Module] = {}
    of_weights = {name for name, *_ in quantized_weights(model)}
    for item in seen.seen:
        operands = tuple((operand.role, operand.quantizer) for operand in item.operands)
        why = reason_for(item, decide)
        weights = tuple(o.role for o in item.operands if o.parameter is not None or o.quantizer in of_weights)
        key = (item.module, item.operation, operands, why, item.of_weight)
        layer = written_name(type(item.layer))
        new = CoverageRow(item.module, layer, item.operation, 0, 0, operands, why, item.of_weight, weights)
        row = rows.get(key, new)
        rows[key] = attrs.evolve(row, calls=row.calls + 1, macs=row.macs + item.macs)
        cls = own_class(item.layer)
        covered = table.slot_of(cls) is not None or isinstance(item.layer, (QuantizedLayer, ScriptModule))
        if why is not None and not (covered or item.of_weight):
            uncovered.setdefault(cls, item.layer)
    hidden = {cls: why_hidden(layer, cls) for cls, layer in uncovered.items()}
    multiplying = [cls for cls, why in hidden.items() if why is None]
    used = seen.reached | _served(model, seen.reached)
    unreached = [
        name
        for name, module in model.named_modules()
        if is_quantizer(module) and name not in used and not module.disabled
    ]
    return CoverageReport(
        written_name(type(model)),
        tuple(rows.values()),
        tuple(unreached),
        tuple(sorted(seen.opaque)),
        _to_paste(multiplying),
        _replacements(multiplying),
        tuple((dotted(cls), why) for cls, why in hidden.items() if why is not None),
        tuple(_outgrown(model)),
    )


def _to_paste(classes: Sequence[type[Any]]) -> str:
    """A block that quantizes what the forwards of classes multiply."""
    if not classes:
        return ""
    rules = "".join(f"    {dotted(cls)!r}: 'products',\n" for cls in classes)
    return (
        f"operations = {{\n{rules}}}\nwith quantpatch.quantize_modules(operations=operations):\n"
        f"    ...  # build the model here"
    )


def _replacements(classes: Sequence[type[Any]]) -> str:
    """Replacements for classes that a module has under their names, and a block that uses them."""
    named = [cls for cls in classes if cls.__qualname__ == cls.__name__ and cls.__module__ != "__main__"]
    if not named:
        return ""
    imports = "".join(f"from {cls.__module__} import {cls.__name__}\n" for cls in named)
    made = "".join(
        f"\n\nclass Quant{cls.__name__}(quantpatch.QuantizedLayer, {cls.__name__}):\n"
        f'    operations = "products"\n'
        for cls in named
    )
    entries = "".join(f"    ({cls.__module__!r}, {cls.__name__!r}, Quant{cls.__name__}),\n" for cls in named)
    return (
        f"import quantpatch\n{imports}{made}\n\ncustom = [\n{entries}]\n"
        f"with quantpatch.quantize_modules(custom=custom):\n    ...  # build the model here"
    )


def _outgrown(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Quantizers of weights for which a range of the weight as it is would do much better."""
    for name, layer, operand, quantizer in quantized_weights(model):
        weight = getattr(layer, operand, None)
        if not isinstance(quantizer, TensorQuantizer) or not isinstance(weight, Tensor):
            continue  # one of a plugin's own kind
        if weight.is_meta or is_sharded(weight):
            continue
        amax, kept = quantizer.own_range, quantizer.descriptor.kept_axes
        if amax is None or quantizer.disabled or not quantizer.quantizing or not weight.numel():
            continue
        x, format, zero_point = weight.detach().float(), quantizer.format, quantizer.held_zero_point
        now, best = (
            (fake_quantize(x, range_, format, axis=kept, zero_point=zero_point) - x).square().sum().item()
            for range_ in (amax.detach().to(x.device), None)
        )
        if format.block_size is None:
            # A channel of one element, or of two alike, has no error of its own, and yet need not be
            # better known than to a step.
            steps = reduce_amax(x, axis=kept) / quantizer.qparams.max()
            steps = kept.spread(steps, x.shape[0]) if isinstance(kept, GroupedAxes) else steps
            best = max(best, steps.square().expand_as(x).sum().item() / 12)
        if now > _OUTGROWN * best and now > 0:
            yield name, now / best if best else math.inf


def _served(model: nn.Module, reached: set[str]) -> set[str]:
    """Quantizers of inputs for which another input's stood in, as in self-attention.

    Where two inputs are one tensor and their quantizers would do the same to it, it is quantized once.
    """
    served = set()
    for name, layer in named_layers(model).items():
        own = {
            quantizer_name(operand): type(layer).quantizer(layer, operand) for operand in type(layer).inputs
        }
        named = {".".join(filter(None, (name, key))): q for key, q in own.items() if q is not None}
        done = [quantizer for full, quantizer in named.items() if full in reached]
        served |= {full for full, q in named.items() if any(q.agrees_with(other) for other in done)}
    return served
