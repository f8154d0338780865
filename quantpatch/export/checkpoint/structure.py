"""What a description of a quantized model will do to a model: found out and checked before anything is done.

The layers and quantizers are one concept, the weights another: who loads weights in a way of their own, as
transformers does, restores the former alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from quantpatch.errors import CheckpointError, LayerError, QuantPatchError, shown
from quantpatch.export.checkpoint.description import descriptor_of, missing_plugins
from quantpatch.export.checkpoint.known_classes import KnownClasses
from quantpatch.export.checkpoint.saved import Description, Layer, read
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.input_factor import (
    FACTOR_KEY,
    drop_input_factor,
    multiply_input_of,
    named_input_factors,
)
from quantpatch.layers.operations import quantizer_name
from quantpatch.layers.placed import can_hold, placed_in, quantize_output_of, take_out
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.layers.range_tensor import RANGE_KEY
from quantpatch.layers.subclass import combine, replacement_of
from quantpatch.layers.with_operations import find_operations
from quantpatch.layers.zero_point_state import ZERO_POINT_KEY
from quantpatch.numerics.formats import Integer
from quantpatch.numerics.qparams import check_zero_point, read_zero_point
from quantpatch.numerics.ranges import range_shape
from quantpatch.recipes.descriptor import EVERY_OPERAND
from quantpatch.torch_tools.class_swap import change_class, dotted, own_class
from quantpatch.torch_tools.fast_paths import allow_fast_paths

_OUTPUT = quantizer_name("output")


@attrs.frozen
class _Quantizer:
    """A quantizer as the file has it: what is made of its descriptor, and its range if it is known."""

    made: TensorQuantizer
    disabled: bool
    quantizing: bool
    zero_point: int | None
    amax: Tensor | None


class StructurePlan:
    """Making a model's layers and quantizers what a description says, with their ranges.

    Args:
        model: The model; not changed by this.
        description: How the model was quantized, as ``quantpatch.export.checkpoint.description`` writes it.
        tensors: The ranges among them, by their names in the ``state_dict``.

    Attributes:
        problems: Why it cannot be done; empty if it can.
    """

    def __init__(self, model: nn.Module, description: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        self.model = model
        self.problems: list[str] = []
        self._modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
        self._converted: dict[str, type[Any]] = {}
        self._changed: dict[int, type[Any]] = {}  # the same by the layer's identity
        self._quantizers: dict[str, _Quantizer] = {}
        self._aliases: dict[str, str] = {}
        self._input_factors: dict[str, Tensor] = {}
        self._tensors = dict(tensors)
        try:
            self._description = read(Description, "the description", description)
        except CheckpointError as error:
            self.problems.append(f"its description is damaged: {error}")
        else:
            self._plan()

    def _plan(self) -> None:
        gone = missing_plugins(self._description.plugins)
        self._plan_layers()
        self._plan_quantizers()
        self._plan_input_factors()
        if self.problems and gone:
            # What is missing has its reason; a plugin that nothing of this model needs may be gone.
            self.problems[:0] = [f"the plugin {plugin}" for plugin in gone]

    def _refuse(self, name: str, why: object) -> None:
        """A problem with what has a name in the file, which may be as long and odd as it likes."""
        self.problems.append(f"{shown(name) or 'the model'}: {shown(why, 600)}")

    # --- looking -------------------------------------------------------------------------------

    def _plan_layers(self) -> None:
        known = KnownClasses()
        layers = self._description.layers
        for name, saved in layers.items():
            layer = self._modules.get(name)
            if layer is None:
                self.problems.append(
                    f"{shown(name) or 'the model'} ({shown(saved.replacement)}): the model has no such layer"
                )
            else:
                self._plan_layer(name, layer, saved, known)
        # A layer that is shared may be in the file under another of its names.
        described = {id(self._modules.get(name)) for name in layers}
        for name, layer in self._modules.items():
            if isinstance(layer, QuantizedLayer) and id(layer) not in described:
                self._convert(name, layer.float_class)

    def _plan_layer(self, name: str, layer: Any, saved: Layer, known: KnownClasses) -> None:
        now = own_class(layer)
        float_now = layer.float_class if isinstance(layer, QuantizedLayer) else now
        if dotted(float_now) != saved.float_class:
            self._refuse(name, f"the file has a {shown(saved.float_class)}, the model a {dotted(float_now)}")
            return
        if saved.operations:
            found = find_operations(layer, float_now, frozenset(saved.operations))
            if found.made is None:
                why = "; ".join(found.hidden) or "its forward has none of them"
                self._refuse(name, f"its operations {', '.join(saved.operations)} cannot be quantized: {why}")
            elif found.made is not now:
                self._convert(name, found.made)
            return
        if dotted(replacement_of(now)) == saved.replacement:
            return
        try:
            cls = known.find(saved.replacement, float_now)
            if cls is None:
                self._refuse(
                    name,
                    f"its class {shown(saved.replacement)} is offered by no plugin for a {dotted(float_now)} "
                    f"and has not been imported. Import what defines it first, or install the plugin that "
                    f"brings it",
                )
            else:
                self._convert(name, cls if cls.float_class is float_now else combine(cls, float_now))
        except (QuantPatchError, LayerError) as error:
            self._refuse(name, error)

    def _convert(self, name: str, cls: type[Any]) -> None:
        self._converted[name] = self._changed[id(self._modules[name])] = cls

    def _plan_input_factors(self) -> None:
        for name in self._description.input_factors:
            factor = self._tensors.pop(f"{name}.{FACTOR_KEY}".lstrip("."), None)
            layer = self._modules.get(name)
            if layer is None:
                self._refuse(name, "the model has no such layer, whose input is multiplied by a factor")
            elif factor is None or not factor.is_floating_point() or not bool(torch.isfinite(factor).all()):
                self._refuse(name, "the factor of its input is missing, or is not finite")
            else:
                self._input_factors[name] = factor

    def _plan_quantizers(self) -> None:
        places: dict[str, set[str]] = {}

        def has_place(name: str) -> bool:
            parent, _, own = name.rpartition(".")
            if parent not in places:
                places[parent] = self._places_in(parent)
            return own in places[parent]

        tied = self._description.tied
        for name, saved in self._description.quantizers.items():
            if not has_place(name):
                self._refuse(
                    name,
                    "the model has no such quantizer, nor a layer with an operand of that name; do to it "
                    "first what gave one to the saved model",
                )
                continue
            key = f"{name}.{RANGE_KEY}"
            amax = self._tensors.pop(key, None)
            if amax is None and key in tied:
                source = tied[key]
                amax = self._tensors.get(source)
                first = self._quantizers.get(source.removesuffix(f".{RANGE_KEY}"))
                amax = first.amax if amax is None and first is not None else amax
            try:
                descriptor = descriptor_of(saved.descriptor)
                made = TensorQuantizer(descriptor)
                number = made.zero_point if saved.zero_point is None else saved.zero_point
                if saved.zero_point is not None:
                    check_zero_point(saved.zero_point, made.format)
                tensor = self._tensors.pop(f"{name}.{ZERO_POINT_KEY}", None)
                used = tensor if type(made.format) is Integer else None  # others round as they say
                if used is not None and (found := read_zero_point(used, made.format)) != number:
                    raise CheckpointError(
                        f"its zero point is {number} in the description, and {found} beside its range"
                    )
                amax = self._range_of(name, made, amax, known=saved.known)
            except QuantPatchError as error:
                self._refuse(name, error)
                continue
            self._quantizers[name] = _Quantizer(made, saved.disabled, saved.quantizing, number, amax)
        for alias, of in self._description.shared.items():
            # Further names of quantizers that several layers share.
            if of not in self._quantizers or alias in self._quantizers or not has_place(alias):
                self._refuse(alias, f"in the file it is {shown(of)}; the model has no place for it")
            else:
                self._aliases[alias] = of
                self._tensors.pop(f"{alias}.{RANGE_KEY}", None)

    def _places_in(self, parent: str) -> set[str]:
        """The names that quantizers may have in a module, once it is of the class that the file says."""
        module = self._modules.get(parent)
        if module is None:
            return set()
        cls = self._changed.get(id(module), own_class(module))
        # Those of a module of the user's own are there, or nothing is known of them.
        found = {n for n, child in module._modules.items() if isinstance(child, TensorQuantizer)}
        if id(module) in self._changed:
            found = set()
        if issubclass(cls, QuantizedLayer):
            found |= {quantizer_name(operand) for operand in _operands(module, cls)}
        if can_hold(module):
            found.add(_OUTPUT)
        return found

    def _range_of(
        self, name: str, made: TensorQuantizer, amax: Tensor | None, *, known: bool
    ) -> Tensor | None:
        """A quantizer's range, as the file has it.

        Raises:
            QuantPatchError: It is missing, or not the range of such a quantizer.
        """
        if not known:
            if amax is not None and not bool(torch.isnan(amax).all()):
                raise CheckpointError("it has a range, which the file says is not known")
            return None
        if amax is None:
            raise CheckpointError("its range is missing")
        amax = amax.abs() if made.descriptor.learn_amax and amax.is_floating_point() else amax
        problem = self._range_problem(name, made, amax)
        if problem:
            raise CheckpointError(problem)
        return amax

    def _range_problem(self, name: str, made: TensorQuantizer, amax: Tensor) -> str | None:
        if amax.dtype != torch.float32:
            return f"its range is {amax.dtype}, expected torch.float32"
        if amax.numel() and not bool(torch.isfinite(amax).all()):
            return "its range holds NaN or infinity"
        if amax.numel() and bool((amax < 0).any()):
            return f"its range is negative ({amax.min().item():.4g})"
        descriptor, format = made.descriptor, made.format
        if descriptor.kept_axes is None and format.block_size is None:
            return None if amax.numel() == 1 else f"its range has the shape {tuple(amax.shape)}, expected ()"
        parent, _, own = name.rpartition(".")
        weight = getattr(self._modules.get(parent), own.removesuffix("_quantizer"), None)
        if not isinstance(weight, Tensor) or amax.dim() == 0:
            return None  # an activation: its shape shows when it comes
        wanted = range_shape(weight.shape, descriptor.kept_axes, format.block_size)
        if wanted is None:
            return f"its axis {descriptor.kept_axes} is not one of a weight of shape {tuple(weight.shape)}"
        if amax.dim() == len(wanted) and all(a in (1, w) for a, w in zip(amax.shape, wanted, strict=True)):
            return None
        return f"its range has the shape {tuple(amax.shape)}, expected {tuple(wanted)}"

    # --- doing ---------------------------------------------------------------------------------

    def restructure(self) -> None:
        """Gives the model its layers and quantizers, whose ranges are still what they were."""
        for module in named_input_factors(self.model).values():
            drop_input_factor(module)
        for name, cls in self._converted.items():
            layer: Any = self._modules[name]
            if isinstance(layer, QuantizedLayer):
                for own in type(layer).quantizers(layer):
                    del self._modules[name]._modules[own]
                    self._modules.pop(f"{name}.{own}".lstrip("."), None)  # a new one takes its place
            change_class(layer, cls)
            allow_fast_paths(layer)
        for name, module in placed_in(self.model).items():
            key = f"{name}.{_OUTPUT}".lstrip(".")
            if key not in self._quantizers and key not in self._aliases:
                take_out(module)
        described = self._description.layers
        # A quantizer that several layers share may be in the file under another of its names.
        kept = {id(self._modules[name]) for name in self._quantizers if name in self._modules}
        for name in described:
            now: Any = self._modules[name]
            prefix = f"{name}." if name else ""
            for own in list(type(now).quantizers(now)):
                if prefix + own not in self._quantizers and id(now._modules[own]) not in kept:
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
                layer.make_room_for_ranges()
                layer.guard_fast_paths()

    def set_ranges(self) -> None:
        """Gives the quantizers their ranges and layers their factors, each on the device of its layer."""
        for name, factor in self._input_factors.items():
            layer = self._modules[name]
            multiply_input_of(layer, factor.to(device_near(layer)))
        for name, saved in self._quantizers.items():
            quantizer = self.model.get_submodule(name)
            assert isinstance(quantizer, TensorQuantizer)
            self._set_range(quantizer, saved, device_near(self._modules[name.rpartition(".")[0]]))

    def _put(self, name: str, saved: _Quantizer, names: dict[int, list[str]]) -> None:
        """Makes a quantizer what the file says.

        Args:
            name: One of its names.
            saved: The quantizer in the file.
            names: The names of every module that is still in the model, by its identity.
        """
        parent = name.rpartition(".")[0]
        quantizer = self._modules.get(name)
        if not isinstance(quantizer, TensorQuantizer) or quantizer.descriptor != saved.made.descriptor:
            old, quantizer = quantizer, saved.made
            if isinstance(old, TensorQuantizer) and id(old) in names:
                quantizer.take_tensor_of(old)
            # A quantizer that several layers share stays shared.
            for place in names.pop(id(old), [name]):
                self._place(place, quantizer)
            quantizer.train(self._modules[parent].training)
        quantizer.disabled, quantizer.quantizing = saved.disabled, saved.quantizing
        quantizer.calibrating, quantizer.calibrator = False, None

    def _place(self, name: str, quantizer: Any) -> None:
        parent, _, own = name.rpartition(".")
        module = self._modules[parent]
        if own == _OUTPUT and can_hold(module):
            quantize_output_of(module, quantizer)
        else:
            module._modules[own] = quantizer

    @staticmethod
    def _set_range(quantizer: TensorQuantizer, saved: _Quantizer, device: torch.device) -> None:
        quantizer.make_room(device)
        if quantizer.held is not None and quantizer.zero_point != saved.zero_point:
            quantizer.forget_zero_point()
            if saved.zero_point is not None and quantizer.zero_point != saved.zero_point:
                quantizer.use_zero_point(saved.zero_point)
        known, amax = quantizer.amax, saved.amax
        if amax is None or (known is not None and (known.shape != amax.shape or known.is_meta)):
            quantizer.amax = None
        if amax is not None:
            quantizer.amax = amax.to(device)


def device_near(layer: nn.Module) -> torch.device:
    """The device of a quantizer's layer; a range must not wait on another for its optimizer."""
    for tensor in itertools.chain(layer.parameters(recurse=False), layer.parameters()):
        if not tensor.is_meta:
            return torch.device(tensor.device)
    return torch.device("cpu")


def _operands(layer: Any, cls: type[Any]) -> list[str]:
    """The operands that a layer can have quantizers for, once it is of a class; it is not changed."""
    seen = object.__new__(type(layer))
    seen.__dict__ = vars(layer)
    change_class(seen, cls)
    return [operand for operand, _ in cast(type[QuantizedLayer], cls).descriptors(seen, EVERY_OPERAND)]
