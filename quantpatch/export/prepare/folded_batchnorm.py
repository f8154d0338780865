"""A batch norm folded into the layer before it: the change, and the same for checkpoints from before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.range_tensor import RANGE_KEY
from quantpatch.torch_tools import nn

#: The axis of the output channels of each layer's weight.
LAYERS: dict[type[nn.Module], int] = {
    **dict.fromkeys((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), 0),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1),
}


class Folded:
    """What a batch norm has for weight and bias once it is folded: torch's function then gives what it gets.

    A subclass may do more than to normalize, before or after. So its forward goes on to run, on an object of
    its class, and whichever way it calls ``F.batch_norm`` with these, that is the identity.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            raise TypeError(f"this batch norm is folded: {func.__name__} cannot use its weight and bias")
        return args[0] if args else kwargs["input"]


def channel_axis(layer: Any) -> int:
    """The axis of the output channels of a layer's weight."""
    return next(axis for kind, axis in LAYERS.items() if isinstance(layer, kind))


def is_per_channel(amax: Tensor, layer: Any) -> bool:
    """Whether a weight's range is one for each output channel, that can be scaled with it."""
    axis = channel_axis(layer)
    shape = [1] * layer.weight.dim()
    shape[axis] = layer.weight.shape[axis]
    return list(amax.shape) == shape and (axis == 0 or layer.groups == 1)


def computes_as_torch(module: nn.Module) -> bool:
    """Whether a layer or batch norm, however it was made, computes with torch's own code alone."""
    cls = module.float_class if isinstance(module, QuantizedLayer) else type(module)
    code = (getattr(cls, name, None) for name in ("forward", "_conv_forward", "__call__"))
    own = any(f is not None and not str(f.__module__).startswith("torch.") for f in code)
    return not own and "forward" not in vars(module)


class Fold:
    """Folding one batch norm, which can be undone.

    Args:
        model: The model; not changed by this.
        layer: Name of the layer before.
        norm: Name of the batch norm.
    """

    def __init__(self, model: nn.Module, layer: str, norm: str) -> None:
        parent, _, self._own = norm.rpartition(".")
        self._parent = model.get_submodule(parent)
        found: list[Any] = [model.get_submodule(layer), model.get_submodule(norm)]
        self._layer, self._norm = found
        self._holder, inside = _innermost(model, layer, norm)
        self._in_checkpoints = _FoldsCheckpoints(layer[inside:], norm[inside:], self._norm.eps)
        self._before: Any = None

    def apply(self) -> None:
        """Folds it in; scales the weight's range if that is known."""
        layer, norm = self._layer, self._norm
        state = {key: getattr(norm, key) for key in _KEYS}
        weight, bias, factor = _folded(layer, norm.eps, layer.weight, layer.bias, state)
        amax = self._range()
        self._before = [None if x is None else x.detach().clone() for x in (layer.weight, layer.bias, amax)]
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is None:
                layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
            else:
                layer.bias.copy_(bias)
            if amax is not None:
                amax.copy_(_scaled(amax, factor))
        self._take_out_norm()
        holder: Any = self._holder
        self._handle = holder.register_load_state_dict_pre_hook(self._in_checkpoints)

    def undo(self) -> None:
        """Makes weights, range and batch norm what they were."""
        weight, bias, amax = self._before
        with torch.no_grad():
            self._layer.weight.copy_(weight)
            if bias is None:
                self._layer.bias = None
            else:
                self._layer.bias.copy_(bias)
            if amax is not None:
                self._range().copy_(amax)
        self._put_norm_back()
        self._handle.remove()
        self._before = None

    def _range(self) -> Any:
        quantizer = self._layer.quantizer("weight") if isinstance(self._layer, QuantizedLayer) else None
        return None if quantizer is None else quantizer.amax

    def _take_out_norm(self) -> None:
        norm = self._norm
        if computes_as_torch(norm) and not norm._modules:
            setattr(self._parent, self._own, nn.Identity())
            return
        self._held = {key: dict(vars(norm)[key]) for key in ("_parameters", "_buffers")}
        self._flags = {key: vars(norm)[key] for key in ("affine", "track_running_stats")}
        for key in ("weight", "bias"):
            norm._parameters.pop(key, None)
            vars(norm)[key] = Folded()
        norm._buffers.update(running_mean=None, running_var=None, num_batches_tracked=None)
        vars(norm).update(dict.fromkeys(self._flags, False))

    def _put_norm_back(self) -> None:
        norm = self._norm
        if isinstance(vars(norm).get("weight"), Folded):
            for key in ("weight", "bias"):
                del vars(norm)[key]
            for key, held in self._held.items():
                vars(norm)[key].clear()
                vars(norm)[key].update(held)
            vars(norm).update(self._flags)
        else:
            setattr(self._parent, self._own, norm)


def _scaled(amax: Tensor, factor: Tensor) -> Tensor:
    """The range of weights, one for each channel, that are multiplied by a factor."""
    return (amax.detach().double() * factor.abs().reshape(amax.shape)).float()


@torch.no_grad()
def _folded(
    layer: Any, eps: float, weight: Tensor, bias: Tensor | None, norm: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights times the factor, (bias - mean) * factor + shift, and the factor; in float64 and back."""
    axis = channel_axis(layer)
    mean, scale, shift = norm["running_mean"], norm["weight"], norm["bias"]
    factor = (norm["running_var"].double() + eps).rsqrt()
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
        if amax is not None and not is_per_channel(amax, own_layer):
            return  # it would be that of other weights
        own = {key: state.pop(f"{norm}{key}", None) for key in _KEYS}
        before = state[f"{layer}weight"], state.get(f"{layer}bias")
        weight, bias, factor = _folded(own_layer, self.eps, *before, own)
        state.update({f"{layer}weight": weight, f"{layer}bias": bias})
        if amax is not None:
            state[range_key] = _scaled(amax, factor)


_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _innermost(model: nn.Module, layer: str, norm: str) -> tuple[nn.Module, int]:
    """The innermost module that holds both, and where their names in that module begin."""
    within: list[str] = []
    for one, other in zip(layer.split(".")[:-1], norm.split(".")[:-1], strict=False):
        if one != other:
            break
        within.append(one)
    return model.get_submodule(".".join(within)), len(".".join([*within, ""]))
