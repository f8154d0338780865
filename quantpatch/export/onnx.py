"""``export_onnx``: a quantized model as an ONNX file of QuantizeLinear and DequantizeLinear pairs.

While ``torch.onnx.export`` traces the model, each of its quantizers computes through an operator that becomes
such a pair. Weights are constants of the trace: their codes (ONNX Runtime) or their quantized values with a
pair behind them (TensorRT), as ``quantpatch.fake_quant`` rounds them, so no other rounding has a say.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantpatch.errors import ExportError, MissingExtraError, UnknownNameError, warn_caller
from quantpatch.export.check import ExportReport, compare_with_torch
from quantpatch.export.description import active_plugins, describe_quantizers
from quantpatch.export.graph import tidy
from quantpatch.export.targets import TARGETS, Operand, Target, codes_name, operands, problems
from quantpatch.files import own_version, written_whole
from quantpatch.formats import Float, Integer
from quantpatch.running import demand_model, evaluating, uncompiled

__all__ = ["export_onnx"]

_OPSET = 21
_EXPORTING = threading.RLock()  # torch traces for one thread at a time, and fails in the others
_TALKATIVE = ("torch.onnx", "torch.export", "torch.fx.experimental", "onnxscript", "onnx_ir")
_LARGE = 2**31 - 2**27  # a protobuf file ends at 2 GiB


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    target: Target = "onnxruntime",
    dynamic_shapes: Any = None,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    opset: int = _OPSET,
    check: bool = True,
) -> ExportReport:
    """Writes a quantized model as an ONNX file that computes the same integers, and checks that it does.

    The model is exported in eval mode and is afterwards as it was. The file is written whole or not at all;
    from 2 GiB on its weights are in ``<path>.data`` beside it.

    Args:
        model: The model, its ranges known.
        args: Arguments to run it on: a tensor, or a tuple.
        path: Where to write.
        kwargs: Keyword arguments to run it on.
        target: What will run the file. ``"onnxruntime"``: weights are stored as integers, signed activations
            as uint8 with zero point 128, which are the same values. ``"tensorrt"``: signed INT8 with zero
            point 0, weights as floats with a pair behind them.
        dynamic_shapes: As ``torch.export.export`` takes it, such as ``({0: "batch"},)``.
        input_names: Names of the file's inputs.
        output_names: Names of the file's outputs.
        opset: Version of ONNX's operators, 19 or later; blocks need 21.
        check: Run ONNX Runtime on the arguments and on random ones, and compare: with its optimizations
            off, which computes what the file says, and for ``"onnxruntime"`` with them on as well.

    Returns:
        What was written, and how it compares.

    Raises:
        ExportError: The target cannot take some of the quantizers, the model cannot be traced, or the file
            does not run. Nothing was written.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    demand_model(model, "export_onnx")
    _demand_extra(check)
    path = Path(path)
    model = uncompiled(model)
    args, kwargs = _each_on_its_own(args if isinstance(args, tuple) else (args,), kwargs or {})
    with _EXPORTING, _quiet(), evaluating(model):
        # While another thread traces, its tensors stand in for the parameters of a model that both export.
        found = _checked_operands(model, target, opset)
        program = _traced(
            model, args, kwargs, found, target, opset, dynamic_shapes, input_names, output_names
        )
        names = [operand.name for operand in found]
        tidy(program.model, target)
        program.model.metadata_props.update(_metadata(model, target))
        nodes = Counter(node.op_type for node in program.model.graph)
        with written_whole(path) as folder:
            size = _write(program.model, folder / path.name)
            del program
            if size > _LARGE // 8:
                gc.collect()  # it refers to itself, and would keep its weights while the check needs more
            _check_file(folder / path.name)
            compared = None
            if check:
                compared = compare_with_torch(
                    model, args, kwargs, folder / path.name, found, optimized=target == "onnxruntime"
                )
            size = sum(file.stat().st_size for file in folder.iterdir())
    return ExportReport(path, target, opset, dict(nodes), size, tuple(names), compared)


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A block in which exporter and passes log errors alone, not what they skip, nor whole graphs."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(max(logger.level, logging.ERROR))
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _demand_extra(check: bool) -> None:
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        try:
            __import__(package)
        except ImportError:  # noqa: PERF203
            raise MissingExtraError.of("onnx", package, "qp.export_onnx") from None


