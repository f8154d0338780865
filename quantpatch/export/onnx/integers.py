"""Integers are moved, not the floats that they stand for: what moves values stands between a pair.

An integer kernel of ONNX Runtime wants its operands dequantized right before it, and its result quantized
right behind it. What only moves values, or picks the largest, gives the same on integers as on floats.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from quantpatch.dataflow import MOVING_NODES
from quantpatch.export.onnx.graph import attributes_of, constant_of, is_float8, maker, replaced

# Of these the result is larger than what goes in, and so it is dearer to dequantize.
_GROWING = ("Expand", "Resize")
# What has an integer kernel, or is taken out if it comes after an integer.
_ON_INTEGERS = ("Add", "Concat", "Conv", "Gemm", "MatMul", "Mul", "QuantizeLinear")


def move_integers(graph: Any) -> None:
    """Quantizes before what moves values, and dequantizes behind it.

    Args:
        graph: An ``onnx_ir.Graph``; changed in place.
    """
    for node in reversed(list(graph)):
        if node.op_type == "QuantizeLinear":
            _quantize_before(graph, node)
    for node in list(graph):
        if _moves(node):
            _dequantize_behind(graph, node)


def _moves(node: Any) -> bool:
    """Whether a node gives nothing but values of its first input."""
    if node.op_type not in MOVING_NODES or node.domain:
        return False
    if node.op_type == "MaxPool" and any(output.uses() for output in node.outputs[1:]):
        return False  # where they were
    return node.op_type != "Resize" or bool(attributes_of(node).get("mode", "nearest") == "nearest")


def _quantize_before(graph: Any, node: Any) -> None:
    """A QuantizeLinear goes before the nodes that move what it takes, if nothing else takes it."""
    if len(node.inputs) < 3 or node.inputs[1].shape.rank() or is_float8(node.inputs[2]):
        return
    source = node.inputs[0]
    while (moved := source.producer()) is not None and _moves(moved) and len(moved.outputs) == 1:
        if len(source.uses()) > 1 or source.is_graph_output() or maker(moved.inputs[0], "DequantizeLinear"):
            return
        if (
            source.shape is None
            or moved.inputs[0].shape is None
            or constant_of(graph, moved.inputs[0]) is not None
        ):
            return
        before = ir.node("QuantizeLinear", [moved.inputs[0], *node.inputs[1:]], attributes_of(node))
        before.outputs[0].type, before.outputs[0].shape = node.outputs[0].type, moved.inputs[0].shape
        on_integers = ir.node(moved.op_type, [before.outputs[0], *moved.inputs[1:]], attributes_of(moved))
        graph.insert_before(moved, before)
        replaced(graph, node, [on_integers])
        graph.remove(moved, safe=True)
        node, source = before, before.inputs[0]


def _dequantize_behind(graph: Any, node: Any) -> None:
    """What is dequantized before a node that moves it is dequantized behind it."""
    made = maker(node.inputs[0], "DequantizeLinear")
    if made is None or len(made.inputs) < 3 or made.inputs[1].shape.rank():
        return
    if maker(made.inputs[0], "QuantizeLinear", *MOVING_NODES) is None or is_float8(made.inputs[2]):
        return
    uses = [use.node.op_type for output in node.outputs for use in output.uses()]
    if node.op_type in _GROWING and not any(kind in _ON_INTEGERS or kind in MOVING_NODES for kind in uses):
        return
    moved = ir.node(
        node.op_type, [made.inputs[0], *node.inputs[1:]], attributes_of(node), num_outputs=len(node.outputs)
    )
    graph.insert_before(node, moved)
    for old, new in zip(node.outputs, moved.outputs, strict=True):
        new.name, new.type, new.shape = f"{old.name}.codes", made.inputs[0].type, old.shape
        if not old.uses() and not old.is_graph_output():
            continue
        again = ir.node("DequantizeLinear", [new, *made.inputs[1:]])
        name = old.name
        old.name = f"{name}.moved"
        again.outputs[0].name, again.outputs[0].type, again.outputs[0].shape = name, old.type, old.shape
        graph.insert_before(node, again)
        ir.convenience.replace_all_uses_with(old, again.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
