"""What loading a checkpoint will do to a model: found out and checked in full before anything is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantpatch.errors import listed, shown
from quantpatch.export.checkpoint import packing
from quantpatch.export.checkpoint.structure import StructurePlan
from quantpatch.layers.base import weight_owner
from quantpatch.layers.input_factor import INPUT_FACTOR, named_input_factors
from quantpatch.layers.late_ranges import warning_of_late_ranges
from quantpatch.layers.operations import quantizer_name
from quantpatch.layers.quantizer import named_quantizers, outside_of
from quantpatch.numerics.ranges import range_shape

_CHANGED = (
    *("_modules", "_parameters", "_buffers", "_forward_hooks"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)

# A tensor of every batch norm that can be folded.
_STATISTICS = ".running_var"
_FOLD_FIRST = (
    "if batch norm was folded before the model was saved, write qp.fold_batchnorm(model) before loading"
)
_FOLD_AFTERWARDS = "if batch norm of the model was folded, load into one where it was not, and fold that"


class Plan(StructurePlan):
    """Loading a file's content into a model: its layers and quantizers, and its weights.

    Args:
        model: The model; not changed by this.
        description: The file's metadata.
        tensors: The file's tensors.
    """

    def __init__(self, model: nn.Module, description: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        self._state: dict[str, Tensor] = {}
        super().__init__(model, description, tensors)

    def _plan(self) -> None:
        super()._plan()
        if not self.problems:
            self._plan_state()

    def carry_out(self) -> None:
        """Changes the model.

        All that a file can be the cause of was found before. If something else goes wrong (memory, a hook of
        the model's own), the layers are what they were; weights that were copied are the file's.
        """
        before = [_Before(module) for module in self.model.modules()]
        try:
            with warning_of_late_ranges([self.model]):
                self.restructure()
                self._fill()
                self.set_ranges()
        except BaseException:
            for module in before:
                module.restore()
            raise

    def _plan_state(self) -> None:
        """The float part: every key there, of the right shape."""
        tensors = self._tensors
        factors = {f"{name}.{INPUT_FACTOR}".lstrip(".") for name in named_input_factors(self.model)}
        held = {*named_quantizers(self.model, every_name=True), *factors}
        wanted = outside_of(held, self.model.state_dict())
        self._unpack(wanted)
        for alias, source in self._description.tied.items():
            if source in tensors:
                tensors[alias] = tensors[source]
        given = outside_of({*self._quantizers, *self._aliases}, tensors)
        missing = [key for key in wanted if key not in given]
        unexpected = [key for key in given if key not in wanted]
        if missing:
            self.problems.append(f"the file has no {listed(map(shown, missing))}")
        if unexpected:
            self.problems.append(f"the model has no {listed(map(shown, unexpected))}")
        for keys, advice in ((missing, _FOLD_FIRST), (unexpected, _FOLD_AFTERWARDS)):
            norms = [key.removesuffix(_STATISTICS) for key in keys if key.endswith(_STATISTICS)]
            if norms:
                self.problems.append(f"{listed(map(shown, norms))}: {advice}")
        for key, value in wanted.items():
            if key in given and given[key].shape != value.shape:
                self._refuse(
                    key, f"the file has the shape {tuple(given[key].shape)}, the model {tuple(value.shape)}"
                )
            elif key in given and _kind(given[key]) != _kind(value):
                self._refuse(key, f"the file has {given[key].dtype}, the model {value.dtype}")
        self._state = given

    def _unpack(self, wanted: Mapping[str, Tensor]) -> None:
        """Puts weights in the place of their codes.

        Args:
            wanted: The tensors that the model has.
        """
        for key, how in self._description.packed.items():
            name = self._quantizer_of(key)
            quantizer = self._quantizers[name].made if name in self._quantizers else None
            codes, own = self._tensors.pop(f"{key}.codes", None), self._tensors.pop(f"{key}.range", None)
            if quantizer is None or codes is None:
                self._refuse(key, f"its {'codes are' if quantizer else 'quantizer is'} missing")
                continue
            amax = self._quantizers[name].amax if how.own else own
            element = packing.integer_element(quantizer.format)
            per_byte = 2 if element is not None and element.bits <= 4 else 1
            axis = quantizer.descriptor.kept_axes
            if (
                amax is None
                or element is None
                or key not in wanted
                or how.shape != tuple(wanted[key].shape)
                or codes.dtype != torch.uint8
                or codes.shape != (math.ceil(math.prod(how.shape) / per_byte),)
                or (not how.own and amax.shape != range_shape(how.shape, axis, quantizer.format.block_size))
                or (not how.own and self._range_problem(name, quantizer, amax))
            ):
                self._refuse(key, f"its codes do not fit its shape {how.shape} or its quantizer")
                continue
            self._tensors[key] = packing.unpacked_weight(
                packing.unpack(codes, how.shape, element),
                quantizer.format,
                axis,
                amax,
                how.torch_dtype,
                own_range=how.own,
                zero_point=self._quantizers[name].zero_point,
            )

    def _quantizer_of(self, key: str) -> str:
        """The name of the quantizer of a weight."""
        layer, operand = weight_owner(lambda n: self._converted.get(n, type(self._modules.get(n))), key)
        return f"{layer}.{quantizer_name(operand)}".lstrip(".")

    def _fill(self) -> None:
        """Copies the weights in; a model with tensors on the meta device gets the file's own."""
        own = outside_of(named_quantizers(self.model, every_name=True), self.model.state_dict())
        assign = any(value.is_meta for value in own.values())
        ties: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    ties.setdefault(id(parameter), []).append((module, key))
        state = self._state
        if assign:
            state = {key: value.to(own[key].dtype) for key, value in state.items()}
        self.model.load_state_dict(state, strict=True, assign=assign)
        for places in ties.values():
            for module, key in places[1:]:
                module._parameters[key] = places[0][0]._parameters[places[0][1]]


class _Before:
    """What a module is made of, to be undone what was done to it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._class = type(module)
        members = vars(module)
        self._members = {**members, **{key: members[key].copy() for key in _CHANGED if key in members}}

    def restore(self) -> None:
        object.__setattr__(self._module, "__class__", self._class)
        members = vars(self._module)
        for key in _CHANGED:  # in place: handles of hooks hold these
            if key in members:
                members[key].clear()
                members[key].update(self._members[key])
        members.update({key: value for key, value in self._members.items() if key not in _CHANGED})


def _kind(tensor: Tensor) -> str:
    """What a tensor's numbers are: one kind is not copied to another."""
    return "complex" if tensor.is_complex() else "real" if tensor.is_floating_point() else "whole"
