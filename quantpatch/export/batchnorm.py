"""``fold_batchnorm``: batch norm in eval mode is a factor and an addend for each channel before it.

Which batch norm follows which layer is seen in a run of the model on given inputs, or without any read from
the traced graph (torch.fx), not from the order of modules: the layer's output must go into the batch norm and
nowhere else. A model that torch.fx cannot trace as a whole is traced in parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from quantpatch.errors import ExportError
from quantpatch.export.dataflow import BATCHNORM, Dataflow, dataflow
from quantpatch.held_range import RANGE_KEY
from quantpatch.layers.base import QuantizedLayer
from quantpatch.running import demand_model

__all__ = ["FoldedBatchNorm", "fold_batchnorm"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# The axis of the output channels of each layer's weight.
_AXES: dict[type[nn.Module], int] = {
    nn.Linear: 0,
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
}


@attrs.frozen
class FoldedBatchNorm:
    """What ``fold_batchnorm`` did.

    Attributes:
        folded: The layer that each folded batch norm went into, by name.
        left: Why the others were left, by name.
    """

    folded: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{norm} -> {layer}" for norm, layer in self.folded.items()]
        lines += [f"{norm} is left: {why}" for norm, why in self.left.items()]
        return "\n".join(lines) or "no batch norm"


def fold_batchnorm(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
) -> FoldedBatchNorm:
    """Folds each batch norm into the convolution or linear layer before it, in place.

    The batch norm becomes an ``nn.Identity``. The model computes the same to the rounding of floats; a
    quantized layer then quantizes the weights that will run. Ranges of weights that are known already are
    scaled with them, so fold before or after calibration, and before quantization-aware training. A
    ``state_dict`` from before is folded as it is loaded.

    Args:
        model: Float or quantized, in eval mode.
        args: Arguments to run it on once, to see what follows what: a tensor, or a tuple. Left out, torch.fx
            has to trace the model.
        kwargs: Keyword arguments to run it on.

    Returns:
        What was folded, and what was not and why.

    Raises:
        ExportError: The model is in training mode, where batch norm depends on the batch.
    """
    demand_model(model, "fold_batchnorm")
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _NORMS)}
    training = [name for name, norm in norms.items() if norm.training]
    if training:
        raise ExportError(
            f"batch norm depends on the batch while training: write model.eval() before fold_batchnorm "
            f"(training: {', '.join(training[:5])})",
            quantizers=tuple(training),
        )
    if not norms:
        return FoldedBatchNorm({}, {})
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    pairs: dict[str, str | None] = {}
    seen: dict[str, str] = {}
    if args is None and kwargs is None:
        _find(model, "", pairs, seen)
    else:
        given = () if args is None else args if isinstance(args, tuple) else (args,)
        _find_in_run(model, dataflow(model, lambda: model(*given, **dict(kwargs or {}))), pairs, seen)
    folded: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, norm in norms.items():
        before = pairs.get(name)
        if before is None:
            left[name] = seen.get(name, "its place is not known: torch.fx cannot trace it, or it did not run")
            continue
        layer = model.get_submodule(before)
        why = _obstacle(layer, norm, uses, owners)
        if why:
            left[name] = why
            continue
        _fold(layer, norm)
        _fold_in_checkpoints(model, before, name, norm.eps)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, nn.Identity())
        folded[name] = before
    return FoldedBatchNorm(folded, left)


def _find(module: nn.Module, prefix: str, pairs: dict[str, str | None], seen: dict[str, str]) -> None:
    """The layer before each batch norm, by name, where nothing else uses the layer's output."""
    if not any(isinstance(m, _NORMS) for m in module.modules()) or isinstance(module, _NORMS):
        return
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # data-dependent code raises what it likes
        for name, child in module.named_children():
            _find(child, f"{prefix}{name}.", pairs, seen)
        return
    modules = dict(module.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], _NORMS):
            continue
        norm = prefix + str(node.target)
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            seen[norm] = "no layer comes right before it"
        elif calls[str(node.target)] > 1 or calls[str(source.target)] > 1:
            seen[norm] = f"it or {source.target} is called more than once"
        elif len(source.users) > 1:
            seen[norm] = f"the output of {prefix}{source.target} is used elsewhere, too"
        elif type(modules[str(source.target)]) not in _AXES and not any(
            isinstance(modules[str(source.target)], kind) for kind in _AXES
        ):
            seen[norm] = f"{prefix}{source.target} is a {type(modules[str(source.target)]).__name__}"
        else:
            pairs[norm] = prefix + str(source.target)


def _find_in_run(
    model: nn.Module, flow: Dataflow, pairs: dict[str, str | None], seen: dict[str, str]
) -> None:
    """The same, from what a run of the model computed."""
    modules = dict(model.named_modules())
    for operator in flow.operators:
        norm = operator.module
        if operator.name not in BATCHNORM or not isinstance(modules.get(norm), _NORMS):
            continue
        source = operator.inputs[0]
        layer = source.outputs_of[0] if source.outputs_of else None
        if layer is None:
            seen[norm] = "no layer comes right before it"
        elif flow.calls[norm] > 1 or flow.calls[layer] > 1:
            seen[norm] = f"it or {layer} is called more than once"
        elif len(source.uses) > 1 or source.is_result:
            seen[norm] = f"the output of {layer} is used elsewhere, too"
        elif not isinstance(modules[layer], tuple(_AXES)):
            seen[norm] = f"{layer} is a {type(modules[layer]).__name__}"
        else:
            pairs[norm] = layer


