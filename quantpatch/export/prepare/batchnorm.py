"""``fold_batchnorm``: batch norm in eval mode is a factor and an addend for each channel before it.

Which batch norm follows which layer is seen in a run of the model on given inputs, or without any read from
the traced graph (torch.fx), not from the order of modules: the layer's output must go into the batch norm and
nowhere else. A model that torch.fx cannot trace as a whole is traced in parts. A run also shows whether the
model computes the same with each folded, since a subclass may do more than its base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import attrs
from rich.table import Table
from torch import Tensor, fx
from torch.nn.utils import parametrize

from quantpatch.dataflow import BATCHNORM, Dataflow, Value, dataflow, traits
from quantpatch.dataflow.verified import apply_if_same, run_of
from quantpatch.errors import ExportError, listed, warn_caller
from quantpatch.export.prepare.folded_batchnorm import (
    LAYERS,
    Fold,
    Folded,
    channel_axis,
    computes_as_torch,
    is_per_channel,
)
from quantpatch.layers.base import QuantizedLayer
from quantpatch.reports.report import Report, table_of
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.forward import arguments, demand_model

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OWN = "its forward is its own: give the arguments to run the model on, so that it can be compared"


@attrs.frozen
class FoldedBatchNorm(Report):
    """What ``fold_batchnorm`` did.

    Attributes:
        folded: The layer that each folded batch norm went into, by name.
        skipped: Why the others were not, by name.
    """

    folded: dict[str, str]
    skipped: dict[str, str]

    _rows = ("folded", "skipped")

    def __rich__(self) -> Table:
        table = table_of("batch norm", "what became of it", title=f"{len(self.folded)} batch norms folded")
        for norm, layer in self.folded.items():
            table.add_row(norm, f"folded into {layer}")
        for norm, why in self.skipped.items():
            table.add_row(norm, f"left: {why}")
        return table


def fold_batchnorm(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
) -> FoldedBatchNorm:
    """Folds each batch norm into the convolution or linear layer before it, in place.

    The batch norm becomes an ``nn.Identity``; one of a subclass, such as timm's ``BatchNormAct2d``, stays and
    does what else its forward does. The model computes the same to the rounding of floats, which a run before
    and one after check, if there are arguments to run it on: what changes more than that is left, with a
    warning. A quantized layer then quantizes the weights that will run. Ranges of weights that are known
    already are scaled with them, so fold before or after calibration, and before quantization-aware training.
    A ``state_dict`` from before is folded as it is loaded.

    Args:
        model: Float or quantized, in eval mode.
        args: Arguments to run it on, to see what follows what: a tensor, or a tuple. Left out, torch.fx has
            to trace the model, and only torch's own layers and batch norms are folded.
        kwargs: Keyword arguments to run it on.

    Returns:
        What was folded, and what was not and why.

    Raises:
        ExportError: The model is in training mode, where batch norm depends on the batch.

    Warns:
        QuantPatchWarning: Something was folded, computed something else, and was put back.
    """
    demand_model(model, "fold_batchnorm")
    norms = {name: m for name, m in model.named_modules() if _is_norm(m)}
    training = [name for name, norm in norms.items() if norm.training]
    if training:
        raise ExportError(
            f"batch norm depends on the batch while training: write model.eval() before fold_batchnorm "
            f"(training: {listed(training)})",
            quantizers=tuple(training),
        )
    if not norms:
        return FoldedBatchNorm({}, {})
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    pairs: dict[str, str | None] = {}
    seen: dict[str, str] = {}
    run = None
    if args is None and kwargs is None:
        _find(model, "", pairs, seen)
    else:
        given, kwargs = arguments(() if args is None else args, kwargs)
        run = run_of(model, given, kwargs)
        _find_in_run(model, dataflow(model, run), pairs, seen)
    folded: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for name, norm in norms.items():
        before = pairs.get(name)
        if before is None:
            skipped[name] = seen.get(
                name, "its place is not known: torch.fx cannot trace it, or it did not run"
            )
            continue
        layer = model.get_submodule(before)
        why = _obstacle(layer, norm, uses, owners)
        if why:
            skipped[name] = why
        else:
            folded[name] = before
    folds = {name: Fold(model, before, name) for name, before in folded.items()}
    if run is None:
        for fold in folds.values():
            fold.apply()
        return FoldedBatchNorm(folded, skipped)
    wrong = apply_if_same(model, run, folds)
    for name, how in wrong.items():
        skipped[name] = f"{how} with it folded into {folded.pop(name)}, so that was undone"
    if wrong:
        shown = listed((f"{name}: {skipped[name]}" for name in wrong), separator="; ")
        warn_caller(f"{len(wrong)} batch norms were not folded: {shown}")
    return FoldedBatchNorm(folded, skipped)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm, and not folded yet."""
    return isinstance(module, _NORMS) and not isinstance(vars(module).get("weight"), Folded)


