"""A model traced by ``torch.export``, its quantizers as torch's operators for quantized values.

These are ``quantized_decomposed.quantize_per_tensor`` and its kin, which torch's compiler, ExecuTorch and
others know. Weights are constants: their integers, as ``numerics/fake_quant.py`` rounds them, and the
operator that makes floats of these (``dequantize_per_channel_group`` if they are in blocks).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from quantpatch.errors import ExportError
from quantpatch.export.prepare.exported import ExportedQuantizer
from quantpatch.layers.lowering import Lowering, lowered
from quantpatch.numerics.formats import Blocked, Integer
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.tracing import tracing

OPERATORS = torch.ops.quantized_decomposed
#: What the constants of a weight are called, after the name of its quantizer.
CODES, SCALE, ZERO_POINT = "codes", "scale", "zero_point"


def captured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    found: Sequence[ExportedQuantizer],
    *,
    dynamic_shapes: Any = None,
    as_uint8: bool = False,
) -> ExportedProgram:
    """A model as ``torch.export.export`` traces it.

    Args:
        model: The model, in eval mode.
        args: Its arguments.
        kwargs: Its keyword arguments.
        found: Its quantizers. Weights that have no operator become constants of floats.
        dynamic_shapes: As ``torch.export.export`` takes it.
        as_uint8: Whether signed activations are uint8 with zero point 128, the same values.

    Raises:
        ExportError: It cannot be traced.
    """
    constants: dict[str, Tensor] = {}
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for operand in found:
        if operand.weight is None:
            forwards[operand.quantizer] = activation(operand, as_uint8=as_uint8)
        elif why_no_operator(operand) is None:
            forwards[operand.quantizer] = _weight(operand, constants)
        else:
            forwards[operand.quantizer] = _float_weight(operand)
    with lowered(Lowering(forwards)), tracing(logging.CRITICAL), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own, about what it calls itself
        try:
            program = torch.export.export(
                model, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False
            )
        except Exception as error:
            raise ExportError(_refused(model, error)) from error
    _name_constants(program, constants)
    _drop_unused(program)
    return program


def _refused(model: nn.Module, error: BaseException) -> str:
    """What to say of a model that torch.export refuses: where, its own words, and what to write instead."""
    where, traceback = "", error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        running = traceback.tb_frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        # torch.export runs objects of its own that share their ``__dict__`` with the layers.
        if code.co_name == "forward" and issubclass(type(running), nn.Module):
            name = next((name for name, inner in model.named_modules() if vars(inner) is vars(running)), None)
            if name is not None:
                where = f" in {name or 'its own forward'} ({type(running).__name__})"
        traceback = traceback.tb_next
    words = str(error).strip() or type(error).__name__
    return (
        f"{type(model).__name__} cannot be traced by torch.export{where}: what a forward does may not depend "
        f"on the values of tensors (write torch.where or torch.cond for `if`), and it has to be PyTorch's "
        f"operations. torch.export.export(model, args, strict=False) says the same of the float model.\n"
        f"{type(error).__name__}: {words}"
    )


# --- what quantizers compute through -----------------------------------------------------------------------


def grid(operand: ExportedQuantizer, *, as_uint8: bool) -> tuple[Tensor, int, int, int, torch.dtype]:
    """Of an activation: its scale, its zero point, its smallest and largest integer, and their type."""
    element: Any = operand.element
    assert operand.amax is not None
    q = operand.quantizer.qparams
    scale = operand.joined(operand.amax).detach().float().cpu() / q.max()
    low, high, zero = int(element.min), int(element.max), 0
    if element.unsigned:
        return scale, operand.zero_point or 0, low, high, torch.uint8
    if as_uint8:
        low, high, zero = low + 128, high + 128, 128
    return scale, zero, low, high, torch.uint8 if as_uint8 else torch.int8


def activation(operand: ExportedQuantizer, *, as_uint8: bool) -> Callable[[Tensor], Tensor]:
    """What a quantizer of activations computes through."""
    scale, zero, low, high, kind = grid(operand, as_uint8=as_uint8)
    if operand.axis is None:
        # With a range of 0 there is but the one value.
        is_dead = not scale.item()
        step, low, high = (1.0, zero, zero) if is_dead else (scale.item(), low, high)

        def forward(x: Tensor) -> Tensor:
            y = x if x.dtype == torch.float32 else x.to(torch.float32)
            codes = OPERATORS.quantize_per_tensor.default(y, step, zero, low, high, kind)
            result: Tensor = OPERATORS.dequantize_per_tensor.default(codes, step, zero, low, high, kind)
            return result if x.dtype == torch.float32 else result.to(x.dtype)

        return forward
    dim = operand.axis
    alive = (scale != 0).flatten()
    scales = scale.flatten().masked_fill(~alive, 1.0)
    zeros = torch.full_like(scales, zero, dtype=torch.int64)
    has_dead = not bool(alive.all())

    def forward_channels(x: Tensor) -> Tensor:
        y = operand.joined(x.to(torch.float32))
        if has_dead:
            y = torch.where(alive.reshape([-1 if d == dim % y.dim() else 1 for d in range(y.dim())]), y, 0.0)
        codes = OPERATORS.quantize_per_channel.default(y, scales, zeros, dim % y.dim(), low, high, kind)
        result = OPERATORS.dequantize_per_channel.default(
            codes, scales, zeros, dim % y.dim(), low, high, kind
        )
        return operand.apart(result, x.shape).to(x.dtype)

    return forward_channels


def _weight(operand: ExportedQuantizer, constants: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """What a quantizer of a weight computes through: its integers, constants that are noted by name."""
    codes, scale = (operand.joined(tensor.detach()).cpu() for tensor in operand.codes())
    low, high = int(operand.element.min), int(operand.element.max)
    is_blocked, size = isinstance(operand.format, Blocked), codes.shape[-1]
    if is_blocked:
        assert operand.format.block_size is not None
        size = min(operand.format.block_size, size)
        scale = scale.expand(codes.shape[0], codes.shape[1] // size)  # one range may be given for all
        dim, alive = 0, (scale != 0).repeat_interleave(size, -1)
    else:
        dim = 0 if operand.axis is None else operand.axis % max(codes.dim(), 1)
        # One scale for all is as many that are equal: compilers know that of channels.
        scale = scale.flatten() if operand.axis is not None else scale.expand(codes.shape[dim])
        alive = (scale != 0).reshape([-1 if d == dim else 1 for d in range(codes.dim())])
    codes = codes.masked_fill(~alive, 0).contiguous()
    scale = scale.masked_fill(scale == 0, 1.0).float().contiguous()
    zeros = torch.zeros(scale.shape, dtype=torch.int64)
    constants |= {
        f"{operand.name}.{name}": x for name, x in [(CODES, codes), (SCALE, scale), (ZERO_POINT, zeros)]
    }
    kind = codes.dtype

    def forward(x: Tensor) -> Tensor:
        if is_blocked:
            result = OPERATORS.dequantize_per_channel_group.default(
                codes, scale, zeros, low, high, kind, size, torch.float32
            )
        else:
            result = OPERATORS.dequantize_per_channel.default(codes, scale, zeros, dim, low, high, kind)
        result = operand.apart(result, x.shape)
        return result if x.dtype == torch.float32 else result.to(x.dtype)

    return forward


def _float_weight(operand: ExportedQuantizer) -> Callable[[Tensor], Tensor]:
    """What the quantizer of a weight gives, as a constant."""
    assert operand.weight is not None
    with torch.no_grad():
        values = operand.quantizer(operand.weight).detach().clone()
    return lambda x: values


def why_no_operator(operand: ExportedQuantizer) -> str | None:
    """Why torch has no operator for the format of a quantizer, and what to change; None if it has one."""
    format = operand.format
    if isinstance(format, Blocked) and type(format.element) is Integer and operand.weight is not None:
        shape = operand.weight.shape
        if format.scale != "float32":
            return f"the scales of its format {format.name} are not float32; use int8, or int4_g128"
        if len(shape) != 2 or operand.axis not in (1, -1):
            return "its blocks are not along the rows of a matrix; use int8 or int4 with axis='channel'"
        if shape[1] > format.block_size and shape[1] % format.block_size:
            return (
                f"its rows of {shape[1]} are not a multiple of its blocks of {format.block_size}; use blocks "
                f"that divide them"
            )
        return None
    if isinstance(format, Blocked):
        return (
            f"its format {format.name} is in blocks, for which torch has an operator for weights of integers "
            f"only; use int8 or int4 with axis='channel'"
        )
    if type(format) is not Integer:
        return f"its format {format.name} is not one of the integers that torch's operators have; use int8"
    return None


# --- the program -------------------------------------------------------------------------------------------


def _name_constants(program: ExportedProgram, constants: Mapping[str, Tensor]) -> None:
    """The tensors of weights become buffers that are called after their quantizers."""
    names = {tensor.data_ptr(): name for name, tensor in constants.items()}
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.CONSTANT_TENSOR or spec.target is None:
            continue
        tensor = program.constants[spec.target]
        name = names.get(tensor.data_ptr()) if isinstance(tensor, Tensor) else None
        if name is None or name in program.state_dict:
            continue
        del program.constants[spec.target]
        program.state_dict[name] = tensor
        spec.kind, spec.target, spec.persistent = InputKind.BUFFER, name, True


def _drop_unused(program: ExportedProgram) -> None:
    """Takes out parameters and buffers that nothing uses: weights in float, what is made of them, ranges."""
    program.graph.eliminate_dead_code()
    specs = program.graph_signature.input_specs
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in list(specs):
        node = placeholders[spec.arg.name]
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or node.users:
            continue
        specs.remove(spec)
        program.graph.erase_node(node)
        if not any(other.target == spec.target for other in specs):
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)
    program.graph_module.recompile()
