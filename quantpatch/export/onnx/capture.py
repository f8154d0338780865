"""A model traced by ``torch.onnx.export``, its quantizers as operators that become pairs of ONNX's."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch
from torch.utils import _pytree as pytree

from quantpatch.errors import ExportError
from quantpatch.export.onnx.lowered_quantizers import lowering_for
from quantpatch.export.onnx.operators import translations
from quantpatch.export.onnx.recurrent_operators import kernels_as_operators, written_out
from quantpatch.export.prepare.runtimes import ExportedQuantizer
from quantpatch.layers.lowering import lowered
from quantpatch.torch_tools import nn


def captured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    found: list[ExportedQuantizer],
    runtime: str,
    opset: int,
    **options: Any,
) -> Any:
    """A model as ``torch.onnx.export`` traces it, an ``ONNXProgram``.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        found: Its quantizers, which compute through operators that the exporter knows.
        runtime: As in ``export_onnx``.
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
                runtime=runtime,
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
