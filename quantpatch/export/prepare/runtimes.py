"""What each runtime of an ONNX export takes, and what of a model it does not.

Sources for TensorRT:

- "Working with Quantized Types", TensorRT 10.11 documentation: quantization is symmetric; values are signed
  INT8, FP8 E4M3, signed INT4 or FP4; INT4 is for weights only; an activation has one scale.
- onnx-tensorrt's docs/operators.md, QuantizeLinear and DequantizeLinear: the scale is a positive constant and
  the zero point is 0. Its onnxOpImporters.cpp: the size of blocks is that of the weight by that of the scale,
  and the number of INT4 values is even.
- API reference of IDequantizeLayer: the rank of scales is 2 at most.
- pytorch-quantization's tensor_quant.py: per-channel scales of ConvTranspose weights are on axis 0.

For ONNX Runtime: "Quantize ONNX Models" and its CPU provider's list of kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import attrs
import torch

from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.numerics.fake_quant import quantize
from quantpatch.numerics.formats import Blocked, Float, Integer, NumberFormat
from quantpatch.plugins.registry import registry
from quantpatch.torch_tools import nn

Runtime = Literal["onnxruntime", "tensorrt"]


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
            for operand in layer.quantizers():
                own = operand.removesuffix("_quantizer")
                owners[id(layer.quantizer(own))] = (layer, own if own in weights else "")
    found = []
    for name, quantizer in named_quantizers(model).items():
        if quantizer.disabled or not (quantizer.quantizing or quantizer.calibrating):
            continue
        layer, weight = owners.get(id(quantizer), (None, ""))
        with torch.no_grad():
            value = getattr(layer, weight) if weight else None
        found.append(ExportedQuantizer(name, quantizer, layer, value))
    return found


def codes_name(quantizer: str, call: int) -> str:
    """The name in the file of what a quantizer gives at a call, before it is dequantized."""
    return f"{quantizer}.codes" if call == 0 else f"{quantizer}.codes_{call}"


# --- What no ONNX file can say ----------------------------------------------------------------------------


def _common(operand: ExportedQuantizer, opset: int) -> str | None:
    quantizer, format = operand.quantizer, operand.format
    is_weight = operand.weight is not None
    if quantizer.calibrating:
        return "it is being calibrated; end the calibration first"
    if operand.amax is None and not (is_weight and quantizer.descriptor.dynamic):
        if quantizer.descriptor.dynamic:
            return (
                "it takes its range from each tensor, which a file of constants cannot; use a "
                "static recipe such as 'int8'"
            )
        return "its range is not known; write qp.calibrate(model, batches), or disable it"
    tensors = [t for t in (operand.amax, operand.weight) if t is not None]
    if any(t.is_meta for t in tensors):
        return "it is on the meta device and has no values; load the model first"
    element, held = operand.element, format.onnx
    if is_weight and operand.zero_point:
        return (
            f"its integers have the zero point {operand.zero_point}, which is exported for activations only; "
            f"use QuantDescriptor(axis='channel', narrow_range=True) for weights"
        )
    if isinstance(format, Blocked):
        if not is_weight:
            return (
                f"its format {format.name} is in blocks, which are exported for weights only; "
                f"give it an integer format"
            )
        if held is None:
            return (
                f"its format {format.name} has no operator in ONNX; blocks of integers such as int4_g128 have"
            )
    plugin = registry.offers_format(operand.own_element)
    if type(operand.own_element) not in (Integer, Float):
        why = _unlike_onnx(operand)
        if why:
            whose = f"of the plugin {plugin!r}" if plugin else "of your own"
            return f"ONNX has no operator for its format {format.name}, {whose}: {why}. Use int8 or FP8"
    elif held is None:
        return f"its format {element.name} has no operator in ONNX; FP8 E4M3 and E5M2 have"
    if held is not None and opset < held.opset:
        what = "blocks need" if format.block_size else f"its codes are {held.type}, which needs"
        return f"{what} opset {held.opset}, and opset={opset} was given; leave opset out"
    if plugin is None and element is not operand.own_element:
        return (
            f"its format {format.name} is offered by no plugin, so that the file could not say what it was; "
            f"return it from the hook quantpatch_formats"
        )
    return None


def _unlike_onnx(operand: ExportedQuantizer) -> str:
    """Why a plugin's format cannot be written as what it says that ONNX has for it; empty if it can."""
    held = operand.format.onnx
    if held is None:
        return "it does not name an ONNX type for its codes (NumberFormat.onnx)"
    if operand.weight is None:
        return (
            "" if held.rounds else "it does not round as QuantizeLinear does, so that it is for weights only"
        )
    return "" if operand.fits_its_type else f"its codes are not all of {held.type}, although it says so"


