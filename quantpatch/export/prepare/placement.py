"""``prepare``: batch norm folded, and quantizers where a runtime's integer kernels want them.

What is to be quantized ``placement_rules`` says. In float the model has to compute afterwards what it did
before, which is checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
from rich.table import Table
from torch import Tensor

from quantpatch.dataflow import Dataflow, Value, dataflow, traits
from quantpatch.dataflow.verified import apply_if_same, run_of
from quantpatch.errors import warn_caller
from quantpatch.export.prepare.batchnorm import FoldedBatchNorm, fold_batchnorm
from quantpatch.export.prepare.placement_rules import Rules
from quantpatch.layers.base import named_layers
from quantpatch.layers.late_ranges import warning_of_late_ranges
from quantpatch.layers.operations import quantizer_name
from quantpatch.layers.placed import quantize_output_of, take_out
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.plugins.registry import registry
from quantpatch.plugins.runtime import Runtime
from quantpatch.quantize.call_ranges import CallRanges
from quantpatch.reports.report import Report, by_reason, outcome_table
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.forward import arguments, demand_model, explaining, uncompiled


@attrs.frozen
class Preparation(Report):
    """What ``prepare`` did.

    Attributes:
        runtime: What for.
        batchnorm: Which batch norms were folded, and which were not and why.
        placed: Names of the new quantizers.
        shared: Quantizers that gave way to a new one, which they share now: its name by theirs.
        unsigned: Quantizers that are unsigned now, since what they take is never negative.
        skipped: What stays float between integer kernels, by the module that runs it, and why.
        turned: Quantizers of weights whose scales are on another axis now, which the runtime takes.
    """

    runtime: str
    batchnorm: FoldedBatchNorm
    placed: tuple[str, ...]
    shared: Mapping[str, str]
    unsigned: tuple[str, ...]
    skipped: Mapping[str, str]
    turned: tuple[str, ...] = ()

    _rows = ("batchnorm", "placed", "shared", "unsigned", "turned", "skipped")

    def __rich__(self) -> Table:
        names = {name or "what the model itself computes": why for name, why in self.skipped.items()}
        groups: dict[str, Sequence[str]] = {
            "batch norm folded": tuple(self.batchnorm.folded),
            "quantizer placed": self.placed,
            "shares a quantizer": tuple(self.shared),
            "unsigned": self.unsigned,
            "scales on axis 0 now": self.turned,
            **{f"not folded: {why}": names for why, names in by_reason(self.batchnorm.skipped).items()},
            **{f"left: {why}": names for why, names in by_reason(names).items()},
        }
        return outcome_table(f"prepared for {self.runtime}", groups)


def prepare(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    runtime: str = "onnxruntime",
    outputs: bool = True,
) -> Preparation:
    """Places the quantizers that a runtime's integer kernels want, and folds batch norm where it wants that.

    Call it before calibration or quantization-aware training, which give the new quantizers their ranges.
    The model then computes with them in PyTorch as well, so the exported file still gives the same integers.
    Calling it again changes nothing. In float it computes what it did before: that is checked by a run before
    and one after, and what changes it is undone, with a warning.

    Args:
        model: A quantized model in eval mode; changed in place.
        args: Arguments to run it on once, to see what it computes: a tensor, or a tuple.
        kwargs: Keyword arguments to run it on.
        runtime: What will run the exported file. ``"onnxruntime"``: batch norm is folded; convolutions,
            residual additions and concatenations get quantized results, what is never negative becomes
            unsigned, and a small convolution of images is left float, its quantizers switched off, if its
            activation has no integer kernel. ``"tensorrt"``: of an addition to a convolution the other
            operand is quantized, and weights of transposed convolutions get their scales on axis 0.
            ``"inductor"``: PyTorch's compiler, which ``lower`` uses; batch norm is folded, of an addition to
            a convolution the other operand is quantized and what the convolution gives is not, and layers
            and products of activations, which have no integer kernel there, are left float, their quantizers
            switched off. ``"openvino"``: as there, but that products and results of convolutions keep their
            quantizers. Or the name of a plugin's.
        outputs: Whether, for ``"onnxruntime"``, a result of a convolution is quantized also where the model
            returns it. Without that ONNX Runtime runs this convolution on floats, slower than in a float
            file; ``left`` names it then.

    Returns:
        What was done, and what was left and why.

    Raises:
        ExportError: A batch norm is in training mode.
        ArgumentTypeError: The first argument is not a model.
        InputError: The inputs are on another device.
        UnknownNameError: There is no such runtime.

    Warns:
        QuantPatchWarning: Something changed what the model computes in float, and was undone.
    """
    demand_model(model, "prepare")
    target = registry.runtime(runtime)
    model = uncompiled(model)
    args, kwargs = arguments(args, kwargs)
    with explaining(model, (args, kwargs)):
        folded = FoldedBatchNorm({}, {})
        if target.fold_batchnorm:
            folded = fold_batchnorm(model, args, kwargs=kwargs)
        run = run_of(model, args, kwargs)
        left = dict(_without_kernels(model, target))
        with CallRanges(model) as calls:
            flow = dataflow(model, run)
        rules = Rules(model, flow, outputs=outputs)
        skipped = rules.skipped
        skipped |= left
        rules.plan(target.placement)
        unsigned = tuple(_never_negative(model, flow)) if target.unsigned else ()
        turned = () if target.transposed_axis is None else tuple(_turn_transposed(model, skipped))
        for quantizer in rules.off:
            quantizer.disable()
        changes = _changes(model, rules, allow_unsigned=target.unsigned)
        for place, how in apply_if_same(model, run, changes).items():
            del changes[place]
            skipped[place] = f"{how} with its output quantized, so that was undone"
            warn_caller(f"{place} is left: {skipped[place]}")
    calls.warn()
    placed = tuple(f"{place}.{quantizer_name('output')}" for place in changes)
    shared = {
        name: new for new, change in zip(placed, changes.values(), strict=True) for name in change.shared
    }
    every = named_quantizers(model, every_name=True)
    unsigned = tuple(name for name in unsigned if name not in shared and not every[name].disabled)
    with warning_of_late_ranges([model]):
        for name in unsigned:
            every[name].use_zero_point(0)
    unsigned += tuple(name for name in placed if getattr(every[name].format, "unsigned", False))
    return Preparation(runtime, folded, placed, shared, unsigned, skipped, turned)


def _without_kernels(model: nn.Module, runtime: Runtime) -> Iterator[tuple[str, str]]:
    """Switches off the quantizers of layers that a runtime has no integer kernel for: names, and why."""
    layers = named_layers(model)
    owners = Counter(
        quantizer for layer in layers.values() for quantizer in type(layer).quantizers(layer).values()
    )
    for name, layer in layers.items():
        own = [quantizer for quantizer in type(layer).quantizers(layer).values() if not quantizer.disabled]
        why = runtime.call("why_float", layer)
        if why is None or not own or any(owners[quantizer] > 1 for quantizer in own):
            continue
        for quantizer in own:
            quantizer.disable()
        yield name, f"its quantizers are switched off, since {why}; enable() them to quantize it anyway"


def _never_negative(model: nn.Module, flow: Dataflow) -> Iterator[str]:
    """Quantizers of activations that may be unsigned: nothing that they take is ever negative."""
    taken: dict[TensorQuantizer, list[Value]] = {}
    for operator in flow.operators:
        if operator.quantizer is not None:
            taken.setdefault(operator.quantizer, []).append(operator.inputs[0])
    for name, quantizer in named_quantizers(model).items():
        values = taken.get(quantizer, [])
        if values and quantizer.is_symmetric and all(map(is_never_negative, values)):
            yield name


def _turn_transposed(model: nn.Module, skipped: dict[str, str]) -> Iterator[str]:
    """Weights of transposed convolutions get scales on axis 0, where torch has their inputs.

    Args:
        model: The model.
        skipped: Takes a note on those whose range was known, which is that of another axis.
    """
    for name, layer in named_layers(model).items():
        if not getattr(layer, "transposed", False):
            continue
        old = type(layer).quantizer(layer, "weight")
        # A format in blocks has its own rules, which the export knows.
        if old is None or old.descriptor.kept_axes in (None, 0) or old.format.block_size is not None:
            continue
        new = TensorQuantizer(attrs.evolve(old.descriptor, axis=0))
        new.disabled, new.quantizing = old.disabled, old.quantizing
        new.train(layer.training)
        full = f"{name}.{quantizer_name('weight')}".lstrip(".")
        if old.amax is not None:
            skipped[full] = "its range was known for another axis: calibrate again, with existing='keep'"
        for place in _names_of_each(model)[old]:
            _put(model, place, new)
        yield full


class _OutputQuantizer:
    """A quantizer at the output of a module, in the place of those which take that output."""

    def __init__(self, model: nn.Module, place: str, new: TensorQuantizer, takers: Mapping[str, Any]) -> None:
        self.shared = takers
        self._model, self._module, self._new = model, model.get_submodule(place), new

    def apply(self) -> None:
        """Places it."""
        quantize_output_of(self._module, self._new)
        for name in self.shared:
            _put(self._model, name, self._new)

    def undo(self) -> None:
        """Takes it out, and puts back the others."""
        for name, old in self.shared.items():
            _put(self._model, name, old)
        take_out(self._module)


def _changes(model: nn.Module, rules: Rules, *, allow_unsigned: bool) -> dict[str, _OutputQuantizer]:
    """What the rules planned, by the place of each new quantizer."""
    places = _names_of_each(model)
    changes: dict[str, _OutputQuantizer] = {}
    for value, (place, descriptor) in rules.plans.items():
        if allow_unsigned and is_never_negative(value):
            descriptor = attrs.evolve(descriptor, unsigned=True)
        new = TensorQuantizer(descriptor)
        gone = [old for old in rules.takers(value) if _may_share(old, new)]
        changes[place] = _OutputQuantizer(
            model, place, new, {name: old for old in gone for name in places[old]}
        )
    return changes


def _names_of_each(model: nn.Module) -> dict[TensorQuantizer, list[str]]:
    """Every name of each quantizer."""
    places: dict[TensorQuantizer, list[str]] = {}
    for name, quantizer in named_quantizers(model, every_name=True).items():
        places.setdefault(quantizer, []).append(name)
    return places


def _put(model: nn.Module, name: str, quantizer: TensorQuantizer) -> None:
    parent, _, own = name.rpartition(".")
    model.get_submodule(parent)._modules[own] = quantizer


def _may_share(old: TensorQuantizer, new: TensorQuantizer) -> bool:
    """Whether one quantizer can stand for another that is not calibrated yet; its sign may differ."""
    if old.amax is not None or old.disabled or not old.quantizing or old.calibrating:
        return False
    if old.zero_point:
        return False
    return bool(attrs.evolve(old.descriptor, unsigned=new.descriptor.unsigned) == new.descriptor)


# Those that compute with the numbers among their arguments.
_ARITHMETIC = frozenset({"aten::add", "aten::mul"})


def is_never_negative(value: Value) -> bool:
    """Whether an operator's result cannot be negative, whatever goes in: its integers need no sign.

    Unsigned ones have twice the resolution in as many bits, and cost no ReLU before. ``fit_zero_points``
    finds what the data shows.
    """
    operator = value.maker
    if operator is None:
        return False
    known, plain = traits(operator.name), operator.name.removesuffix("_")
    if known.never_negative:
        return True
    if plain in ("aten::hardtanh", "aten::clamp", "aten::clamp_min"):
        # ReLU6 is hardtanh(x, 0, 6); left out, hardtanh's bound is -1 and clamp has none.
        lowest = operator.args[1] if len(operator.args) > 1 else None
        return isinstance(lowest, (int, float)) and lowest >= 0
    if operator.quantizer is None and not known.keeps_sign:
        return False
    numbers = (*operator.args, *operator.kwargs.values()) if plain in _ARITHMETIC else ()
    if any(isinstance(x, (int, float)) and x < 0 for x in numbers):
        return False
    return all(map(is_never_negative, operator.inputs))
