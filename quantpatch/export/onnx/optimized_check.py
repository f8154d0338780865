"""The file in ONNX Runtime with its optimizations on: outputs, each kernel alone, and what runs on floats."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from quantpatch.dataflow import MOVING_NODES
from quantpatch.errors import ExportError
from quantpatch.export.onnx.kernel_check import KernelCheck, check_kernels
from quantpatch.export.onnx.latency import on_floats
from quantpatch.export.onnx.sessions import session, session_options
from quantpatch.export.prepare.exported import ExportedQuantizer


def _largest(x: Tensor) -> float:
    """The largest finite magnitude."""
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def check_optimized(
    path: Path, runs: list[tuple[dict[str, Any], list[Tensor]]], found: list[ExportedQuantizer]
) -> tuple[float, KernelCheck, tuple[str, ...]]:
    """What comes of ONNX Runtime's optimizations.

    Args:
        path: The file.
        runs: Inputs by name, and the outputs that the model gives of them.
        found: The model's quantizers.

    Returns:
        The share of outputs within a step of the model's, the kernels, and the layers that run on floats.
    """
    graph = path.with_name(f"{path.name}.optimized")
    try:
        within = _within_step(path, runs, graph)
        kernels = check_kernels(path, graph, [feed for feed, _ in runs])
        file, optimized = (onnx.load(str(each), load_external_data=False) for each in (path, graph))
        return within, kernels, on_floats(file, optimized, found)
    finally:
        for written in graph.parent.glob(f"{glob.escape(graph.name)}*"):
            written.unlink()


def _within_step(path: Path, runs: list[tuple[dict[str, Any], list[Tensor]]], graph: Path) -> float:
    """The share of outputs within a step; ``graph`` is where ONNX Runtime leaves what it made of the file."""
    options = session_options(optimized=True, written_to=graph)
    count = within = 0
    expected = [[output.detach().cpu().double() for output in outputs] for _, outputs in runs]
    largest = [max(map(_largest, values)) / 127 for values in zip(*expected, strict=True)]
    steps = [1.001 * max(each) for each in zip(largest, steps_of_outputs(path), strict=True)]
    try:
        opened = session(path, options)
        for (feed, _), outputs in zip(runs, expected, strict=True):
            for ours, theirs, step in zip(outputs, opened.run(None, feed), steps, strict=True):
                theirs = torch.as_tensor(theirs).double()
                same = (ours == theirs) | (ours.isnan() & theirs.isnan())
                within += int((same | ((ours - theirs).abs() <= step)).sum())
                count += ours.numel()
    except Exception as error:
        raise ExportError(_not_optimized(error)) from error
    return within / count if count else 1.0


def _not_optimized(error: Exception) -> str:
    said = f"ONNX Runtime {onnxruntime.__version__} cannot run the exported file with optimizations: {error}"
    if "float8" not in str(error):
        return said
    return (
        f"{said}\nThe optimizations of ONNX Runtime before 1.32 move FP8 into operators that do not take it. "
        f"Upgrade it, use an int8 recipe, or pass check=False and run the file with its optimizations off"
    )


def steps_of_outputs(path: Path) -> list[float]:
    """The step of each output that comes out of a quantizer of its own; 0 of the others."""
    graph = onnx.load(str(path), load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in graph.initializer}

    def step(name: str) -> float:
        node = makers.get(name)
        while node is not None and node.op_type in MOVING_NODES:
            node = makers.get(node.input[0])
        scale = None if node is None or node.op_type != "DequantizeLinear" else tensors.get(node.input[1])
        return 0.0 if scale is None else float(onnx.numpy_helper.to_array(scale).max())

    return [step(output.name) for output in graph.output]
