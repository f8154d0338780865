"""What quantizers compute through while the exporter traces a model: ``operators``, of constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantpatch.export.onnx.operators import dequantize, quantize_dequantize
from quantpatch.export.onnx.recurrent_operators import projecting
from quantpatch.export.prepare.runtimes import ExportedQuantizer, codes_name
from quantpatch.layers.lowering import Lowering
from quantpatch.numerics.formats import Float


def lowering_for(model: nn.Module, found: list[ExportedQuantizer], runtime: str) -> Lowering:
    """What a model's layers compute through while the exporter traces it: operators that it knows.

    Args:
        model: The model.
        found: Its quantizers.
        runtime: As in ``export_onnx``.
    """
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {
        operand.quantizer: (_activation if operand.weight is None else _weight)(operand, runtime)
        for operand in found
    }
    return Lowering(forwards, list(projecting(model).values()))


# torch traces a ``to`` that does nothing as two nodes, and takes twice the time for them all.


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _beside(x: Tensor, constant: Tensor) -> Tensor:
    return constant if constant.device == x.device else constant.to(x.device)


def _zero_point(element: Any, *, as_uint8: bool) -> Tensor:
    if isinstance(element, Float):
        kind = torch.float8_e4m3fn if element.mantissa_bits == 3 else torch.float8_e5m2
        return torch.zeros((), dtype=kind)
    if element.unsigned:
        return torch.tensor(element.zero_point, dtype=torch.uint8)
    return torch.tensor(128, dtype=torch.uint8) if as_uint8 else torch.zeros((), dtype=torch.int8)


def _activation(operand: ExportedQuantizer, runtime: str) -> Callable[[Tensor], Tensor]:
    element, amax, axis = operand.element, operand.amax, operand.axis
    assert amax is not None
    scale = operand.joined(amax) / operand.format.max
    zero = _zero_point(element, as_uint8=runtime == "onnxruntime")
    bounds = None
    if operand.is_clipped or bool((scale == 0).any()):
        # The grid is smaller than what the type holds, down to nothing where the range is 0.
        bounds = (scale * operand.format.min, scale * operand.format.max)
    # The quotient by 0 would be NaN; by anything else it is 0, since the value is.
    scale = scale.masked_fill(scale == 0, 1.0)
    flat = scale if axis is None else scale.flatten()
    zero = zero.clone() if axis is None else zero.expand(flat.shape).clone()
    calls = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal calls
        name = codes_name(operand.name, calls)
        calls += 1
        y = operand.joined(_as(x, torch.float32))
        if bounds is not None and axis is None:
            y = y.clamp(bounds[0].item(), bounds[1].item())
        elif bounds is not None:
            low, high = (_beside(x, bound) for bound in bounds)
            y = torch.minimum(torch.maximum(y, low), high)
        result: Tensor = quantize_dequantize(y, _beside(x, flat), _beside(x, zero), axis or 0, name)
        return _as(operand.apart(result, x.shape), x.dtype)

    return forward


def _weight(operand: ExportedQuantizer, runtime: str) -> Callable[[Tensor], Tensor]:
    format, element, axis = operand.format, operand.element, operand.axis
    codes, scale = (operand.joined(tensor) for tensor in operand.codes())
    dim = 0 if axis is None else axis % codes.dim()
    blocks = min(format.block_size or 0, codes.shape[dim]) if codes.dim() else 0
    if blocks and scale.dim() == 0:
        shape = list(codes.shape)
        shape[dim] = -(-shape[dim] // blocks)
        scale = scale.expand(shape)
    codes = _without_dead(codes, scale, dim, blocks)
    scale = scale.masked_fill(scale == 0, 1.0).contiguous()
    if not blocks and axis is not None:
        scale = scale.flatten()
    if isinstance(element, Float):
        codes = codes.to(_zero_point(element, as_uint8=False).dtype)
    # Kernels that take 4 bits are of blocks; what is none of these is stored in 4 bits by the passes.
    held = element.onnx
    four_bits = bool(blocks) and held is not None and held.type.endswith("INT4")
    name = codes_name(operand.name, 0)
    if runtime == "tensorrt" and not blocks:
        values = dequantize(codes, scale, dim, 0, "")
        zero = _zero_point(element, as_uint8=False).expand(scale.shape).clone()

        def forward(x: Tensor) -> Tensor:
            given = (_beside(x, constant) for constant in (values, scale, zero))
            result: Tensor = quantize_dequantize(*given, dim, name)
            return _as(operand.apart(result, x.shape), x.dtype)

        return forward
    kind = "" if held is None or not four_bits else held.type.lower()

    def forward_codes(x: Tensor) -> Tensor:
        result: Tensor = dequantize(_beside(x, codes), _beside(x, scale), dim, blocks, kind)
        return _as(operand.apart(result, x.shape), x.dtype)

    return forward_codes


def _without_dead(codes: Tensor, scale: Tensor, dim: int, blocks: int) -> Tensor:
    """Codes of 0 where the scale is 0, so that any scale gives 0."""
    dead = scale == 0
    if not bool(dead.any()):
        return codes
    if blocks:
        dead = dead.repeat_interleave(blocks, dim).narrow(dim, 0, codes.shape[dim])
    return codes.masked_fill(dead, 0)
