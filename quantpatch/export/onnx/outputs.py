"""A file's outputs in the runtime that it is for, beside the model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from quantpatch.dataflow import MOVING_NODES
from quantpatch.errors import ExportError
from quantpatch.plugins.runtime import Runtime


def within_step(runtime: Runtime, path: Path, runs: Sequence[tuple[dict[str, Any], list[Tensor]]]) -> float:
    """The share of outputs within a step of the model's, in the runtime as it is opened by users.

    Args:
        runtime: The runtime.
        path: The file.
        runs: Inputs by name, and the outputs that the model gives of them.

    Raises:
        ExportError: The runtime cannot load or run the file.
    """
    count = within = 0
    expected = [[output.detach().cpu().double() for output in outputs] for _, outputs in runs]
    largest = [max(map(_largest, values)) / 127 for values in zip(*expected, strict=True)]
    steps = [1.001 * max(each) for each in zip(largest, steps_of_outputs(path), strict=True)]
    try:
        run = runtime.call("opens", path, None)
        results = [run(feed) for feed, _ in runs]
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"{runtime.name} cannot run the exported file: {type(error).__name__}: {error}",
            runtime=runtime.name,
        ) from error
    for outputs, others in zip(expected, results, strict=True):
        for ours, theirs, step in zip(outputs, others, steps, strict=True):
            theirs = torch.as_tensor(theirs).double()
            same = (ours == theirs) | (ours.isnan() & theirs.isnan())
            within += int((same | ((ours - theirs).abs() <= step)).sum())
            count += ours.numel()
    return within / count if count else 1.0


def _largest(x: Tensor) -> float:
    """The largest finite magnitude."""
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


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