def _newest_opset() -> int:
    import onnx

    newest: int = onnx.defs.onnx_opset_version()
    return newest


def _checked_operands(model: nn.Module, target: str, opset: int) -> list[Operand]:
    from quantpatch.export.recurrent import demand_operators

    if target not in TARGETS:
        raise UnknownNameError.of("target", target, TARGETS)
    newest = _newest_opset()
    if isinstance(opset, bool) or not isinstance(opset, int) or not 19 <= opset <= newest:
        raise ExportError(
            f"opset is a number from 19 to {newest} here, got {opset!r}; leave it out for {_OPSET}",
            target=target,
        )
    if isinstance(model, (nn.DataParallel, torch.jit.ScriptModule)):
        raise ExportError(
            f"a {type(model).__name__} cannot be traced; export the module inside it", target=target
        )
    demand_operators(model, target)
    found = operands(model)
    if not found:
        warn_caller(
            f"{type(model).__name__} holds no quantizer that is on, so the file will be float. Build the "
            f"model inside `with quantize_modules():`, or write qp.convert(model), and calibrate it"
        )
    refused = problems(found, target, opset)
    if refused:
        lines = "\n  ".join(f"{name}: {why}" for name, why in list(refused.items())[:12])
        more = f"\n  and {len(refused) - 12} more" if len(refused) > 12 else ""
        raise ExportError(
            f"{len(refused)} of {len(found)} quantizers cannot be exported for {target}:\n  {lines}{more}",
            quantizers=tuple(refused),
            target=target,
        )
    return found


# --- Tracing ----------------------------------------------------------------------------------------------


