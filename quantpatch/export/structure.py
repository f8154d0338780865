"""What a description of a quantized model will do to a model: found out and checked before anything is done.

The layers and quantizers are one concept, the weights another: who loads weights in a way of their own, as
transformers does, restores the former alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from quantpatch.classes import change_class, dotted, own_class
from quantpatch.descriptor import QuantDescriptor
from quantpatch.errors import LayerError, QuantPatchError
from quantpatch.export.description import (
    descriptor_of,
    find_class,
    missing_plugins,
)
from quantpatch.fast_paths import allow_fast_paths
from quantpatch.formats import NumberFormat
from quantpatch.held_range import RANGE_KEY
from quantpatch.layers.base import QuantizedLayer, quantizer_name
from quantpatch.layers.placed import can_hold, placed_in, quantize_output_of, take_out
from quantpatch.layers.subclass import combine, replacement_of
from quantpatch.quantizer import TensorQuantizer
from quantpatch.registry import registry

__all__ = ["StructurePlan", "device_near"]


@attrs.frozen
class _Quantizer:
    """A quantizer as the file has it."""

    descriptor: QuantDescriptor
    format: NumberFormat
    disabled: bool
    quantizing: bool
    zero_point_is_found: bool
    amax: Tensor | None


class StructurePlan:
    """Making a model's layers and quantizers what a description says, with their ranges.

    Args:
        model: The model; not changed by this.
        description: How the model was quantized, as ``quantpatch.export.description`` writes it.
        tensors: The ranges among them, by their names in the ``state_dict``.

    Attributes:
        problems: Why it cannot be done; empty if it can.
    """

    def __init__(self, model: nn.Module, description: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        self.model = model
        self.problems: list[str] = []
        self._modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
        self._converted: dict[str, type[Any]] = {}
        self._quantizers: dict[str, _Quantizer] = {}
        self._aliases: dict[str, str] = {}
        self._description = description
        self._tensors = dict(tensors)
        try:
            self._plan()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.problems.append(f"its description is damaged ({type(error).__name__}: {error})")

    def _plan(self) -> None:
        gone = missing_plugins(self._description["plugins"])
        self._plan_layers()
        self._plan_quantizers()
        self._plan_aliases()
        if self.problems and gone:
            # What is missing has its reason; a plugin that nothing of this model needs may be gone.
            self.problems[:0] = [f"the plugin {plugin}" for plugin in gone]

    # --- looking -------------------------------------------------------------------------------

    def _plan_layers(self) -> None:
        layers = self._description["layers"]
        for name, saved in layers.items():
            layer = self._modules.get(name)
            shown = name or "the model"
            if layer is None:
                self.problems.append(f"{shown} ({saved['class']}): the model has no such layer")
                continue
            now = own_class(layer)
            float_now = layer.float_class if isinstance(layer, QuantizedLayer) else now
            if (dotted(replacement_of(now)), dotted(float_now)) == (saved["class"], saved["float"]):
                continue
            if dotted(float_now) != saved["float"]:
                self.problems.append(
                    f"{shown}: the file has a {saved['float']}, the model a {dotted(float_now)}"
                )
                continue
            cls = find_class(saved["class"])
            if cls is None:
                self.problems.append(
                    f"{shown}: its class {saved['class']} is offered by no plugin and has not been imported. "
                    f"Import {saved['class'].rpartition('.')[0]} first, or install the plugin that brings it"
                )
            elif cls.float_class is float_now:
                self._converted[name] = cls
            elif issubclass(float_now, cls.float_class):
                try:
                    self._converted[name] = combine(cls, float_now)
                except LayerError as error:
                    self.problems.append(f"{shown}: {error}")
            else:
                self.problems.append(f"{shown}: {saved['class']} stands for {dotted(cls.float_class)} here")
        for name, module in self._modules.items():
            layer = module
            if isinstance(layer, QuantizedLayer) and name not in layers and not self._known_elsewhere(layer):
                self._converted[name] = layer.float_class

    def _known_elsewhere(self, layer: Any) -> bool:
        """Whether a layer that is shared is in the file under another of its names."""
        layers = self._description["layers"]
        return any(module is layer and name in layers for name, module in self._modules.items())

    def _plan_quantizers(self) -> None:
        layers = self._description["layers"]
        for name, saved in self._description["quantizers"].items():
            parent = name.rpartition(".")[0]
            if parent not in layers and not self._has_place(name):
                self.problems.append(
                    f"{name}: the model has no such quantizer, nor a layer to give it to; do to it first "
                    f"what gave one to the saved model"
                )
                continue
            try:
                descriptor = descriptor_of(saved["descriptor"])
            except QuantPatchError as error:
                self.problems.append(f"{name}: {error}")
                continue
            amax = self._tensors.pop(f"{name}.{RANGE_KEY}", None)
            if saved["known"] and amax is None and f"{name}.{RANGE_KEY}" not in self._description["tied"]:
                self.problems.append(f"{name}: its range is missing")
                continue
            if amax is None and saved["known"]:
                source = self._description["tied"][f"{name}.{RANGE_KEY}"]
                amax = self._tensors.get(source)
                first = self._quantizers.get(source.removesuffix(f".{RANGE_KEY}"))
                amax = first.amax if amax is None and first is not None else amax
            if amax is not None:
                amax = amax.abs() if descriptor.learn_amax else amax
                problem = self._range_problem(name, descriptor, amax)
                if problem:
                    self.problems.append(f"{name}: {problem}")
                    continue
            format = registry.format(descriptor)
            self._quantizers[name] = _Quantizer(
                descriptor,
                format,
                bool(saved["disabled"]),
                bool(saved["quantizing"]),
                bool(saved.get("zero_point_is_found")),
                amax,
            )

    def _plan_aliases(self) -> None:
        """Further names of quantizers that several layers share."""
        for alias, first in self._description.get("shared", {}).items():
            if first not in self._quantizers or alias.rpartition(".")[0] not in self._modules:
                self.problems.append(f"{alias}: in the file it is {first}; the model has no place for it")
            else:
                self._aliases[alias] = first
                self._tensors.pop(f"{alias}.{RANGE_KEY}", None)

    def _has_place(self, name: str) -> bool:
        """Whether a quantizer that is no layer's has a place: it is there, or at the output of a module."""
        parent, _, own = name.rpartition(".")
        module = self._modules.get(parent)
        found = isinstance(self._modules.get(name), TensorQuantizer)
        return found or (own == quantizer_name("output") and module is not None and can_hold(module))

    def _range_problem(self, name: str, descriptor: QuantDescriptor, amax: Tensor) -> str | None:
        if amax.dtype != torch.float32:
            return f"its range is {amax.dtype}, expected torch.float32"
        if amax.numel() and not bool(torch.isfinite(amax).all()):
            return "its range holds NaN or infinity"
        if amax.numel() and bool((amax < 0).any()):
            return f"its range is negative ({amax.min().item():.4g})"
        parent, _, own = name.rpartition(".")
        weight = getattr(self._modules.get(parent), own.removesuffix("_quantizer"), None)
        format = registry.format(descriptor)
        if descriptor.kept_axes is None and format.block_size is None:
            return None if amax.numel() == 1 else f"its range has the shape {tuple(amax.shape)}, expected ()"
        if not isinstance(weight, Tensor) or amax.dim() == 0 or not own.endswith("_quantizer"):
            return None  # an activation: its shape shows when it comes
        kept = descriptor.kept_axes if descriptor.kept_axes is not None else -1
        axes = {a % weight.dim() for a in (kept if isinstance(kept, tuple) else (kept,))}
        if format.block_size is not None:
            dim = next(iter(axes))
            wanted = list(weight.shape)
            wanted[dim] = math.ceil(wanted[dim] / format.block_size)
        else:
            wanted = [n if d in axes else 1 for d, n in enumerate(weight.shape)]
        if amax.dim() == len(wanted) and all(a in (1, w) for a, w in zip(amax.shape, wanted, strict=True)):
            return None
        return f"its range has the shape {tuple(amax.shape)}, expected {tuple(wanted)}"

    # --- doing ---------------------------------------------------------------------------------

    def restructure(self) -> None:
        """Gives the model its layers and quantizers, whose ranges are still what they were."""
        for name, cls in self._converted.items():
            layer = self._modules[name]
            if isinstance(layer, QuantizedLayer):
                for own in layer.quantizers():
                    del self._modules[name]._modules[own]
            change_class(layer, cls)
            allow_fast_paths(layer)
        for name, module in placed_in(self.model).items():
            if f"{name}.{quantizer_name('output')}" not in (*self._quantizers, *self._aliases):
                take_out(module)
        described = self._description["layers"]
        for name in described:
            now: Any = self._modules[name]
            prefix = f"{name}." if name else ""
            for own in list(now.quantizers()):
                if prefix + own not in self._quantizers and not self._shared(now._modules[own]):
                    del now._modules[own]
        names: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        for name, saved in self._quantizers.items():
            self._put(name, saved, names)
        for alias, first in self._aliases.items():
            self._place(alias, self.model.get_submodule(first))
        for name in described:
            layer = self._modules[name]
            if isinstance(layer, QuantizedLayer):
                layer.guard_fast_paths()

    def set_ranges(self) -> None:
        """Gives the quantizers their ranges, each on the device of its layer."""
        for name, saved in self._quantizers.items():
            quantizer = self.model.get_submodule(name)
            assert isinstance(quantizer, TensorQuantizer)
            self._set_range(quantizer, saved.amax, device_near(self._modules[name.rpartition(".")[0]]))

    def _shared(self, quantizer: nn.Module) -> bool:
        """Whether the file has a quantizer under another of its names."""
        return any(m is quantizer and name in self._quantizers for name, m in self._modules.items())

    def _put(self, name: str, saved: _Quantizer, names: dict[int, list[str]]) -> None:
        """Makes a quantizer what the file says.

        Args:
            name: One of its names.
            saved: The quantizer in the file.
            names: The names of every module that is still in the model, by its identity.
        """
        parent = name.rpartition(".")[0]
        quantizer = self._modules.get(name)
        if not isinstance(quantizer, TensorQuantizer) or quantizer.descriptor != saved.descriptor:
            old = quantizer
            quantizer = TensorQuantizer(saved.descriptor)
            # A quantizer that several layers share stays shared.
            for place in names.pop(id(old), [name]):
                self._place(place, quantizer)
            quantizer.train(self._modules[parent].training)
        quantizer.disabled, quantizer.quantizing = saved.disabled, saved.quantizing
        quantizer.zero_point_is_found = saved.zero_point_is_found
        quantizer.calibrating, quantizer.calibrator = False, None

    def _place(self, name: str, quantizer: Any) -> None:
        parent, _, own = name.rpartition(".")
        module = self._modules[parent]
        if own == quantizer_name("output") and can_hold(module):
            quantize_output_of(module, quantizer)
        else:
            module._modules[own] = quantizer

    @staticmethod
    def _set_range(quantizer: TensorQuantizer, amax: Tensor | None, device: torch.device) -> None:
        known = quantizer.amax
        if amax is None or (known is not None and (known.shape != amax.shape or known.is_meta)):
            quantizer.amax = None
        if amax is not None:
            quantizer.amax = amax.to(device)


def device_near(layer: nn.Module) -> torch.device:
    """The device of a quantizer's layer; a range must not wait on another for its optimizer."""
    for tensor in (*layer.parameters(recurse=False), *layer.parameters()):
        if not tensor.is_meta:
            return torch.device(tensor.device)
    return torch.device("cpu")
