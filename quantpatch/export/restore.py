"""What loading a checkpoint will do to a model: found out and checked in full before anything is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantpatch.export import packing
from quantpatch.export.structure import StructurePlan
from quantpatch.quantizer import named_quantizers, outside_of

__all__ = ["Plan"]

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
        """Changes the model."""
        self.restructure()
        self._fill()
        self.set_ranges()

    def _plan_state(self) -> None:
        """The float part: every key there, of the right shape."""
        self._unpack()
        tensors = self._tensors
        for alias, source in self._description["tied"].items():
            if source in tensors:
                tensors[alias] = tensors[source]
        wanted = outside_of(named_quantizers(self.model, every_name=True), self.model.state_dict())
        given = outside_of({*self._quantizers, *self._aliases}, tensors)
        missing = [key for key in wanted if key not in given]
        unexpected = [key for key in given if key not in wanted]
        if missing:
            self.problems.append(f"the file has no {', '.join(missing[:8])}{' …' * (len(missing) > 8)}")
        if unexpected:
            self.problems.append(
                f"the model has no {', '.join(unexpected[:8])}{' …' * (len(unexpected) > 8)}"
            )
        for keys, advice in ((missing, _FOLD_FIRST), (unexpected, _FOLD_AFTERWARDS)):
            norms = [key.removesuffix(_STATISTICS) for key in keys if key.endswith(_STATISTICS)]
            if norms:
                self.problems.append(f"{', '.join(norms[:8])}{' …' * (len(norms) > 8)}: {advice}")
        for key, value in wanted.items():
            if key in given and given[key].shape != value.shape:
                self.problems.append(
                    f"{key}: the file has the shape {tuple(given[key].shape)}, the model {tuple(value.shape)}"
                )
        self._state = given

    def _unpack(self) -> None:
        """Puts weights in the place of their codes."""
        for key, how in self._description["packed"].items():
            parent, _, own = key.rpartition(".")
            quantizer = self._quantizers.get(f"{parent}.{own}_quantizer".lstrip("."))
            if quantizer is None:  # a weight whose quantizer is its parent's: out_proj of attention
                grand, _, child = parent.rpartition(".")
                quantizer = self._quantizers.get(f"{grand}.{child}_{own}_quantizer".lstrip("."))
            codes = self._tensors.pop(f"{key}.codes", None)
            if quantizer is None or codes is None:
                self.problems.append(f"{key}: its {'codes are' if quantizer else 'quantizer is'} missing")
                continue
            amax = quantizer.amax if how["own"] else self._tensors.pop(f"{key}.range", None)
            element = packing.integer_element(quantizer.format)
            shape = tuple(how["shape"])
            per_byte = 2 if element is not None and element.bits <= 4 else 1
            if amax is None or element is None or codes.numel() != math.ceil(math.prod(shape) / per_byte):
                self.problems.append(f"{key}: its codes do not fit its shape {shape} or its quantizer")
                continue
            self._tensors[key] = packing.unpacked_weight(
                packing.unpack(codes, shape, element),
                quantizer.format,
                quantizer.descriptor.kept_axes,
                amax,
                getattr(torch, how["dtype"]),
                own_range=how["own"],
            )

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
