"""The graph as ONNX Runtime's CPU provider runs it fast: other ways to write the same values.

Nothing here changes what is computed: with its optimizations off ONNX Runtime gives the same results, up to
the order in which sums of products are rounded. ``benchmarks/export.py`` measures what it gains.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from quantpatch.dataflow import MOVING_NODES
from quantpatch.export.onnx.convolutions import convolutions_for_onnxruntime
from quantpatch.export.onnx.graph import attributes_of, constant, constant_of, is_float8, maker, replaced
from quantpatch.export.onnx.weights import biases_as_integers, pack_four_bits, weights_for_onnxruntime

# The first opset with a type of 4 bits.
_PACKS = 21


def for_onnxruntime(model: Any) -> None:
    """Runs the passes below.

    With operators of an opset below 21 the file is written for runtimes before 1.23: they run convolutions on
    integers only if biases are integers, and cast no 4 bits.

    Args:
        model: An ``onnx_ir.Model``, tidied; changed in place.
    """
    graph = model.graph
    _clip_apart_from_float8(graph)
    split_constants(model)
    _turn_weights(graph)
    _move_integers(graph)
    _subtract_biases(graph)
    _keep_norms_apart(graph)
    convolutions_for_onnxruntime(graph)
    weights_for_onnxruntime(graph)
    if model.opset_imports[""] < _PACKS:
        biases_as_integers(graph)
    else:
        pack_four_bits(graph)


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


# --- Matrix products ----------------------------------------------------------------------------------------


def split_constants(model: Any) -> None:
    """Parts of a weight or a bias, as attention has of its projections, become weights and biases themselves.

    ONNX Runtime would split the floats when it loads the file, see float weights beside quantized inputs, and
    quantize them again with scales of its own. OpenVINO loses their names.

    Args:
        model: An ``onnx_ir.Model``; changed in place.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Split" or any(output.is_graph_output() for output in node.outputs):
            continue
        axis = attributes_of(node).get("axis", 0) % len(node.inputs[0].shape)
        sizes = [output.shape[axis] for output in node.outputs]
        made = maker(node.inputs[0], "DequantizeLinear")
        given = [node.inputs[0]] if made is None else list(made.inputs)
        if not all(isinstance(size, int) for size in sizes) or any(
            constant_of(graph, v) is None for v in given
        ):
            continue
        ends = [int(end) for end in np.cumsum(sizes)]
        for start, end, output in zip([0, *ends[:-1]], ends, node.outputs, strict=True):
            parts = [_part(graph, value, axis, start, end, made) for value in given]
            new = parts[0]
            if made is not None:
                dequantized = ir.node("DequantizeLinear", parts, attributes_of(made))
                new = dequantized.outputs[0]
                new.name, new.type, new.shape = f"{output.name}.part", output.type, output.shape
                graph.insert_before(node, dequantized)
            ir.convenience.replace_all_uses_with(output, new)
        graph.remove(node, safe=True)


def _part(graph: Any, value: Any, axis: int, start: int, end: int, dequantized: Any) -> Any:
    """A part of a constant: of data, or of the scales of data that is cut along ``axis``."""
    array = value.const_value.numpy()
    is_scale = dequantized is not None and value is not dequantized.inputs[0]
    if is_scale and array.ndim < 2:
        along = attributes_of(dequantized).get("axis", 1) % len(dequantized.inputs[0].shape)
        if not array.ndim or along != axis:
            return value
        axis = 0
    cut = array[(slice(None),) * axis + (slice(start, end),)].copy()
    return constant(graph, f"{value.name}.{axis}.{start}.{end}", cut, value.const_value.dtype)


def _turn_weights(graph: Any) -> None:
    """Weights of linear layers become (in, out) constants of a MatMul.

    torch keeps them (out, in). ONNX Runtime has integer kernels for MatMul with a constant of its own
    layout, also where the scales are per channel.
    """
    for node in list(graph):
        if node.op_type == "Transpose":
            turned = _turned(graph, node.inputs[0])
            if turned is not None and attributes_of(node).get("perm", (1, 0)) == (1, 0):
                ir.convenience.replace_all_uses_with(node.outputs[0], turned)
                graph.remove(node, safe=True)
        elif node.op_type == "Gemm":
            weight = _weight_of_linear(graph, node)
            if weight is None:
                continue
            steps = [ir.node("MatMul", [node.inputs[0], weight])]
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                steps.append(ir.node("Add", [steps[-1].outputs[0], node.inputs[2]]))
            replaced(graph, node, steps)