class _Tracer(fx.Tracer):
    """Layers and batch norms are one node each, those of subclasses too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_NORMS, *LAYERS)) or super().is_leaf_module(m, module_qualified_name)


def _find(module: nn.Module, prefix: str, pairs: dict[str, str | None], seen: dict[str, str]) -> None:
    """The layer before each batch norm, by name, where nothing else uses the layer's output."""
    if not any(map(_is_norm, module.modules())) or isinstance(module, _NORMS):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception:  # data-dependent code raises what it likes
        for name, child in module.named_children():
            _find(child, f"{prefix}{name}.", pairs, seen)
        return
    modules = {prefix + name: m for name, m in module.named_modules()}
    called = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(f"{prefix}{node.target}" for node in called)
    for node in called:
        norm = f"{prefix}{node.target}"
        if not _is_norm(modules[norm]):
            continue
        source: Any = node.args[0] if node.args else None
        is_called = isinstance(source, fx.Node) and source.op == "call_module"
        layer = f"{prefix}{source.target}" if is_called else None
        why = _misplaced(norm, layer, calls, modules, is_shared=is_called and len(source.users) > 1)
        if layer is None or why:
            seen[norm] = why
        elif not computes_as_torch(modules[norm]):
            seen[norm] = _OWN
        elif not computes_as_torch(modules[layer]):
            seen[norm] = f"of {layer}, {_OWN}"
        else:
            pairs[norm] = layer


def _misplaced(
    norm: str, layer: str | None, calls: Counter[str], modules: Mapping[str, nn.Module], *, is_shared: bool
) -> str:
    """Why a batch norm cannot be folded into the layer before it where it stands; empty if it can."""
    if layer is None:
        return "no layer comes right before it"
    if calls[norm] > 1 or calls[layer] > 1:
        return f"it or {layer} is called more than once"
    if is_shared:
        return f"the output of {layer} is used elsewhere, too"
    is_known = isinstance(modules[layer], tuple(LAYERS))
    return "" if is_known else f"{layer} is a {type(modules[layer]).__name__}"


def _find_in_run(
    model: nn.Module, flow: Dataflow, pairs: dict[str, str | None], seen: dict[str, str]
) -> None:
    """The same, from what a run of the model computed."""
    modules = dict(model.named_modules())
    for operator in flow.operators:
        norm = operator.module
        if operator.name not in BATCHNORM or norm not in modules or not _is_norm(modules[norm]):
            continue
        source = operator.inputs[0]
        layer = source.outputs_of[0] if source.outputs_of else None
        is_shared = len(source.uses) > 1 or source.is_result
        why = _misplaced(norm, layer, flow.calls, modules, is_shared=is_shared)
        if layer is None or why:
            seen[norm] = why
        elif not parametrize.is_parametrized(modules[layer]) and not _is_product_of_weight(source, layer):
            seen[norm] = f"{layer} computes with another tensor than its weight, or goes on with the product"
        else:
            pairs[norm] = layer


def _is_product_of_weight(value: Value, layer: str) -> bool:
    """Whether a value is what a convolution or matrix product with a parameter itself gives, in a module."""
    value = _before_moves(value)
    if value.maker is None or value.maker.module != layer or not value.maker.products:
        return False
    weight = value.maker.products[-1].operands[-1][1]
    return weight is not None and _before_moves(weight).is_constant


def _before_moves(value: Value) -> Value:
    """What a value was before it was quantized or moved."""
    while value.maker is not None and (value.maker.quantizer is not None or traits(value.maker.name).moves):
        value = value.maker.inputs[0]
    return value


def _obstacle(layer: Any, norm: Any, uses: Counter[int], owners: Counter[int]) -> str | None:
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    if uses[id(layer)] > 1 or uses[id(norm)] > 1:
        return "it or the layer before it is in the model more than once"
    if isinstance(norm, nn.SyncBatchNorm) and not computes_as_torch(norm):
        return "it normalizes over ranks while it trains, and its forward is its own"
    if parametrize.is_parametrized(norm):
        return "its weight is parametrized"
    if parametrize.is_parametrized(layer) or not isinstance(layer.weight, nn.Parameter):
        return "the weight before it is parametrized"
    if owners[id(layer.weight)] > 1 or (layer.bias is not None and owners[id(layer.bias)] > 1):
        return "the weight before it is tied"
    if layer._forward_hooks or norm._forward_hooks or norm._forward_pre_hooks:
        return "hooks would see other tensors"
    if layer.weight.is_meta or norm.running_mean.is_meta:
        return "it has no values yet (meta device)"
    if norm.running_var.numel() != _channels(layer):
        return f"it has {norm.running_var.numel()} channels, and the layer before it {_channels(layer)}"
    if not isinstance(layer, QuantizedLayer):
        return None
    output = layer.quantizer("output")
    if output is not None and output.is_active:
        return "the output before it is quantized"
    quantizer = layer.quantizer("weight")
    amax = None if quantizer is None else quantizer.amax
    if amax is not None and not is_per_channel(amax, layer):
        return "the weight's range is known and not per output channel: fold before calibrating"
    return None


def _channels(layer: Any) -> int:
    axis = channel_axis(layer)
    return int(layer.weight.shape[axis]) * (layer.groups if axis else 1)
