"""``export_onnx``: a quantized model as an ONNX file of QuantizeLinear and DequantizeLinear pairs.

While ``torch.onnx.export`` traces the model, each of its quantizers computes through an operator that becomes
such a pair. Weights are constants of the trace: their codes (ONNX Runtime) or their quantized values with a
pair behind them (TensorRT), as ``numerics/fake_quant.py`` rounds them, so no other rounding has a say.
"""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quantpatch.errors import ExportError, MissingExtraError, listed, warn_caller
from quantpatch.export.checkpoint.description import describe
from quantpatch.export.onnx.comparison import ExportReport
from quantpatch.export.onnx.limits import problems
from quantpatch.export.prepare.exported import ExportedQuantizer, operands, reached, warn_if_float
from quantpatch.plugins.registry import registry
from quantpatch.plugins.runtime import Runtime
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.atomic_files import written_whole
from quantpatch.torch_tools.forward import arguments, demand_model, evaluating, uncompiled
from quantpatch.torch_tools.progress import progress_bar
from quantpatch.torch_tools.tracing import tracing

_OPSET = 21
_OPSET_OF_BFLOAT16 = 22  # before, some operators have no such type, convolutions among them
_LARGE = 2**31 - 2**27  # a protobuf file ends at 2 GiB


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    runtime: str = "onnxruntime",
    dynamic_shapes: Any = None,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    opset: int | None = None,
    check: bool = True,
    latency: bool = True,
    progress: bool = True,
) -> ExportReport:
    """Writes a quantized model as an ONNX file that computes the same integers, and checks that it does.

    The model is exported in eval mode and is afterwards as it was. The file is written whole or not at all;
    from 2 GiB on its weights are in ``<path>.data`` beside it.

    Args:
        model: The model, its ranges known.
        args: Arguments to run it on: a tensor, or a tuple.
        path: Where to write.
        kwargs: Keyword arguments to run it on.
        runtime: What will run the file. ``"onnxruntime"``: weights are stored as integers, signed activations
            as uint8 with zero point 128, which are the same values. ``"tensorrt"``: signed INT8 with zero
            point 0, weights as floats with a pair behind them. ``"openvino"``: signed INT8, weights stored as
            integers. Or the name of a plugin's.
        dynamic_shapes: As ``torch.export.export`` takes it, such as ``({0: "batch"},)``.
        input_names: Names of the file's inputs.
        output_names: Names of the file's outputs.
        opset: Version of ONNX's operators, 19 or later; blocks need 21, convolutions of bfloat16 22. By
            default 21, and 22 for a model with bfloat16. ONNX Runtime runs the convolutions of such a file on
            integers from its version 1.23 on; for older ones write 19 or 20: biases are rounded to integers
            then, as newer ones do themselves, and codes of 4 bits are stored in 8.
        check: Run ONNX Runtime on the arguments and on random ones, and compare: with its optimizations
            off, which computes what the file says. For ``"onnxruntime"`` it runs with them on as well, and
            for ``"openvino"`` OpenVINO does.
        latency: With the check, measure how long the file takes beside the same file in float, for half a
            second or so: it is in the report, and a warning if the file is slower. Only where the check runs
            the file in its runtime, and for weights of up to 512 MiB.
        progress: Whether to show what is being done (on a terminal or in a notebook only).

    Returns:
        What was written, and how it compares.

    Raises:
        ExportError: The runtime cannot take some of the quantizers, the model cannot be traced, or the file
            does not run. Nothing was written.
        MissingExtraError: onnx, onnxscript or onnxruntime, or with the check openvino, is not installed.
        UnknownNameError: There is no such runtime.

    Warns:
        QuantPatchWarning: The file is slower than it would be in float, with the layers that make it so.
    """
    demand_model(model, "export_onnx")
    _demand_extra(check)
    # They import what the extra brings.
    from quantpatch.export.onnx.capture import captured
    from quantpatch.export.onnx.tidy import tidy

    path = Path(path)
    model = uncompiled(model)
    has_bfloat16 = _has_bfloat16(model, args, kwargs)
    opset = opset if opset is not None else _OPSET_OF_BFLOAT16 if has_bfloat16 else _OPSET
    args, kwargs = _each_on_its_own(*arguments(args, kwargs))
    steps = 6 if check else 3
    with tracing(), evaluating(model), progress_bar(path.name, steps, progress=progress) as bar:
        target = registry.runtime(runtime)
        if target.file != "onnx":
            raise ExportError(f"{runtime} runs no ONNX files: write qp.lower(model, args)", runtime=runtime)
        if check:
            target.function("opens")  # what it needs may not be installed
        found, unreached = _checked_operands(model, args, kwargs, target, opset)
        bar.step(f"tracing {type(model).__name__}")
        named = {"input_names": input_names, "output_names": output_names}
        program = captured(model, args, kwargs, found, target, opset, dynamic_shapes=dynamic_shapes, **named)
        names = [operand.name for operand in found]
        program.model.ir_version = _ir_version(opset)
        with written_whole(path, companion=f"{path.name}.data") as folder:
            beside = None
            is_measured = latency and check and found and target.opens is not None and not has_bfloat16
            if is_measured and _weight_bytes(program.model) <= _LARGE // 4:
                from quantpatch.export.onnx.latency import float_twin

                beside = folder / f"{path.name}.float"
                _write(float_twin(program.model, found), beside)
            bar.step("rewriting the graph")
            tidy(program.model, target)
            program.model.metadata_props.update(_metadata(model, target))
            nodes = Counter(node.op_type for node in program.model.graph)
            size = _write(program.model, folder / path.name)
            del program
            if size > _LARGE // 8:
                gc.collect()  # it refers to itself, and would keep its weights while the check needs more
            bar.step("checking the file")
            _check_file(folder / path.name, has_bfloat16 and opset < _OPSET_OF_BFLOAT16)
            compared = None
            if check:
                from quantpatch.export.onnx.check import compare_with_torch

                file = folder / path.name
                compared = compare_with_torch(
                    model, args, kwargs, file, found, target, float_path=beside, bar=bar
                )
            if beside is not None:
                beside.unlink()
            size = sum(file.stat().st_size for file in folder.iterdir())
    measured = None if compared is None else compared.latency
    if measured is not None and measured.is_slower:
        warn_caller(measured.advice(path.name))
    return ExportReport(path, runtime, opset, dict(nodes), size, tuple(names), unreached, compared)


