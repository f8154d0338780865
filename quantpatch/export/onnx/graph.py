"""Passes over the exported graph that every target shares, and what passes are made of.

Each looks only at what the exporter itself makes of quantized layers, and leaves alone what it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantpatch.dataflow import PASSED_NODES

__all__ = [
    "attributes_of",
    "constant",
    "constant_of",
    "is_float8",
    "maker",
    "quantizers_behind",
    "replaced",
    "store_four_bits",
    "tidy",
]


def tidy(model: Any, target: str) -> None:
    """Stores 4-bit codes as such, writes the graph as the target is fast, and shares what is there twice.

    Args:
        model: An ``onnx_ir.Model``; changed in place.
        target: As in ``export_onnx``.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    from quantpatch.export.onnx.fast_kernels import for_onnxruntime

    shared = ir.passes.Sequential(
        common.ClearMetadataAndDocStringPass(),  # stack traces, with the paths of whoever exports
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )
    store_four_bits(model.graph)
    shared(model)
    _quantize_once(model.graph)
    if target == "onnxruntime":
        _clip_apart_from_float8(model.graph)
        for_onnxruntime(model.graph, model.opset_imports[""])
    shared(model)


# --- What passes are made of --------------------------------------------------------------------------------


def constant(graph: Any, name: str, array: Any, kind: Any = None) -> Any:
    """An initializer of a name; the one that is there already if there is one."""
    import onnx_ir as ir

    known = graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.Tensor(array, dtype=kind, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def constant_of(graph: Any, value: Any) -> Any:
    """The tensor that a value is a constant of; None if it is computed."""
    return value.const_value if value is not None and value.name in graph.initializers else None


def maker(value: Any, *kinds: str) -> Any:
    """The node that a value comes from if it is of one of these kinds, else None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in kinds else None


def is_float8(value: Any) -> bool:
    """Whether a value is of FP8."""
    import onnx_ir as ir

    return value is not None and value.dtype in (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)


def quantizers_behind(value: Any) -> tuple[list[Any], bool]:
    """The QuantizeLinears that a value goes into, an activation at most before; and whether that is all."""
    found, is_all = [], not value.is_graph_output() and bool(value.uses())
    for use in value.uses():
        if use.node.op_type == "QuantizeLinear":
            found.append(use.node)
        elif use.node.op_type in PASSED_NODES and use.idx == 0:
            more, only = quantizers_behind(use.node.outputs[0])
            found += more
            is_all = is_all and only
        else:
            is_all = False
    return found, is_all


def attributes_of(node: Any) -> dict[str, Any]:
    """A node's attributes by name: numbers, tuples and strings."""
    return {key: attribute.value for key, attribute in node.attributes.items()}


def replaced(graph: Any, node: Any, steps: Sequence[Any]) -> None:
    """Puts nodes in the place of one; the last one's output takes its output's name, type and shape."""
    import onnx_ir as ir

    old, new = node.outputs[0], steps[-1].outputs[0]
    name = old.name
    for step in steps[:-1]:
        step.outputs[0].name = step.outputs[0].name or f"{name}.{step.op_type.lower()}"
        step.outputs[0].type = step.outputs[0].type or old.type
    old.name = f"{name}.{node.op_type.lower()}"
    new.name, new.type, new.shape = name, old.type, old.shape
    graph.insert_before(node, steps)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


# --- Passes -------------------------------------------------------------------------------------------------


def store_four_bits(graph: Any) -> None:
    """Casts of constants to 4 bits, which torch has no type for, become constants of 4 bits."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Cast" or constant_of(graph, node.inputs[0]) is None:
            continue
        kind = ir.DataType(node.attributes["to"].as_int())
        if kind not in (ir.DataType.INT4, ir.DataType.UINT4):
            continue
        source = node.inputs[0]
        codes = source.const_value.numpy().astype(kind.numpy())
        new = constant(graph, f"{source.name}.{kind.name.lower()}", codes, kind)
        ir.convenience.replace_all_uses_with(node.outputs[0], new)
        graph.remove(node, safe=True)


def _quantize_once(graph: Any) -> None:
    """Takes out a pair that follows one of the same scale and zero point: what comes is on its grid already.

    ``round((q * s) / s)`` is ``q`` for every integer of up to 8 bits: both roundings together are off by less
    than 2**-15.
    """
    import onnx_ir as ir

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
    import numpy as np
    import onnx_ir as ir

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
