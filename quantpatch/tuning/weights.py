"""The weights that can be tuned: where their tensors are, and the grid that their quantizers round to."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor, nn

from quantpatch.layers.base import inner_weights, quantized_weights
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.layers.stand_ins import without_stand_in
from quantpatch.numerics.backends.scales import divisor, rescale_, spread
from quantpatch.numerics.fake_quant import fake_quantize, quantize
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.numerics.qparams import QParams
from quantpatch.numerics.ranges import own_range
from quantpatch.quantize.reasons import Reason
from quantpatch.tuning.reasons import NotQuantized, Parametrized, ReadByForward, Tied

# Scales that follow from what was rounded may be off by a unit of the last place the first time.
_TRIES = 4


@attrs.frozen(eq=False)
class Weight:
    """A weight that has a quantizer.

    Attributes:
        name: Of the layer, and of the operand in it.
        layer: The layer.
        layer_name: Its name.
        operand: The weight's name in it.
        quantizer: The weight's.
        owner: The module that has the tensor: the layer, or a part of it.
        attribute: The tensor's name there.
    """

    name: str
    layer: Any
    layer_name: str
    operand: str
    quantizer: TensorQuantizer
    owner: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """The parameter."""
        found = self.owner._parameters[self.attribute]
        assert found is not None
        return found

    def rounded(self, tensor: Tensor, amax: Tensor | None = None) -> Tensor:
        """What its quantizer makes of a tensor in the weight's place, in float32.

        Args:
            tensor: Of the weight's shape.
            amax: The range; default: the quantizer's.
        """
        return fake_quantize(tensor.float(), self.range_of(tensor) if amax is None else amax, **self._how)

    def rounded_anew(self, tensor: Tensor) -> Tensor:
        """The same with the range, or ranges, of the tensor itself."""
        return fake_quantize(tensor.float(), None, **self._how)

    def range_of(self, tensor: Tensor) -> Tensor | None:
        """The range that its quantizer has; None if it takes each tensor's own."""
        return self.quantizer.own_range

    @property
    def _how(self) -> dict[str, Any]:
        q = self.quantizer
        return {"format": q._format, "axis": q.descriptor.kept_axes, "zero_point": q.held_zero_point}

    def grid(self, tensor: Tensor, amax: Tensor | None = None) -> Grid:
        """The grid that a tensor in the weight's place is rounded to.

        Where scales follow from the tensor the largest value of each block stays what it is rounded to, and
        no other may pass it: the scales of what was rounded are then the same.
        """
        x = tensor.detach().float()
        q = self.quantizer
        amax = self.range_of(x) if amax is None else amax
        _, scale = quantize(x, amax, **self._how)
        dim = _dim(q.descriptor.kept_axes, x)
        scales = spread(scale, x, q._format, dim).expand(x.shape).contiguous()
        limits = None
        if amax is None:
            nearest = fake_quantize(x, None, **self._how)
            top, most = (self._largest(t, x) for t in (x, nearest))
            pinned = x.abs() >= top
            limits = torch.where(pinned, nearest, -most), torch.where(pinned, nearest, most)
        return Grid(q.qparams, scales, limits)

    def own_ranges(self, tensor: Tensor) -> Tensor:
        """For each element of a tensor in the weight's place the largest of those that share its range."""
        return self._largest(tensor.float(), tensor)

    def blocks(self, tensor: Tensor) -> Tensor | None:
        """For each element of such a tensor the number of its block, for formats in blocks."""
        size = self.quantizer._format.block_size
        if size is None:
            return None
        dim = _dim(self.quantizer.descriptor.kept_axes, tensor)
        numbers = torch.arange(tensor.shape[dim], device=tensor.device) // size
        return (
            numbers.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])
            .expand(tensor.shape)
            .contiguous()
        )

    def summed(self, values: Tensor) -> Tensor:
        """For each element of a tensor of the weight's shape the sum over those that share its range."""
        axis, size = self.quantizer.descriptor.kept_axes, self.quantizer._format.block_size
        if size is not None:
            dim = _dim(axis, values)
            count = -(-values.shape[dim] // size)
            shape = [count if d == dim else n for d, n in enumerate(values.shape)]
            index = torch.arange(values.shape[dim], device=values.device) // size
            sums = values.new_zeros(shape).index_add_(dim, index, values)
            return sums.index_select(dim, index)
        if isinstance(axis, GroupedAxes):
            split = axis.split(values)
            kept = {0, 2}
            sums = split.sum([d for d in range(split.dim()) if d not in kept], keepdim=True)
            return sums.expand(split.shape).flatten(0, 1)
        axes = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
        kept = {a % values.dim() for a in axes}
        return values.sum([d for d in range(values.dim()) if d not in kept], keepdim=True).expand(
            values.shape
        )

    def _largest(self, tensor: Tensor, x: Tensor) -> Tensor:
        """The range that each element of a tensor shares, for one that takes its own."""
        axis = self.quantizer.descriptor.kept_axes
        own = own_range(tensor, self.quantizer._format, axis)
        if isinstance(axis, GroupedAxes):
            own = axis.spread(own, x.shape[0])
        return spread(own, x, self.quantizer._format, _dim(axis, x)).expand(x.shape)

    def settled(self, tensor: Tensor) -> Tensor | None:
        """A tensor on the grid that its quantizer gives back as it is, next to one that nearly is.

        Returns:
            In the weight's own type; None if there is none.
        """
        kind = self.tensor.dtype
        tensor = tensor.to(kind)
        for _ in range(_TRIES):
            again = fake_quantize(tensor, self.range_of(tensor), **self._how)
            if torch.equal(again, tensor):
                return tensor
            tensor = again
        return None


@attrs.frozen(eq=False)
class Grid:
    """The values that the elements of a weight may have.

    Attributes:
        qparams: What they are rounded by, but for their scales.
        scales: Of each element.
        limits: The least and the greatest that each may be, beside those of the format; None: no others.
    """

    qparams: QParams
    scales: Tensor
    limits: tuple[Tensor, Tensor] | None = None

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest values on the grid, float32."""
        element = self.qparams.format.element
        y = rescale_(self.qparams.round_(x / divisor(self.scales)), self.scales, element)
        return y if self.limits is None else torch.minimum(torch.maximum(y, self.limits[0]), self.limits[1])

    def map(self, change: Any) -> Grid:
        """The grid of a view of the weight: ``change`` gives a tensor in that."""
        limits = None if self.limits is None else (change(self.limits[0]), change(self.limits[1]))
        return Grid(self.qparams, change(self.scales), limits)


def weights_of(model: nn.Module) -> tuple[dict[str, Weight], dict[str, Reason]]:
    """The weights of a model that can be tuned, by name, and why the others cannot."""
    found: dict[str, Weight] = {}
    skipped: dict[str, Reason] = {}
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                place = f"{prefix}.{attribute}".lstrip("."), module, attribute
                owners.setdefault(_memory(parameter), []).append(place)
    for quantizer_name, layer, operand, quantizer in quantized_weights(model):
        layer_name = quantizer_name.rpartition(".")[0]
        name = f"{layer_name}.{operand}".lstrip(".")
        tensor = without_stand_in(layer, operand)
        places = owners.get(_memory(tensor), []) if isinstance(tensor, Tensor) else []
        same = [place for place in places if place[1]._parameters[place[2]] is tensor]
        own = next((place for place in same if place[1] is layer), same[0] if same else None)
        if quantizer.disabled or not quantizer.quantizing:
            skipped[name] = NotQuantized()
        elif own is None:
            skipped[name] = Parametrized()
        elif len(places) > 1 and any(place[1] is not own[1] for place in places):
            skipped[name] = Tied(tuple(other for other, *_ in places if other != own[0]))
        else:
            found[name] = Weight(name, layer, layer_name, operand, quantizer, own[1], own[2])
    skipped.update((name, ReadByForward()) for name, _ in inner_weights(model))
    return found, skipped


def _dim(axis: Any, x: Tensor) -> int:
    """The axis that blocks run along, if the format has any."""
    return (axis if isinstance(axis, int) else -1) % x.dim()


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
