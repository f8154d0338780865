"""``export_program``: a quantized model as a program of torch's, with its operators for quantized values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from quantpatch.errors import ExportError, listed
from quantpatch.export.prepare.exported import ExportedQuantizer, operands, reached, warn_if_float
from quantpatch.export.program.capture import captured, why_no_operator
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.forward import arguments, demand_model, evaluating, explaining, uncompiled


def export_program(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """A quantized model as a program of ``torch.export``, with torch's operators for quantized values.

    Activations pass ``quantized_decomposed.quantize_per_tensor`` and ``dequantize_per_tensor``
    (``_per_channel`` where a quantizer has several ranges), signed ones as int8 with zero point 0. Weights
    are constants, their integers as int8, behind ``dequantize_per_channel``, or behind
    ``dequantize_per_channel_group`` if they are in blocks: the form that torch's compiler, ExecuTorch and
    others take. torch's own operator multiplies by the inverse of the scale instead of
    dividing by it: of the values that lie halfway between two integers, some go to the other one.

    The model is exported in eval mode and is afterwards as it was.

    Args:
        model: The model, its ranges known.
        args: Arguments to run it on: a tensor, or a tuple.
        kwargs: Keyword arguments to run it on.
        dynamic_shapes: As ``torch.export.export`` takes it, such as ``({0: torch.export.Dim("batch")},)``.

    Returns:
        The program. The float weights, and ranges, are not in it; what is in it of a weight is called after
        its quantizer: ``"conv.weight_quantizer.codes"``, ``.scale`` and ``.zero_point``.

    Raises:
        ExportError: There is no operator for some of the quantizers, or the model cannot be traced.
    """
    demand_model(model, "export_program")
    model = uncompiled(model)
    args, kwargs = arguments(args, kwargs)
    with evaluating(model), explaining(model, (args, kwargs)):
        found = checked_operands(model, args, kwargs)
        return captured(model, args, kwargs, found, dynamic_shapes=dynamic_shapes)


def checked_operands(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, floats: bool = False
) -> list[ExportedQuantizer]:
    """The quantizers of a model that is to be exported.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        floats: Whether weights may be constants of floats, where there is no operator for their integers.

    Raises:
        ExportError: It cannot be traced at all, or there is no operator for some of them.
    """
    if isinstance(model, (nn.DataParallel, torch.jit.ScriptModule)):
        raise ExportError(f"a {type(model).__name__} cannot be traced; export the module inside it")
    found = reached(model, operands(model), args, kwargs)
    warn_if_float(model, found, "program")
    refused: dict[str, str] = {}
    for operand in found:
        why = operand.why_not_constant()
        if why is None and not (floats and operand.weight is not None):
            why = why_no_operator(operand)
        if why is not None:
            refused[operand.name] = why
    if refused:
        lines = listed((f"{name}: {why}" for name, why in refused.items()), 12, "\n  ")
        raise ExportError(
            f"{len(refused)} of {len(found)} quantizers cannot be exported as torch's operators:\n  {lines}",
            quantizers=tuple(refused),
        )
    return found
