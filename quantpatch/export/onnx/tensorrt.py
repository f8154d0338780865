"""What TensorRT does not take, beside zero points and unsigned integers.

Sources:

- "Working with Quantized Types", TensorRT 10.11 documentation: quantization is symmetric; values are signed
  INT8, FP8 E4M3, signed INT4 or FP4; INT4 is for weights only; an activation has one scale.
- onnx-tensorrt's docs/operators.md, QuantizeLinear and DequantizeLinear: the scale is a positive constant and
  the zero point is 0. Its onnxOpImporters.cpp: the size of blocks is that of the weight by that of the scale,
  and the number of INT4 values is even.
- API reference of IDequantizeLayer: the rank of scales is 2 at most.
- pytorch-quantization's tensor_quant.py: per-channel scales of ConvTranspose weights are on axis 0.
"""

from __future__ import annotations

from quantpatch.export.prepare.exported import ExportedQuantizer
from quantpatch.numerics.formats import Blocked, Float, Integer


def why_refused(operand: ExportedQuantizer) -> str | None:
    """What TensorRT does not take of a quantizer, and what to change; None if it takes it."""
    element, is_weight = operand.element, operand.weight is not None
    blocked = isinstance(operand.format, Blocked)
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
        return _of_blocks(operand)
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


def _of_blocks(operand: ExportedQuantizer) -> str | None:
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
