"""The quantizers of a model that an export has to express, as every export sees them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs
import torch

from quantpatch.errors import listed, warn_caller
from quantpatch.layers.base import QuantizedLayer, inner_weights
from quantpatch.layers.quantizer import TensorQuantizer, in_float, named_quantizers
from quantpatch.numerics.fake_quant import quantize
from quantpatch.numerics.formats import Blocked, Float, Integer, NumberFormat
from quantpatch.torch_tools import nn


@attrs.frozen(eq=False)
class ExportedQuantizer:
    """A quantizer that the export has to express.

    Attributes:
        name: Of the quantizer.
        quantizer: The quantizer.
        layer: The layer it belongs to, or None.
        weight: The weight it quantizes, or None for an activation.
    """

    name: str
    quantizer: TensorQuantizer
    layer: Any
    weight: torch.Tensor | None

    @property
    def format(self) -> NumberFormat:
        """The quantizer's format."""
        return self.quantizer.format

    @functools.cached_property
    def zero_point(self) -> int | None:
        """Which of the unsigned integers stands for 0; None of other formats, and of a plugin's."""
        zero_point = self.quantizer.qparams.zero_point
        assert not isinstance(zero_point, torch.Tensor)
        return zero_point

    @functools.cached_property
    def element(self) -> NumberFormat:
        """The format of the elements, of a format in blocks as of a plain one.

        Of a plugin's format it is the built-in one whose type its codes have in a file, if it names one.
        """
        own = self.own_element
        if type(own) in (Integer, Float) or own.onnx is None:
            return own
        if isinstance(own, Integer):
            return Integer(**{field.name: getattr(own, field.name) for field in attrs.fields(Integer)})
        return _OF_TYPE[own.onnx.type]

    @property
    def own_element(self) -> NumberFormat:
        """The format of the elements as the quantizer has it."""
        return self.format.element if isinstance(self.format, Blocked) else self.format

    @property
    def amax(self) -> torch.Tensor | None:
        """The range that is the quantizer's own; None if it is the tensor's."""
        amax = self.quantizer.own_range
        return None if amax is None else amax.detach()

    @property
    def axis(self) -> int | None:
        """The axis of scales, or of blocks; None for a single scale, 0 for scales on several ``axes``."""
        if self.axes:
            return 0
        axis = self.quantizer.descriptor.kept_axes
        if self.format.block_size is not None:
            axis = -1 if axis is None else axis
        elif self.amax is not None and not self.amax.dim():
            return None  # a descriptor may give one range for all channels
        return axis[0] if isinstance(axis, tuple) else axis

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of scales if there are several, which have to be joined; else none."""
        axes = self.quantizer.descriptor.kept_axes
        if not isinstance(axes, tuple) or len(axes) < 2 or (self.amax is not None and not self.amax.dim()):
            return ()
        return axes

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor with one axis, the first, in the place of the several ``axes``, as ONNX has one only."""
        if not self.axes:
            return x
        return x.permute(self._axes_first(x.dim())).flatten(0, len(self.axes) - 1)

    def apart(self, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """What was ``joined`` from a tensor of this shape, as it was."""
        if not self.axes:
            return x
        order = self._axes_first(len(shape))
        return x.reshape([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])

    def _axes_first(self, dims: int) -> list[int]:
        kept = sorted(axis % dims for axis in self.axes)
        return [*kept, *(d for d in range(dims) if d not in kept)]

    def codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight's codes, of integers as such, and scale."""
        codes, scale = self._own_codes()
        if isinstance(self.element, Integer):
            codes = codes.to(torch.uint8 if self.element.unsigned else torch.int8)
        return codes, scale

    @property
    def is_unknown(self) -> bool:
        """Whether its range is not known, though a file needs it."""
        return self.amax is None and not self.quantizer.descriptor.dynamic

    def why_not_constant(self) -> str | None:
        """Why no file of constants can say what it does, and what to change; None if one can."""
        quantizer, is_weight = self.quantizer, self.weight is not None
        if quantizer.calibrating:
            return "it is being calibrated; end the calibration first"
        if self.amax is None and not (is_weight and quantizer.descriptor.dynamic):
            if quantizer.descriptor.dynamic:
                return (
                    "it takes its range from each tensor, which a file of constants cannot; use a "
                    "static recipe such as 'int8'"
                )
            return "its range is not known; write qp.calibrate(model, batches), or disable it"
        if any(t.is_meta for t in (self.amax, self.weight) if t is not None):
            return "it is on the meta device and has no values; load the model first"
        if is_weight and self.zero_point:
            return (
                f"its integers have the zero point {self.zero_point}, which is exported for activations "
                f"only; use QuantDescriptor(axis='channel', narrow_range=True) for weights"
            )
        return None

    @property
    def is_clipped(self) -> bool:
        """Whether its integers are fewer than what the type holds."""
        return isinstance(self.element, Integer) and self.format.max - self.format.min < 255

    @property
    def fits_its_type(self) -> bool:
        """Whether the weight's codes are numbers of the type that a plugin's format says they are of."""
        codes, _ = self._own_codes()
        if not isinstance(self.element, Integer) or not codes.numel():
            return True
        return bool((codes == codes.round()).all()) and (
            self.element.min <= codes.min().item() and codes.max().item() <= self.element.max
        )

    def _own_codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.weight is not None
        return quantize(
            self.weight.detach(),
            self.amax,
            self.format,
            axis=self.quantizer.descriptor.kept_axes,
            zero_point=self.zero_point,
        )


# The built-in format of each type that a file has codes in.
_OF_TYPE: dict[str, NumberFormat] = {
    format.onnx.type: format
    for format in (
        Integer(4),
        Integer(4, unsigned=True),
        Integer(8),
        Integer(8, unsigned=True),
        Float(4, 3),
        Float(5, 2),
    )
    if format.onnx is not None
}


def operands(model: nn.Module) -> list[ExportedQuantizer]:
    """Every quantizer that changes tensors, with the weight that it quantizes."""
    owners: dict[int, tuple[Any, str]] = {}
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            weights = layer.weight_axes()
            for operand in type(layer).quantizers(layer):
                own = operand.removesuffix("_quantizer")
                owners[id(type(layer).quantizer(layer, own))] = (layer, own if own in weights else "")
    found = []
    for name, quantizer in named_quantizers(model).items():
        if quantizer.disabled or not (quantizer.quantizing or quantizer.calibrating):
            continue
        layer, weight = owners.get(id(quantizer), (None, ""))
        with torch.no_grad():
            value = getattr(layer, weight) if weight else None
        found.append(ExportedQuantizer(name, quantizer, layer, value))
    return found


def reached(
    model: nn.Module, found: list[ExportedQuantizer], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[ExportedQuantizer]:
    """A model's quantizers as a run has them: without those that it does not reach and that have no range.

    No data reached these in calibration, as they are in a branch that is not taken; nor are they in a file of
    this run. What forwards make of weights by themselves becomes the weight of its quantizer.

    Args:
        model: The model.
        found: Its quantizers.
        args: Arguments to run it on, if one has no range, or quantizes what a forward makes of weights.
        kwargs: Its keyword arguments.
    """
    if any(operand.is_unknown for operand in found):
        called = _called(model, found, args, kwargs)
        found = [operand for operand in found if not operand.is_unknown or operand.name in called]
    of_weights = {quantizer for _, quantizer in inner_weights(model)}
    made = [operand for operand in found if operand.quantizer in of_weights]
    if not made or any(operand.is_unknown for operand in found):
        return found
    values = _made(model, [operand.quantizer for operand in made], args, kwargs)
    return [attrs.evolve(operand, weight=values.get(operand.quantizer, operand.weight)) for operand in found]


def _called(
    model: nn.Module, found: list[ExportedQuantizer], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> set[str]:
    """The names of the quantizers that a run reaches."""
    watched: dict[Any, set[str]] = {}
    for operand in found:  # a weight's quantizer is not called in float, but its layer is
        module = operand.quantizer if operand.weight is None else operand.layer
        watched.setdefault(module, set()).add(operand.name)
    called: set[str] = set()
    with in_float(model), torch.no_grad(), contextlib.ExitStack() as hooks:
        for module in watched:
            handle = module.register_forward_pre_hook(lambda module, _: called.update(watched[module]))
            hooks.callback(handle.remove)
        model(*args, **kwargs)
    return called


def _made(
    model: nn.Module, quantizers: Sequence[TensorQuantizer], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[TensorQuantizer, torch.Tensor]:
    """What each quantizer gets in a run, if that is the same at each of its calls.

    With the others at work: a product of two weights is of quantized ones.
    """
    values: dict[TensorQuantizer, torch.Tensor] = {}
    changing: set[TensorQuantizer] = set()

    def look(quantizer: Any, given: tuple[torch.Tensor, ...]) -> None:
        known = values.setdefault(quantizer, given[0])
        if known is not given[0] and not torch.equal(known, given[0]):
            changing.add(quantizer)

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for quantizer in quantizers:
            hooks.callback(quantizer.register_forward_pre_hook(look).remove)
        model(*args, **kwargs)
    return {quantizer: value for quantizer, value in values.items() if quantizer not in changing}


def warn_if_float(model: nn.Module, found: Collection[ExportedQuantizer], what: str) -> None:
    """Reports that nothing in an export will be quantized.

    Args:
        model: The model.
        found: Its quantizers that are on.
        what: What is made of it, such as ``"file"``.

    Warns:
        QuantPatchWarning: That is so.
    """
    if found:
        return
    off = list(named_quantizers(model))
    if off:
        why = (
            f"all its quantizers are off ({listed(off)}), so the {what} will be float. prepare() switches "
            f"off what a runtime is slower with, and its report says why; enable() has it quantized"
        )
    else:
        why = (
            f"it holds no quantizer, so the {what} will be float. Build it inside `with "
            f"quantize_modules():`, or write qp.convert(model), and calibrate it"
        )
    warn_caller(f"{type(model).__name__}: {why}")


def codes_name(quantizer: str, call: int) -> str:
    """The name in the file of what a quantizer gives at a call, before it is dequantized."""
    return f"{quantizer}.codes" if call == 0 else f"{quantizer}.codes_{call}"
