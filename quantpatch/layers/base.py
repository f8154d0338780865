"""``QuantizedLayer``: what makes a float layer's class a quantized one.

``class QuantLinear(QuantizedLayer, nn.Linear)`` is all there is to a layer: the mixin quantizes the
operands and hands them to the forward of the float class, which is not copied. So everything that the
float class can do (keywords, padding modes, devices …), the quantized one can.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch.nn.parameter import is_lazy

from quantpatch.errors import ConversionError, LayerError
from quantpatch.layers.input_factor import INPUT_FACTOR
from quantpatch.layers.operations import (
    InnerOperand,
    Operations,
    Rewritten,
    Wanted,
    quantized,
    quantizer_name,
    rewrite,
)
from quantpatch.layers.quantizer import PARALLELIZE_FIRST, TensorQuantizer
from quantpatch.layers.stand_ins import call_with, without_stand_in
from quantpatch.recipes.builtin import active_recipe
from quantpatch.recipes.descriptor import Axis, QuantDescriptor, Recipe
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.class_swap import change_class, make_class, own_class, written_name
from quantpatch.torch_tools.fast_paths import allow_fast_paths, refuse_fast_paths
from quantpatch.torch_tools.fx import leaf_in_fx


class QuantizedLayer:
    """Mixin that quantizes a layer's operands; name it before the float class.

    A subclass says what its operands are; quantizers are submodules named after them
    (``input_quantizer``, ``weight_quantizer`` …). With all of them disabled the layer computes what its
    float class computes, bit for bit.

    Attributes:
        inputs: Names of the parameters of ``forward`` that are activations, in their order.
        weights: The axis of the output channels of each weight, by its attribute name; axes for a weight
            of several experts in one, such as ``(0, 1)``; None for one that always has one range.
        operations: Operations that ``forward`` makes itself, such as ``+`` or ``torch.matmul``, each with
            names for its operands: ``{torch.add: ("branch", "skip")}``. Each of these activations is
            quantized where it is used. A name, such as ``"products"``, stands for all of these, as in
            ``quantize_modules``. A class with operations has no other operands, unless it names them.
        parts: Submodules whose weights the layer multiplies itself and that it never calls, by name, each
            with its class. Nothing replaces them; their weights are operands of the layer: that of
            ``out_proj`` is ``out_proj_weight``.
        feature_axis: The axis of an activation's features, along which formats in blocks run. For weights
            that is the axis of the input channels.
        float_class: The class this one stands for (found automatically).
    """

    inputs: ClassVar[tuple[str, ...]] = ("input",)
    weights: ClassVar[Mapping[str, Axis]] = {"weight": 0}
    operations: ClassVar[Operations | str] = {}
    parts: ClassVar[Mapping[str, type[nn.Module]]] = {}
    feature_axis: ClassVar[int] = -1
    float_class: ClassVar[type[nn.Module]]

    _is_block: ClassVar[bool]  # whether its objects hold modules of their own, once that is known
    _inner: ClassVar[Mapping[str, InnerOperand]] = {}  # operands of operations, by name
    _prepared: ClassVar[Rewritten | None] = None  # what a class is made with that no class statement writes
    _rewritten: ClassVar[Any] = None  # the float class's forward with those, if there are any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "_is_made" not in vars(cls):  # else the float class and its registries do not hear of it
            super().__init_subclass__(**kwargs)
        cls._set_up()

    @classmethod
    def _set_up(cls) -> None:
        """Finds the float class and fits the class to it."""
        if "float_class" in vars(cls) or _is_filled_later():
            return  # it was pickled by value, with all that is found out here
        floats = [c for c in cls.__mro__ if issubclass(c, nn.Module) and not issubclass(c, QuantizedLayer)]
        if not floats or floats[0] is nn.Module:
            return  # a mixin of its own, to be combined with a float class later
        cls.float_class = floats[0]
        if cls._prepared is not None:
            cls._use(cls._prepared)
        elif cls.operations:
            cls._use(rewrite(cls.float_class, Wanted.of(cls.operations), demand=True))
        cls._check_inputs()
        cls._show_parameters()
        if "__init__" not in vars(cls):
            # The mixin takes whatever the float class takes; tools that ask shall see its parameters.
            cls.__signature__ = inspect.signature(cls.float_class)  # type: ignore[attr-defined]

    @classmethod
    def _use(cls, rewritten: Rewritten) -> None:
        """Has the float class's forward quantize the operands of operations."""
        if cls.inputs is QuantizedLayer.inputs:
            cls.inputs = ()
        if cls.weights is QuantizedLayer.weights:
            cls.weights = {}
        cls._inner = rewritten.operands
        functions = dict(rewritten.functions)
        cls._rewritten = functions.pop("forward", None)
        for name, function in functions.items():
            if name not in vars(cls):
                type.__setattr__(cls, name, function)

    @classmethod
    def _check_inputs(cls) -> None:
        """A misspelled input would pass by its quantizer unnoticed."""
        own = (inspect.unwrap(QuantizedLayer.forward), QuantizedLayer.quantize_inputs)
        if (inspect.unwrap(cls.forward), cls.quantize_inputs) != own:
            return  # it hands its inputs on as it likes
        names = [name for name in inspect.signature(cls.float_class.forward).parameters if name != "self"]
        if list(cls.inputs) != names[: len(cls.inputs)]:
            raise LayerError(
                f"{cls.__qualname__}.inputs is {cls.inputs!r}, but {cls.float_class.__qualname__}.forward "
                f"takes ({', '.join(names)}). Write the names of its first parameters: inputs = "
                f"{tuple(names[: max(1, len(cls.inputs))])!r}",
                layer=cls,
            )

    @classmethod
    def _show_parameters(cls) -> None:
        """Shows the float class's parameters on a ``forward`` that takes whatever that takes.

        ``torch.export`` asks for them: names of inputs and ``dynamic_shapes`` follow them.
        """
        forward: Any = cls.forward
        kinds = [p.kind for p in inspect.signature(inspect.unwrap(forward)).parameters.values()]
        takes_anything = kinds[1:] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]
        parameters = inspect.signature(cls.float_class.forward)
        if (
            not takes_anything
            or not isinstance(forward, FunctionType)
            or inspect.signature(forward) == parameters
        ):
            return
        shown = FunctionType(
            forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
        )
        functools.update_wrapper(shown, forward)
        shown.__wrapped__ = inspect.unwrap(forward)  # type: ignore[attr-defined]
        shown.__signature__ = parameters  # type: ignore[attr-defined]
        cls.forward = shown  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for part in parts_of(self):
            if isinstance(part, QuantizedLayer):
                part.make_float()
        self.add_quantizers(active_recipe())

    def make_float(self) -> None:
        """Makes the layer, in place, one of its float class without quantizers."""
        layer: Any = self
        for name in quantizers_of(layer):
            del layer._modules[name]
        change_class(layer, self.float_class)
        allow_fast_paths(layer)

    # --- quantizers ----------------------------------------------------------------------------

    def weight_axes(self) -> Mapping[str, Axis]:
        """``weights``, for a layer whose weights depend on its arguments."""
        return type(self).weights  # of the class: as an attribute of a module torch 2.8 compiles no mapping

    def add_quantizers(self, recipe: Recipe) -> None:
        """Gives the layer its quantizers; an operand that the recipe leaves float gets none."""
        self.put_quantizers(type(self).descriptors(self, recipe))

    def put_quantizers(self, descriptors: Iterable[tuple[str, QuantDescriptor]]) -> None:
        """Gives the layer a quantizer for each of these operands."""
        modules: dict[str, nn.Module | None] = self._modules  # type: ignore[attr-defined]
        for name, descriptor in descriptors:
            modules[f"{name}_quantizer"] = TensorQuantizer(descriptor, in_layer=True)
        self.make_room_for_ranges()
        self.guard_fast_paths()
        self._go_by_float_name()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._go_by_float_name()

    def _go_by_float_name(self) -> None:
        """Of a block, gives the class the name of the float one.

        Device maps, ``_no_split_modules`` and wrapping policies look for blocks by ``__class__.__name__``.
        Pickles and checkpoints go by ``__qualname__``, which stays what was written.
        """
        if {*map(type, self._modules.values())} <= {TensorQuantizer}:  # type: ignore[attr-defined]
            return  # as of nearly every layer: soon seen
        cls: Any = own_class(self)  # type: ignore[arg-type]
        if "_is_block" not in vars(cls):
            others = set(self._modules) - set(quantizers_of(self))  # type: ignore[attr-defined]
            if others - {"parametrizations", INPUT_FACTOR}:
                cls._settle(True)

    @classmethod
    def _settle(cls, is_block: bool) -> None:
        cls._is_block = is_block
        if is_block:
            cls._written_name = cls.__name__  # type: ignore[attr-defined]
            cls.__name__ = cls.float_class.__name__

    def _get_name(self) -> str:
        """The name that ``print(model)`` shows."""
        return written_name(type(self))

    def make_room_for_ranges(self) -> None:
        """Has the ranges of this layer's quantizers among its tensors, before they are known.

        On the device of the layer's own tensors; where these are on the meta device, see
        :mod:`quantpatch.layers.range_state`.
        """
        first = self._first_tensor()
        device = None if first is None else first.device
        weights = self.weight_axes()
        for name, quantizer in type(self).quantizers(self).items():
            operand = name.removesuffix("_quantizer")
            quantizer.make_room(device, _shaped(self, operand) if operand in weights else None)

    def _first_tensor(self) -> torch.Tensor | None:
        held: Any = self
        for tensors in (held._parameters, held._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    return tensor  # type: ignore[no-any-return]
        return None

    def _save_to_state_dict(self, *args: Any) -> None:
        # What was built on the meta device, or in a lazy layer, has its tensors by now.
        first = self._first_tensor()
        is_there = first is not None and not first.is_meta and not is_lazy(first)
        if is_there and any(
            (held := q.held) is None or held.is_meta for q in type(self).quantizers(self).values()
        ):
            self.make_room_for_ranges()
        super()._save_to_state_dict(*args)  # type: ignore[misc]

    def guard_fast_paths(self) -> None:
        """Refuses torch's fast paths, if they would pass a quantizer of this layer by, else allows them."""
        (refuse_fast_paths if type(self).quantizers(self) else allow_fast_paths)(self)  # type: ignore[arg-type]

    def descriptors(self, recipe: Recipe) -> Iterable[tuple[str, QuantDescriptor]]:
        """Each operand that a recipe quantizes, with its descriptor."""
        if recipe.input is not None:
            for name in type(self).inputs:
                yield name, recipe.input.for_axes(None, type(self).feature_axis)
        if recipe.weight is not None:
            for name, axis in self.weight_axes().items():
                yield name, recipe.weight.for_channel_axis(axis)
        for name, inner in self._inner.items():
            descriptor = inner.descriptor(recipe, type(self).feature_axis)
            if descriptor is not None:
                yield name, descriptor
        if recipe.output is not None:
            yield "output", recipe.output.for_axes(None, type(self).feature_axis)

    def quantizer(self, operand: str) -> TensorQuantizer | None:
        """The quantizer of an operand, or None if the operand is left float."""
        modules: dict[str, Any] = self._modules  # type: ignore[attr-defined]
        return modules.get(f"{operand}_quantizer")

    def quantizers(self) -> dict[str, TensorQuantizer]:
        """The layer's quantizers by the name of the submodule, such as ``"input_quantizer"``."""
        modules: dict[str, Any] = self._modules  # type: ignore[attr-defined]
        return {name: module for name, module in modules.items() if isinstance(module, TensorQuantizer)}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``nn.Module``.

        Raises:
            ConversionError: It is a range, which torch's ``ColwiseParallel`` is about to cut.
        """
        if "." in name and name.partition(".")[0] in type(self).quantizers(self):
            raise ConversionError(f"{self._get_name()} has learned ranges. {PARALLELIZE_FIRST}")
        super().register_parameter(name, param)  # type: ignore[misc]

    # --- computing -----------------------------------------------------------------------------

    @leaf_in_fx
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float class's forward, with quantized operands."""
        args, kwargs = self.quantize_inputs(args, kwargs)
        return self.quantize_output(self.run_float(self.quantize_weights(), args, kwargs))

    def run_float(
        self, stand_ins: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The float class's forward, which sees the stand-ins in place of the attributes of their names."""
        forward = type(self)._rewritten or self.float_class.forward
        return call_with(stand_ins, forward, self, *args, **kwargs)

    def quantize_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``forward``, with each activation quantized."""
        for position, name in enumerate(type(self).inputs):
            quantizer = self.quantizer(name)
            if quantizer is None:
                continue
            if position < len(args):
                args = (*args[:position], quantizer(args[position]), *args[position + 1 :])
            elif name in kwargs:
                kwargs = {**kwargs, name: quantizer(kwargs[name])}
        return args, kwargs

    def quantize_operand(self, operand: str, value: Any) -> Any:
        """An activation inside ``forward``, quantized by the quantizer of that name, if there is one.

        Of a list or tuple each tensor is. What is not a floating-point tensor passes as it is.
        """
        return quantized(self, quantizer_name(operand), value)

    def quantize_weights(self) -> dict[str, Any]:
        """Each weight that comes out of its quantizer changed, by name."""
        operands: dict[str, Any] = {}
        for name in self.weight_axes():
            quantizer = self.quantizer(name)
            if quantizer is not None and quantizer.is_active:
                weight = without_stand_in(self, name)
                quantized = quantizer(weight, batch_axis=None)
                if quantized is not weight:
                    operands[name] = quantized
        return operands

    def quantize_output(self, output: Any) -> Any:
        """What ``forward`` returns, quantized; of a tuple its first element."""
        quantizer = self.quantizer("output")
        if quantizer is None:
            return output
        return quantized_output(quantizer, output)


def quantized_output(quantizer: TensorQuantizer, output: Any) -> Any:
    """What a module returns, quantized; of a tuple its first element."""
    return (quantizer(output[0]), *output[1:]) if isinstance(output, tuple) else quantizer(output)


def make_replacement(name: str, bases: tuple[type[Any], ...], members: Mapping[str, Any]) -> type[Any]:
    """A replacement that no class statement writes, unseen by what watches for subclasses of the float class.

    Args:
        name: Its name.
        bases: A subclass of ``QuantizedLayer``, then the float class.
        members: What its dictionary holds: ``operations``, ``__module__``, ``__doc__`` …
    """
    made = make_class(name, bases, {**members, "_is_made": True})
    super(made, made).__init_subclass__()  # of the mixins
    return made


def _is_filled_later() -> bool:
    """Whether cloudpickle makes a class, which first makes it empty, base classes included."""
    frame: Any = sys._getframe(2)
    for _ in range(8):  # through the __init_subclass__ of mixins
        if frame is None or frame.f_code.co_name == "_make_skeleton_class":
            break
        frame = frame.f_back
    return frame is not None and "cloudpickle" in frame.f_globals.get("__name__", "")


def _shaped(layer: Any, operand: str) -> torch.Tensor | None:
    """A weight of a layer, for its shape; None while it has none. A parametrization is left as it is."""
    weight = layer._parameters.get(operand)
    if weight is None:
        computed = layer._modules.get("parametrizations")
        ways = computed[operand] if computed is not None and operand in computed else None
        modes = {} if ways is None else {module: module.training for module in ways.modules()}
        try:
            for module in modes:  # in training mode some change what they compute, whenever they are asked
                module.training = False
            with torch.no_grad():
                weight = getattr(layer, operand, None)
        finally:
            for module, training in modes.items():
                module.training = training
    return weight if isinstance(weight, torch.Tensor) and not is_lazy(weight) else None


def named_layers(model: nn.Module) -> dict[str, Any]:
    """Every quantized layer of a model by its qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, Any, str, TensorQuantizer]]:
    """Each weight that has a quantizer: that one's name, the layer, the weight's name in it, and it."""
    for name, layer in named_layers(model).items():
        for operand in layer.weight_axes():
            quantizer = type(layer).quantizer(layer, operand)
            if quantizer is not None:
                yield f"{name}.{quantizer_name(operand)}".lstrip("."), layer, operand, quantizer


