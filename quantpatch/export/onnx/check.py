"""The export's check of its own work: the file in ONNX Runtime, beside the model in torch.

ONNX Runtime runs with its graph optimizations off, so that it computes what the file says. Outputs are
compared, and the integers that every quantizer gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantpatch.errors import ExportError
from quantpatch.export.onnx.comparison import Comparison, Latency
from quantpatch.export.onnx.latency import measure, padded, without_kernels
from quantpatch.export.onnx.outputs import within_step
from quantpatch.export.onnx.sessions import changed, session_options
from quantpatch.export.prepare.exported import ExportedQuantizer, codes_name
from quantpatch.layers.lowering import Lowering, lowered
from quantpatch.numerics.fake_quant import fake_quantize, quantize
from quantpatch.numerics.formats import Integer
from quantpatch.plugins.runtime import Kernels, Runtime, WrittenFile
from quantpatch.torch_tools.progress import Bar
from quantpatch.torch_tools.random_inputs import random_like


def compare_with_torch(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: Path,
    found: list[ExportedQuantizer],
    runtime: Runtime,
    *,
    float_path: Path | None = None,
    bar: Bar | None = None,
) -> Comparison:
    """Runs the file and the model on the same inputs: those given, and random ones like them.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        path: The file.
        found: The model's quantizers.
        runtime: What will run the file; if it can be opened, it is run there as well.
        float_path: The same file in float, to measure latency beside; None not to.
        bar: Shows what is being done.

    Raises:
        ExportError: ONNX Runtime, or what will run the file, cannot load or run it.
    """
    if any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in pytree.tree_leaves((args, kwargs))):
        return Comparison(not_run="ONNX Runtime's Python interface takes no bfloat16")
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        return Comparison(not_run="ONNX Runtime's CPU provider has no kernels of bfloat16")
    bar = bar or Bar()
    bar.step("running the file as it is written")
    totals, runs, not_random = _as_written(model, args, kwargs, path, found)
    largest, relative, integers, differing, mismatching = zip(*totals, strict=True)
    bar.step(f"running the file in {runtime.name}")
    opens = runtime.function("opens")
    within = None if opens is None else within_step(runtime, path, runs)
    feeds = [feed for feed, _ in runs]
    made = runtime.call("kernels", WrittenFile(path=path, feeds=feeds, found=found)) or Kernels()
    latency = None
    bar.step("measuring the file beside float")
    if float_path is not None and opens is not None:
        times = measure(opens, path, float_path, runs[0][0])
        left = made.on_floats
        latency = Latency(*times, left, without_kernels(left, found), padded(found))
    return Comparison(
        max(largest),
        max(relative),
        sum(integers),
        sum(differing),
        sum(mismatching),
        within_step=within,
        kernels=made.compared,
        kernels_within_step=made.within_step,
        on_integers=made.on_integers,
        unlike=made.unlike,
        not_random=not_random,
        latency=latency,
    )


def _as_written(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    path: Path,
    found: list[ExportedQuantizer],
) -> tuple[list[tuple[Any, ...]], list[tuple[dict[str, Any], list[Tensor]]], str]:
    """How the file compares with the optimizations off: numbers of each run, the runs, and why no more."""
    by_name = {operand.name: operand for operand in found if operand.weight is None}
    totals: list[tuple[Any, ...]] = []
    runs: list[tuple[dict[str, Any], list[Tensor]]] = []
    opened, input_names, output_names, sources = _with_codes_as_outputs(path)
    for given_args, given_kwargs in ((args, kwargs), random_like(args, kwargs)):
        try:
            outputs, codes = _torch_results(model, given_args, given_kwargs, by_name)
        except Exception as error:
            if not totals:
                raise
            # Some models take no inputs but such as belong together: offsets that rise, say.
            why = f"the model takes no others ({type(error).__name__}: {_first_line(error)})"
            return totals, runs, why
        feed = _feed(input_names, given_args, given_kwargs)
        try:
            results = opened.run(None, feed)
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot run the exported file: {error}") from error
        named = {**feed, **dict(zip(output_names, results, strict=True))}
        totals.append((*_differences(outputs, results), *_compared(codes, named, sources)))
        runs.append((feed, outputs))
    return totals, runs, ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _with_codes_as_outputs(path: Path) -> tuple[Any, list[str], list[str], dict[str, str]]:
    """A session of the file whose integers, and the floats that they are made of, are outputs as well."""
    proto = onnx.load(str(path), load_external_data=False)
    own = [output.name for output in proto.graph.output]
    inputs = [value.name for value in proto.graph.input]
    types = {value.name: value for value in proto.graph.value_info}
    constants = {tensor.name for tensor in proto.graph.initializer}
    sources = {
        node.output[0]: node.input[0]
        for node in proto.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    }
    sources = {name: source for name, source in sources.items() if name in types and _is_integer(types[name])}
    for name in dict.fromkeys((*sources, *sources.values())):
        if name in types and name not in own:
            proto.graph.output.append(types[name])
    names = [output.name for output in proto.graph.output]
    try:
        opened = changed(proto, path, session_options(optimized=False))
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot load the exported file: {error}") from error
    return opened, inputs, names, sources


def _is_integer(value: Any) -> bool:
    return value.type.tensor_type.elem_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


def _feed(names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    tensors = [x for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor)]
    if len(tensors) != len(names):
        raise ExportError(
            f"the file has the inputs {', '.join(names)}, and {len(tensors)} tensors were "
            f"given: one is not used by "
            f"the model. Leave it out, or pass check=False"
        )
    return {name: x.detach().cpu().numpy() for name, x in zip(names, tensors, strict=True)}


def _codes_of(operand: ExportedQuantizer, x: Tensor) -> Tensor:
    """The integers that a quantizer makes; that of 0 where its range is 0 and any integer means it."""
    amax = None if operand.amax is None else operand.amax.to(x.device)
    axis, zero_point = operand.quantizer.descriptor.kept_axes, operand.zero_point
    integers, scale = quantize(x, amax, operand.format, axis=axis, zero_point=zero_point)
    return integers.masked_fill(scale == 0, zero_point or 0).cpu().int()


def _torch_results(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    by_name: Mapping[str, ExportedQuantizer],
) -> tuple[list[Tensor], dict[str, tuple[ExportedQuantizer, Tensor]]]:
    """The model's outputs, and each call of each quantizer and its codes by their name in the file."""
    codes: dict[str, tuple[ExportedQuantizer, Tensor]] = {}

    def recording(operand: ExportedQuantizer) -> Callable[[Tensor], Tensor]:
        calls = 0
        axis = operand.quantizer.descriptor.kept_axes

        def forward(x: Tensor) -> Tensor:
            nonlocal calls
            amax = None if operand.amax is None else operand.amax.to(x.device)
            if isinstance(operand.element, Integer):
                codes[codes_name(operand.name, calls)] = (operand, _codes_of(operand, x))
            calls += 1
            return fake_quantize(x, amax, operand.format, axis=axis, zero_point=operand.zero_point)

        return forward

    forwards: dict[nn.Module, Any] = {operand.quantizer: recording(operand) for operand in by_name.values()}
    with lowered(Lowering(forwards)), torch.no_grad():
        outputs = model(*args, **kwargs)
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)], codes