def _weight_of_linear(graph: Any, gemm: Any) -> Any:
    """The quantized weight of a Gemm that is a plain ``x @ w + b``, laid out (in, out); else None."""
    how = attributes_of(gemm)
    if (how.get("alpha", 1.0), how.get("beta", 1.0), how.get("transA", 0)) != (1.0, 1.0, 0):
        return None
    if how.get("transB", 0):
        return _turned(graph, gemm.inputs[1])
    made = maker(gemm.inputs[1], "DequantizeLinear")
    return gemm.inputs[1] if made is not None and constant_of(graph, made.inputs[0]) is not None else None


def _turned(graph: Any, value: Any) -> Any:
    """The transpose of a matrix that is dequantized from a constant; None if it is not one."""
    node = maker(value, "DequantizeLinear")
    if node is None or len([i for i in node.inputs if i is not None]) != 2:
        return None
    codes, scale = node.inputs
    if constant_of(graph, codes) is None or constant_of(graph, scale) is None or len(codes.shape) != 2:
        return None
    attributes = attributes_of(node)
    array = codes.const_value.numpy().T.copy()
    new_codes = constant(graph, f"{codes.name}.T", array, codes.const_value.dtype)
    new_scale = scale
    if len(scale.shape) == 2:
        array = scale.const_value.numpy().T.copy()
        new_scale = constant(graph, f"{scale.name}.T", array, scale.const_value.dtype)
    if "axis" in attributes:
        attributes["axis"] = 1 - attributes["axis"] % 2
    new = ir.node("DequantizeLinear", [new_codes, new_scale], attributes)
    new.outputs[0].name = f"{value.name}.T"
    new.outputs[0].type = value.type
    new.outputs[0].shape = ir.Shape([codes.shape[1], codes.shape[0]])
    graph.insert_before(node, new)
    return new.outputs[0]


def _subtract_biases(graph: Any) -> None:
    """After a product with quantized weights a bias is subtracted, negated: the same sum, bit for bit.

    Of a MatMul and an Add ONNX Runtime makes a Gemm, and its integer kernel for that takes only a bias that
    is rounded to integers.
    """
    for node in list(graph):
        if node.op_type != "Add":
            continue
        product, bias = node.inputs
        if constant_of(graph, product) is not None:
            product, bias = bias, product
        if constant_of(graph, bias) is None or not _is_product(product):
            continue
        negated = constant(graph, f"{bias.name}.negated", -bias.const_value.numpy(), bias.const_value.dtype)
        replaced(graph, node, [ir.node("Sub", [product, negated])])


def _is_product(value: Any) -> bool:
    """Whether a value is a MatMul of two dequantized operands."""
    node = maker(value, "MatMul")
    return node is not None and all(maker(operand, "DequantizeLinear") for operand in node.inputs)


def _keep_norms_apart(graph: Any) -> None:
    """A residual addition before a LayerNormalization is written as a subtraction of the negated branch.

    Of an Add and a LayerNormalization ONNX Runtime makes a SkipLayerNormalization, which takes several
    times as long as the two. ``r + (p - n)`` is ``r - (n - p)``, bit for bit.
    """
    for node in list(graph):
        uses = node.outputs[0].uses() if node.op_type == "Add" else ()
        if not any(use.node.op_type == "LayerNormalization" for use in uses):
            continue
        for branch, other in (node.inputs, reversed(node.inputs)):
            steps = _negated(branch)
            if steps:
                steps.append(ir.node("Sub", [other, steps[-1].outputs[0]]))
                replaced(graph, node, steps)
                break


def _negated(value: Any) -> list[Any]:
    """Nodes that give the negated value, of a difference that nothing else uses; through one Reshape."""
    if value is None or len(value.uses()) != 1:
        return []
    reshape = maker(value, "Reshape")
    if reshape is not None:
        inner = _negated(reshape.inputs[0])
        if not inner:
            return []
        attributes = attributes_of(reshape)
        return [*inner, ir.node("Reshape", [inner[-1].outputs[0], reshape.inputs[1]], attributes)]
    difference = maker(value, "Sub")
    return [] if difference is None else [ir.node("Sub", [difference.inputs[1], difference.inputs[0]])]


# --- What moves values --------------------------------------------------------------------------------------


# Of these the result is larger than what goes in, and so it is dearer to dequantize.
_GROWING = ("Expand", "Resize")
# What has an integer kernel, or is taken out if it comes after an integer.
_ON_INTEGERS = ("Add", "Concat", "Conv", "Gemm", "MatMul", "Mul", "QuantizeLinear")


def _move_integers(graph: Any) -> None:
    """Integers are moved, not the floats that they stand for: what moves values stands between a pair.

    An integer kernel of ONNX Runtime wants its operands dequantized right before it, and its result quantized
    right behind it. What only moves values, or picks the largest, gives the same on integers as on floats.
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
