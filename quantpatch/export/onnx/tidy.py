"""Passes over the exported graph that every runtime shares.

Each looks only at what the exporter itself makes of quantized layers, and leaves alone what it does not know.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from quantpatch.export.onnx.fast_kernels import for_onnxruntime
from quantpatch.export.onnx.graph import attributes_of, constant, is_float8, maker, replaced, store_four_bits


def tidy(model: Any, runtime: str) -> None:
    """Stores 4-bit codes as such, writes the graph as the runtime is fast at, shares duplicates.

    Args:
        model: An ``onnx_ir.Model``; changed in place.
        runtime: As in ``export_onnx``.
    """
    shared = ir.passes.Sequential(
        common.ClearMetadataAndDocStringPass(),  # stack traces, with the paths of the machine that exports
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )
    store_four_bits(model.graph)
    shared(model)
    _quantize_once(model.graph)
    if runtime == "onnxruntime":
        _clip_apart_from_float8(model.graph)
        for_onnxruntime(model.graph, model.opset_imports[""])
    shared(model)


def _quantize_once(graph: Any) -> None:
    """Takes out a pair that follows one of the same scale and zero point: what comes is on its grid already.

    ``round((q * s) / s)`` is ``q`` for every integer of up to 8 bits: both roundings together are off by less
    than 2**-15.
    """
    integers = (ir.DataType.INT8, ir.DataType.UINT8)
    for second in list(graph):
        before = maker(second.inputs[0], "DequantizeLinear") if second.op_type == "QuantizeLinear" else None
        first = None if before is None else maker(before.inputs[0], "QuantizeLinear")
        if first is None or list(first.inputs[1:]) != list(second.inputs[1:]):
            continue
        zero = second.inputs[2]
        if zero is None or zero.dtype not in integers or attributes_of(first) != attributes_of(second):
            continue
        ir.convenience.replace_all_uses_with(second.outputs[0], first.outputs[0])
        graph.remove(second, safe=True)


def _clip_apart_from_float8(graph: Any) -> None:
    """Relu and Clip become Max and Min, the same values, in a graph that quantizes to FP8.

    ONNX Runtime's optimizations (1.32) take the zero point of FP8 for one of unsigned integers: they leave
    out a Relu before it, and fail at a Clip.
    """
    quantizing = (node for node in graph if node.op_type == "QuantizeLinear" and len(node.inputs) > 2)
    if not any(is_float8(node.inputs[2]) for node in quantizing):
        return
    for node in list(graph):
        if node.op_type == "Relu":
            kind = node.inputs[0].dtype
            bounds = [("Max", constant(graph, f"zero.{kind.name.lower()}", np.zeros((), kind.numpy())))]
        elif node.op_type == "Clip":
            bounds = [(n, v) for n, v in zip(("Max", "Min"), node.inputs[1:], strict=False) if v is not None]
        else:
            continue
        steps: list[Any] = []
        for kind_of_step, bound in bounds:
            x = steps[-1].outputs[0] if steps else node.inputs[0]
            steps.append(ir.node(kind_of_step, [x, bound]))
        if steps:
            replaced(graph, node, steps)