def _differences(outputs: list[Tensor], results: list[Any]) -> tuple[float, float]:
    """The largest difference of the outputs, and that over the largest output."""
    largest = relative = 0.0
    for ours, theirs in zip(outputs, results, strict=False):  # the codes come after
        ours = ours.detach().cpu().double()
        theirs = torch.as_tensor(theirs).double()
        if ours.shape != theirs.shape:
            raise ExportError(
                f"an output has the shape {tuple(theirs.shape)} in ONNX Runtime and "
                f"{tuple(ours.shape)} in torch"
            )
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())  # infinities too
        difference = (ours - theirs).abs().masked_fill(same, 0.0)
        if difference.numel():
            largest = max(largest, difference.max().item())
            relative = max(relative, difference.max().item() / max(ours.abs().max().item(), 1e-30))
    return largest, relative


def _in_model(operand: ExportedQuantizer, values: Tensor, shape: torch.Size) -> Tensor:
    """What the file has of a tensor of this shape, laid out as the model has it."""
    laid_out = operand.apart(values, shape)
    return laid_out[tuple(slice(size) for size in shape)]  # the file may have further channels, of zeros


def _codes_in_file(operand: ExportedQuantizer, codes: Any) -> Tensor:
    """The integers of the file as the model has them: signed ones are stored 128 higher."""
    moved = codes.dtype.name == "uint8" and not getattr(operand.element, "unsigned", False)
    return torch.as_tensor(codes).int() - (128 if moved else 0)


def _compared(
    codes: Mapping[str, tuple[ExportedQuantizer, Tensor]],
    named: Mapping[str, Any],
    sources: Mapping[str, str],
) -> tuple[int, int, int]:
    """How many integers file and model have, how many differ, and how many from those of the same floats."""
    count = differing = mismatching = 0
    for name, (operand, expected) in codes.items():
        if name not in named:
            continue
        theirs = _in_model(operand, _codes_in_file(operand, named[name]), expected.shape)
        count += theirs.numel()
        differing += int((theirs != expected).sum())
        floats = named.get(sources.get(name, ""))
        if floats is not None:
            seen = _in_model(operand, torch.as_tensor(floats).float(), expected.shape)
            mismatching += int((theirs != _codes_of(operand, seen)).sum())
    return count, differing, mismatching