def _traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    found: list[Operand],
    target: str,
    opset: int,
    dynamic_shapes: Any,
    input_names: list[str] | None,
    output_names: list[str] | None,
) -> Any:
    from quantpatch.export.operators import translations
    from quantpatch.export.recurrent import recurrent_layers_traced

    if not kwargs and args and isinstance(args[-1], dict):
        args = (*args, {})  # torch takes a dict that comes last for the keywords
    with (
        _standing_in(found, target, opset),
        recurrent_layers_traced(model),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # torch's own, about what it calls itself
        try:
            return torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                custom_translation_table=translations(opset),
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(
                f"{type(model).__name__} cannot be traced for ONNX: {_innermost(error)}\n"
                f"{_of_steps(model, dynamic_shapes)}Try "
                f"torch.onnx.export(model, ..., dynamo=True) on the float model first, which says more",
                target=target,
            ) from error


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
    from quantpatch.export.recurrent import written_out

    names = written_out(model) if dynamic_shapes is not None else []
    if not names:
        return ""
    return (
        f"{', '.join(names)}: written out step by step, for as many steps as the arguments have; "
        f"dynamic_shapes may have the batch, but not the steps\n"
    )


@contextlib.contextmanager
def _standing_in(found: list[Operand], target: str, opset: int) -> Iterator[None]:
    """A block in which quantizers compute through operators that the exporter knows.

    Another thread that runs the model meanwhile gets the same values.
    """
    forwards = [(operand, _forward_of(operand, target, opset)) for operand in found]
    try:
        for operand, forward in forwards:
            operand.quantizer.__dict__["forward"] = forward
        yield
    finally:
        for operand in found:
            operand.quantizer.__dict__.pop("forward", None)


def _forward_of(operand: Operand, target: str, opset: int) -> Callable[..., Tensor]:
    return _activation(operand, target) if operand.weight is None else _weight(operand, target, opset)


def _zero_point(element: Any, *, as_uint8: bool) -> Tensor:
    if isinstance(element, Float):
        kind = torch.float8_e4m3fn if element.mantissa_bits == 3 else torch.float8_e5m2
        return torch.zeros((), dtype=kind)
    if element.unsigned:
        return torch.tensor(element.zero_point, dtype=torch.uint8)
    return torch.tensor(128, dtype=torch.uint8) if as_uint8 else torch.zeros((), dtype=torch.int8)


def _activation(operand: Operand, target: str) -> Callable[..., Tensor]:
    from quantpatch.export.operators import quantize_dequantize

    element, amax, axis = operand.element, operand.amax, operand.axis
    assert amax is not None
    scale = operand.joined(amax) / operand.format.max
    zero = _zero_point(element, as_uint8=target == "onnxruntime")
    bounds = None
    clipped = isinstance(element, Integer) and operand.format.max - operand.format.min < 255
    if clipped or bool((scale == 0).any()):
        # The grid is smaller than what the type holds, down to nothing where the range is 0.
        bounds = (scale * operand.format.min, scale * operand.format.max)
    # The quotient by 0 would be NaN; by anything else it is 0, since the value is.
    scale = scale.masked_fill(scale == 0, 1.0)
    flat = scale if axis is None else scale.flatten()
    zero = zero.clone() if axis is None else zero.expand(flat.shape).clone()
    calls = 0

    def forward(x: Tensor, *, batch_axis: int | None = 0) -> Tensor:
        nonlocal calls
        name = codes_name(operand.name, calls)
        calls += 1
        device = x.device
        y = operand.joined(x.float())
        if bounds is not None and axis is None:
            y = y.clamp(bounds[0].item(), bounds[1].item())
        elif bounds is not None:
            low, high = (bound.to(device) for bound in bounds)
            y = torch.minimum(torch.maximum(y, low), high)
        result: Tensor = quantize_dequantize(y, flat.to(device), zero.to(device), axis or 0, name)
        return operand.apart(result, x.shape).to(x.dtype)

    return forward


def _weight(operand: Operand, target: str, opset: int) -> Callable[..., Tensor]:
    from quantpatch.export.operators import dequantize, quantize_dequantize

    format, element, axis = operand.format, operand.element, operand.axis
    codes, scale = (operand.joined(tensor) for tensor in operand.codes())
    dim = 0 if axis is None else axis % codes.dim()
    blocks = format.block_size or 0
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
    # Before opset 21 there is no type of 4 bits; one of 8 holds the same integers.
    four_bits = isinstance(element, Integer) and element.bits <= 4 and opset >= 21
    name = codes_name(operand.name, 0)
    if target == "tensorrt" and not blocks:
        values = dequantize(codes, scale, dim, 0, "")
        zero = _zero_point(element, as_uint8=False).expand(scale.shape).clone()

        def forward(x: Tensor, *, batch_axis: int | None = 0) -> Tensor:
            device = x.device
            result: Tensor = quantize_dequantize(
                values.to(device), scale.to(device), zero.to(device), dim, name
            )
            return operand.apart(result, x.shape).to(x.dtype)

        return forward
    kind = "" if not four_bits else "uint4" if getattr(element, "unsigned", False) else "int4"

    def forward_codes(x: Tensor, *, batch_axis: int | None = 0) -> Tensor:
        device = x.device
        result: Tensor = dequantize(codes.to(device), scale.to(device), dim, blocks, kind)
        return operand.apart(result, x.shape).to(x.dtype)

    return forward_codes


def _without_dead(codes: Tensor, scale: Tensor, dim: int, blocks: int) -> Tensor:
    """Codes of 0 where the scale is 0, so that any scale gives 0."""
    dead = scale == 0
    if not bool(dead.any()):
        return codes
    if blocks:
        dead = dead.repeat_interleave(blocks, dim).narrow(dim, 0, codes.shape[dim])
    return codes.masked_fill(dead, 0)


# --- The file ---------------------------------------------------------------------------------------------


def _metadata(model: nn.Module, target: str) -> dict[str, str]:
    recipe = {
        name: described["descriptor"]
        for name, described in describe_quantizers(model).items()
        if not described["disabled"]
    }
    return {
        "quantpatch.version": own_version(),
        "quantpatch.target": target,
        "quantpatch.recipe": json.dumps(recipe),
        "quantpatch.plugins": json.dumps(active_plugins()),
    }


def _write(model: Any, path: Path) -> int:
    """Writes the file, its weights beside it if they are too large; returns their size, and frees them."""
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > _LARGE else None)
    for value in model.graph.initializers.values():
        value.const_value = None  # onnxscript's rules keep the last graph that they have seen
    return int(size)


def _check_file(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported file is not valid ONNX: {error}") from error
