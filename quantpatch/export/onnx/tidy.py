"""Passes over the exported graph that every runtime shares.

Each looks only at what the exporter itself makes of quantized layers, and leaves alone what it does not know.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from quantpatch.export.onnx.graph import attributes_of, maker, store_four_bits
from quantpatch.plugins.runtime import Runtime


def tidy(model: Any, runtime: Runtime) -> None:
    """Stores 4-bit codes as such, writes the graph as the runtime is fast at, shares duplicates.

    Args:
        model: An ``onnx_ir.Model``; changed in place.
        runtime: What will run the file.
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
    runtime.call("passes", model)
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
