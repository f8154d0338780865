"""Two operators that stand for a quantizer in a traced model, and what they become in ONNX.

They compute what ONNX's operators compute, so a model whose quantizers use them gives the same results in
eager mode. Each becomes the standard operators of the same name; nothing of ours is left in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript.values import Opset
from torch import Tensor

from quantpatch.export.onnx.grouped_operators import grouped_products, grouped_to_onnx
from quantpatch.export.onnx.recurrent_operators import recurrent_to_onnx


def _along(parameter: Tensor, x: Tensor, axis: int) -> Tensor:
    """A 1-d scale or zero point, shaped to broadcast along an axis."""
    if parameter.dim() != 1:
        return parameter
    return parameter.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


@torch.library.custom_op("quantpatch::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, name: str) -> Tensor:
    """QuantizeLinear to the type of ``zero_point``, and DequantizeLinear."""
    scale, zero = _along(scale, x, axis), _along(zero_point, x, axis)
    y = x / scale
    if zero.dtype.is_floating_point:
        largest = torch.finfo(zero.dtype).max
        return y.clamp(-largest, largest).to(zero.dtype).float() * scale
    kind = torch.iinfo(zero.dtype)
    return (y.round().add(zero).clamp(kind.min, kind.max) - zero) * scale


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, name: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("quantpatch::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, axis: int, block_size: int, kind: str) -> Tensor:
    """DequantizeLinear of codes; ``kind`` is how ONNX stores them ("int4", "uint4", "" for as they are)."""
    values = codes.float()
    if block_size:
        scale = scale.repeat_interleave(block_size, axis).narrow(axis, 0, codes.shape[axis])
    return values * _along(scale, codes, axis)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, axis: int, block_size: int, kind: str) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table that ``torch.onnx.export`` takes as ``custom_translation_table``."""
    op = Opset("", opset)

    def quantize_dequantize_to_onnx(x: Any, scale: Any, zero_point: Any, axis: int, name: str) -> Any:
        options = {"axis": axis} if len(scale.shape) == 1 else {}
        codes = op.QuantizeLinear(x, scale, zero_point, **options)
        codes.name = name
        return op.DequantizeLinear(codes, scale, zero_point, **options)

    def dequantize_to_onnx(codes: Any, scale: Any, axis: int, block_size: int, kind: str) -> Any:
        if kind:  # torch has no such type; the exporter turns this into an initializer of 4 bits
            codes = op.Cast(codes, to=getattr(onnx.TensorProto, kind.upper()))
        if block_size:
            return op.DequantizeLinear(codes, scale, axis=axis, block_size=block_size)
        options = {"axis": axis} if len(scale.shape) == 1 else {}
        return op.DequantizeLinear(codes, scale, **options)

    return {
        torch.ops.quantpatch.quantize_dequantize.default: quantize_dequantize_to_onnx,
        torch.ops.quantpatch.dequantize.default: dequantize_to_onnx,
        torch.ops.quantpatch.recurrent.default: recurrent_to_onnx(op),
        **dict.fromkeys(grouped_products(), grouped_to_onnx(op)),
    }