def _each_on_its_own(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with a copy of what is given again.

    Models ask whether two arguments are one tensor, as attention does, and the file would be of that case
    alone.
    """
    seen: set[int] = set()

    def own(x: Any) -> Any:
        if isinstance(x, Tensor) and id(x) in seen:
            return x.clone()
        seen.add(id(x))
        return x

    made: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(own, (args, dict(kwargs)))
    return made


def _demand_extra(check: bool) -> None:
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        try:
            __import__(package)
        except ImportError:  # noqa: PERF203
            raise MissingExtraError.of("onnx", package, "qp.export_onnx") from None


def _has_bfloat16(model: nn.Module, args: Any, kwargs: Any) -> bool:
    tensors = (*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs)))
    return any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in tensors)


def _ir_version(opset: int) -> int:
    """The version of the file's format that came with an opset: a runtime that knows one takes the other."""
    import onnx

    version: int = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return version


def _checked_operands(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], runtime: Runtime, opset: int
) -> tuple[list[ExportedQuantizer], tuple[str, ...]]:
    """The quantizers that go into the file, and the names of those that the run does not reach."""
    import onnx

    from quantpatch.export.onnx.recurrent_operators import demand_operators

    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not 19 <= opset <= newest:
        raise ExportError(
            f"opset is a number from 19 to {newest} here, got {opset!r}; leave it out for {_OPSET}",
            runtime=runtime.name,
        )
    if isinstance(model, (nn.DataParallel, torch.jit.ScriptModule)):
        raise ExportError(
            f"a {type(model).__name__} cannot be traced; export the module inside it", runtime=runtime.name
        )
    demand_operators(model, runtime.name)
    every = operands(model)
    found = reached(model, every, args, kwargs)
    warn_if_float(model, found, "file")
    refused = problems(found, runtime, opset)
    if refused:
        lines = listed((f"{name}: {why}" for name, why in refused.items()), 12, "\n  ")
        raise ExportError(
            f"{len(refused)} of {len(found)} quantizers cannot be exported for {runtime.name}:\n  {lines}",
            quantizers=tuple(refused),
            runtime=runtime.name,
        )
    names = {operand.name for operand in found}
    return found, tuple(operand.name for operand in every if operand.name not in names)


# --- The file ---------------------------------------------------------------------------------------------


def _metadata(model: nn.Module, runtime: Runtime) -> dict[str, str]:
    description = describe(model)
    recipe = {
        name: described["descriptor"]
        for name, described in description["quantizers"].items()
        if not described["disabled"]
    }
    return {
        "quantpatch.version": description["quantpatch"],
        "quantpatch.runtime": runtime.name,
        "quantpatch.recipe": json.dumps(recipe),
        "quantpatch.plugins": json.dumps(description["plugins"]),
    }


def _write(model: Any, path: Path) -> int:
    """Writes the file, its weights beside it if they are too large; returns their size, and frees them."""
    import onnx_ir as ir

    size = _weight_bytes(model)
    ir.save(model, path, external_data=f"{path.name}.data" if size > _LARGE else None)
    for value in model.graph.initializers.values():
        value.const_value = None  # onnxscript's rules keep the last graph that they have seen
    return size


def _weight_bytes(model: Any) -> int:
    values = model.graph.initializers.values()
    return int(sum(value.const_value.nbytes for value in values if value.const_value is not None))


def _check_file(path: Path, too_old: bool) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        advice = (
            f". The model has bfloat16, which convolutions and others take from opset {_OPSET_OF_BFLOAT16} "
            f"on: leave opset out, or write opset={_OPSET_OF_BFLOAT16}"
        )
        raise ExportError(
            f"the exported file is not valid ONNX: {error}{advice if too_old else ''}"
        ) from error
