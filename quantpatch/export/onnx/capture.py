"""A model traced by ``torch.onnx.export``, its quantizers as operators that become pairs of ONNX's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quantpatch.errors import ExportError
from quantpatch.export.onnx.operators import dequantize, quantize_dequantize, translations
from quantpatch.export.onnx.recurrent_operators import kernels_as_operators, projecting, written_out
from quantpatch.export.prepare.exported import ExportedQuantizer, codes_name
from quantpatch.layers.lowering import Lowering, lowered
from quantpatch.numerics.formats import Float
from quantpatch.plugins.runtime import Runtime
from quantpatch.torch_tools import nn


def captured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    found: list[ExportedQuantizer],
    runtime: Runtime,
    opset: int,
    **options: Any,
) -> Any:
    """A model as ``torch.onnx.export`` traces it, an ``ONNXProgram``.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        found: Its quantizers, which compute through operators that the exporter knows.
        runtime: What will run the file.
        opset: The same.
        **options: What ``torch.onnx.export`` takes besides, ``dynamic_shapes`` among it.

    Raises:
        ExportError: It cannot be traced.
    """
    if not kwargs and args and isinstance(args[-1], dict):
        args = (*args, {})  # torch takes a dict that comes last for the keywords
    with (
        lowered(lowering_for(model, found, runtime)),
        kernels_as_operators(model),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # torch's own, about what it calls itself
        try:
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                custom_translation_table=translations(opset),
                **options,
            )
            if _is_draft(program) or (found and _has_lost_quantizers(program)):
                _run_for_export(model, args, kwargs, options["dynamic_shapes"])
            return program
        except (torch.onnx.OnnxExporterError, _NotRun) as error:
            raise ExportError(
                f"{type(model).__name__} cannot be traced for ONNX: {_innermost(error)}\n"
                f"{_of_steps(model, options['dynamic_shapes'])}Try "
                f"torch.onnx.export(model, ..., dynamo=True) on the float model first, which says more",
                runtime=runtime.name,
            ) from error


class _NotRun(Exception):
    """torch cannot run the model to trace it."""


def _is_draft(program: Any) -> bool:
    """Whether torch could not trace a model and made a draft: one branch of each ``if`` (torch 2.8)."""
    return "Draft" in (getattr(program, "_capture_strategy", None) or "")


def _has_lost_quantizers(program: Any) -> bool:
    """Whether torch, which could not run a model to trace it, compiled it: quantizers are not seen then."""
    kinds = {node.op_type for node in program.model.graph}
    return "Round" in kinds and "DequantizeLinear" not in kinds


def _run_for_export(model: nn.Module, args: Any, kwargs: Any, dynamic_shapes: Any) -> NoReturn:
    """Traces a model again by running it, for the reason why that failed.

    Raises:
        _NotRun: That is so.
    """

    def as_dimension(name: Any) -> Any:
        return torch.export.Dim.DYNAMIC if isinstance(name, str) else name

    try:
        shapes = pytree.tree_map(as_dimension, dynamic_shapes)
        torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _NotRun from error
    raise _NotRun("torch compiled the model, and quantizers are not seen then")


def _innermost(error: BaseException) -> str:
    """What went wrong in the first place, in a line: what torch raises from it is mostly about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    first, _, rest = str(error).strip().partition("\n")
    if first.endswith(":"):  # what follows is what it says
        first = f"{first} {rest.strip().partition(chr(10))[0]}"
    return f"{type(error).__name__}: {first}"


def _of_steps(model: nn.Module, dynamic_shapes: Any) -> str:
    """A line on recurrent layers that take no other number of steps, if shapes are to be dynamic."""
    names = written_out(model) if dynamic_shapes is not None else []
    if not names:
        return ""
    return (
        f"{', '.join(names)}: written out step by step, for as many steps as the arguments have; "
        f"dynamic_shapes may have the batch, but not the steps\n"
    )


# --- what quantizers compute through meanwhile: operators, of constants -------------------------


def lowering_for(model: nn.Module, found: list[ExportedQuantizer], runtime: Runtime) -> Lowering:
    """What a model's layers compute through while the exporter traces it: operators that it knows.

    Args:
        model: The model.
        found: Its quantizers.
        runtime: What will run the file.
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


def _zero_point(operand: ExportedQuantizer, *, as_uint8: bool) -> Tensor:
    element: Any = operand.element
    if isinstance(element, Float):
        kind = torch.float8_e4m3fn if element.mantissa_bits == 3 else torch.float8_e5m2
        return torch.zeros((), dtype=kind)
    if element.unsigned:
        return torch.tensor(operand.zero_point or 0, dtype=torch.uint8)
    return torch.tensor(128, dtype=torch.uint8) if as_uint8 else torch.zeros((), dtype=torch.int8)


def _activation(operand: ExportedQuantizer, runtime: Runtime) -> Callable[[Tensor], Tensor]:
    amax, axis = operand.amax, operand.axis
    assert amax is not None
    q = operand.quantizer.qparams
    scale = operand.joined(amax) / q.max()
    zero = _zero_point(operand, as_uint8=runtime.signed_as_uint8)
    bounds = None
    if operand.is_clipped or bool((scale == 0).any()):
        # The grid is smaller than what the type holds, down to nothing where the range is 0.
        bounds = (scale * q.min(), scale * q.max())
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


def _weight(operand: ExportedQuantizer, runtime: Runtime) -> Callable[[Tensor], Tensor]:
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
        codes = codes.to(_zero_point(operand, as_uint8=False).dtype)
    # Kernels that take 4 bits are of blocks; what is none of these is stored in 4 bits by the passes.
    held = element.onnx
    four_bits = bool(blocks) and held is not None and held.type.endswith("INT4")
    name = codes_name(operand.name, 0)
    if runtime.weight_pairs and not blocks:
        values = dequantize(codes, scale, dim, 0, "")
        zero = _zero_point(operand, as_uint8=False).expand(scale.shape).clone()

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