# --- TensorRT ---------------------------------------------------------------------------------------------


def _tensorrt(operand: ExportedQuantizer) -> str | None:
    element, is_weight = operand.element, operand.weight is not None
    blocked = isinstance(operand.format, Blocked)
    if operand.zero_point:
        return (
            f"its integers have the zero point {operand.zero_point}, and TensorRT's integers are symmetric; "
            f"leave out zero_points=True and fit_zero_points, or give it QuantDescriptor() and calibrate "
            f"again"
        )
    if isinstance(element, Integer) and element.unsigned:
        return (
            f"{element.name} is unsigned, and TensorRT has signed INT8 only; use "
            f"QuantDescriptor(unsigned=False)"
        )
    if isinstance(element, Float) and element.mantissa_bits != 3:
        return "of FP8 TensorRT has E4M3 only; use format='fp8_e4m3'"
    if not is_weight and operand.axis is not None:
        return "an activation has one scale in TensorRT; use axis=None"
    if isinstance(element, Float) and operand.axis is not None:
        return (
            "FP8 has one scale for the tensor in TensorRT; use "
            "QuantDescriptor(format='fp8_e4m3') without axis"
        )
    if blocked and isinstance(element, Integer) and element.bits > 4:
        return (
            f"blocks are of INT4 in TensorRT, not of {element.name}; use int4_g128, or int8 "
            f"with axis='channel'"
        )
    if blocked:
        return _tensorrt_blocks(operand)
    transposed = getattr(operand.layer, "transposed", False)  # which convolutions say of themselves
    if is_weight and transposed and operand.axes:
        return (
            "its scales are those of the output channels within groups, on two axes, and for a transposed "
            "convolution TensorRT takes axis 0; set the quantizer's descriptor to "
            "QuantDescriptor(axis=0, narrow_range=True) and calibrate again"
        )
    if is_weight and transposed and operand.axis not in (None, 0):
        return (
            f"its scales are on axis {operand.axis}, and for a transposed convolution "
            f"TensorRT takes axis 0; set the "
            f"quantizer's descriptor to QuantDescriptor(axis=0, narrow_range=True) and calibrate again"
        )
    return None


def _tensorrt_blocks(operand: ExportedQuantizer) -> str | None:
    """Why TensorRT does not take the blocks of a weight, or would read them otherwise."""
    assert operand.weight is not None
    assert operand.format.block_size is not None
    assert operand.axis is not None
    shape, block_size = operand.weight.shape, operand.format.block_size
    if len(shape) != 2:
        return (
            f"TensorRT takes blocks of matrices, and its weight has the shape {tuple(shape)}; use int8 with "
            f"axis='channel'"
        )
    along = shape[operand.axis]
    if along > block_size and along % block_size:
        count = -(-along // block_size)
        return (
            f"its blocks of {block_size} leave a shorter one of the {along} values along axis "
            f"{operand.axis % 2}, and TensorRT takes the size of blocks to be {along} / {count}; use a "
            f"format whose blocks divide {along}"
        )
    if operand.weight.numel() % 2:
        return "TensorRT packs two INT4 values in a byte, and its weight has an odd number; use int8"
    return None


RUNTIMES: dict[str, Callable[[ExportedQuantizer], str | None]] = {
    "onnxruntime": lambda operand: None,
    "tensorrt": _tensorrt,
}


def problems(found: list[ExportedQuantizer], runtime: str, opset: int) -> dict[str, str]:
    """The quantizers that a runtime does not take, and what to change."""
    refused = {}
    for operand in found:
        why = _common(operand, opset) or RUNTIMES[runtime](operand)
        if why:
            refused[operand.name] = why
    return refused