def _obstacle(layer: Any, norm: Any, uses: Counter[int], owners: Counter[int]) -> str | None:
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    if uses[id(layer)] > 1 or uses[id(norm)] > 1:
        return "it or the layer before it is in the model more than once"
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
    if amax is not None and not _is_per_channel(amax, layer, _axis(layer)):
        return "the weight's range is known and not per output channel: fold before calibrating"
    return None


def _axis(layer: Any) -> int:
    return next(axis for kind, axis in _AXES.items() if isinstance(layer, kind))


def _channels(layer: Any) -> int:
    axis = _axis(layer)
    return int(layer.weight.shape[axis]) * (layer.groups if axis else 1)


def _is_per_channel(amax: Tensor, layer: Any, axis: int) -> bool:
    shape = [1] * layer.weight.dim()
    shape[axis] = layer.weight.shape[axis]
    return (
        list(amax.shape) == shape and getattr(layer, "groups", 1) == 1 if axis else list(amax.shape) == shape
    )


def _fold(layer: Any, norm: Any) -> None:
    """Folds it in; scales the weight's range if that is known."""
    weight, bias, factor = _folded(
        layer, norm.eps, layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is None:
            layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
        else:
            layer.bias.copy_(bias)
        quantizer = layer.quantizer("weight") if isinstance(layer, QuantizedLayer) else None
        if quantizer is not None and quantizer.amax is not None:
            quantizer.amax.copy_(_scaled(quantizer.amax, factor))


def _scaled(amax: Tensor, factor: Tensor) -> Tensor:
    """The range of weights, one for each channel, that are multiplied by a factor."""
    return (amax.detach().double() * factor.abs().reshape(amax.shape)).float()


@torch.no_grad()
def _folded(
    layer: Any,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights times the factor, (bias - mean) * factor + shift, and the factor; in float64 and back."""
    axis = _axis(layer)
    factor = (var.double() + eps).rsqrt()
    if scale is not None:
        factor = factor * scale.double()
    moved = (-mean.double() if bias is None else bias.double() - mean.double()) * factor
    if shift is not None:
        moved = moved + shift.double()
    per_weight = factor
    shape = [-1 if d == axis else 1 for d in range(weight.dim())]
    if axis == 1 and layer.groups > 1:  # (in, out / groups, ...): the inputs of a group have its outputs
        groups = factor.reshape(layer.groups, -1)
        per_weight = groups.repeat_interleave(weight.shape[0] // layer.groups, 0)
        shape = [*per_weight.shape, *[1] * (weight.dim() - 2)]
    kind = weight.dtype
    return (weight.double() * per_weight.reshape(shape)).to(kind), moved.to(kind), factor


# --- Checkpoints from before --------------------------------------------------------------------------------


@attrs.frozen
class _FoldsCheckpoints:
    """Before a module takes a ``state_dict`` that still has the batch norm: folds it in there as well.

    So a float checkpoint loads strictly into a model whether or not batch norm was folded meanwhile.

    Attributes:
        layer: Name of the layer in the module.
        norm: Name of the batch norm that it had.
        eps: The batch norm's.
    """

    layer: str
    norm: str
    eps: float

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        layer, norm = f"{prefix}{self.layer}.", f"{prefix}{self.norm}."
        if f"{layer}weight" not in state or not {f"{norm}running_mean", f"{norm}running_var"} <= state.keys():
            return
        own_layer: Any = module.get_submodule(self.layer)
        range_key = f"{layer}weight_quantizer.{RANGE_KEY}"
        amax = state.get(range_key)
        if amax is not None and not _is_per_channel(amax, own_layer, _axis(own_layer)):
            return  # it would be that of other weights
        own = {key: state.pop(f"{norm}{key}", None) for key in _KEYS}
        weight, bias, factor = _folded(
            own_layer,
            self.eps,
            state[f"{layer}weight"],
            state.get(f"{layer}bias"),
            own["running_mean"],
            own["running_var"],
            own["weight"],
            own["bias"],
        )
        state.update({f"{layer}weight": weight, f"{layer}bias": bias})
        if amax is not None:
            state[range_key] = _scaled(amax, factor)


_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _fold_in_checkpoints(model: nn.Module, layer: str, name: str, eps: float) -> None:
    """Registers that with the innermost module that holds both."""
    within: list[str] = []
    for one, other in zip(layer.split(".")[:-1], name.split(".")[:-1], strict=False):
        if one != other:
            break
        within.append(one)
    outside = len(".".join([*within, ""]))
    hook = _FoldsCheckpoints(layer[outside:], name[outside:], eps)
    module = model.get_submodule(".".join(within))
    module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