def inner_weights(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Each operand that a forward makes of weights by itself: its quantizer's name, and that one."""
    for name, layer in named_layers(model).items():
        for operand, inner in layer._inner.items():
            quantizer = type(layer).quantizer(layer, operand)
            if inner.is_weight and quantizer is not None:
                yield f"{name}.{quantizer_name(operand)}".lstrip("."), quantizer


def weight_quantizers(model: nn.Module) -> set[TensorQuantizer]:
    """The quantizers of a model's weights, and of what its forwards make of weights."""
    of_layers = {quantizer for *_, quantizer in quantized_weights(model)}
    return of_layers | {quantizer for _, quantizer in inner_weights(model)}


# Activations of (batch, channels, ...): counted from the end, as torch lets the batch axis be left out.
class ChannelsFirst1d(QuantizedLayer):
    """Mixin for layers over one spatial axis: features are channels, ``(..., channels, length)``."""

    feature_axis = -2


class ChannelsFirst2d(QuantizedLayer):
    """Mixin for layers over two spatial axes."""

    feature_axis = -3


class ChannelsFirst3d(QuantizedLayer):
    """Mixin for layers over three spatial axes."""

    feature_axis = -4


def weight_owner(class_of: Callable[[str], Any], name: str) -> tuple[str, str]:
    """Which layer multiplies a weight, and under the name of which operand.

    Args:
        class_of: Gives the class of a module of the model by its name.
        name: The weight's name in the model: ``"fc.weight"``, or of a part of a layer
            ``"attention.out_proj.weight"``, which is ``out_proj_weight`` of ``"attention"``.
    """
    module, _, operand = name.rpartition(".")
    layer, _, part = module.rpartition(".")
    if part and part in getattr(class_of(layer), "parts", ()):
        return layer, f"{part}_{operand}"
    return module, operand


def parts_of(layer: Any, cls: Any = None) -> list[nn.Module]:
    """The submodules that a layer declares as its parts, or would if it was of a class."""
    found = (layer._modules.get(name) for name in getattr(cls or type(layer), "parts", ()))
    return [part for part in found if part is not None]


def is_quantizer(module: Any) -> bool:
    """Whether a module is a quantizer: this library's, or of a plugin's own kind.

    The class of one of these says ``is_quantizer = True`` and has ``disabled`` and ``quantizing``. It may
    have ``format_name``, ``bits``, ``axis`` and ``amax`` for ``summary``, and ``instead``: what to write in
    the place of functions of this library that know its own quantizers alone, by their names.
    """
    return isinstance(module, TensorQuantizer) or getattr(type(module), "is_quantizer", False) is True


def quantizers_of(layer: Any) -> dict[str, tuple[Any, ...]]:
    """A layer's own quantizers, of whatever kind, by the submodule that is one or a list of several."""
    children = {
        name: tuple(child) if isinstance(child, nn.ModuleList) else (child,)
        for name, child in layer._modules.items()
    }
    return {
        name: several for name, several in children.items() if several and all(map(is_quantizer, several))
    }
