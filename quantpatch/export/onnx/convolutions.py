"""Convolutions and pools as ONNX Runtime runs them fast on a CPU: the same values, as in ``fast_kernels``."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from quantpatch.export.onnx.channels import pad_inputs, widen_channels
from quantpatch.export.onnx.graph import attributes_of, constant, constant_of, is_float8, maker, replaced
from quantpatch.export.onnx.weights import bias_fits


def convolutions_for_onnxruntime(graph: Any) -> None:
    """Runs the passes below, in an order that lets later ones see what earlier ones made.

    Args:
        graph: An ``onnx_ir.Graph``; changed in place.
    """
    _keep_large_biases_float(graph)
    _name_global_pools(graph)
    _pools_as_convolutions(graph)
    _keep_hanging_pools_float(graph)
    widen_channels(graph)
    pad_inputs(graph)


def _keep_large_biases_float(graph: Any) -> None:
    """A bias that is too large for an integer is subtracted, negated, behind its convolution.

    ONNX Runtime's integer kernel takes it as an int32, in units of the input's scale times the weight's, and
    cuts it off at the ends of that type without a word. That happens where all that comes in is next to 0, or
    the weights of a channel are, as batch norm leaves them. Such a convolution runs on floats.
    """
    for node in list(graph):
        if node.op_type != "Conv" or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        bias = constant_of(graph, node.inputs[2])
        if bias is None or bias_fits(graph, node):
            continue
        shape = [1, -1, *[1] * (len(node.inputs[1].shape) - 2)]
        negated = constant(graph, f"{node.inputs[2].name}.negated", -bias.numpy().reshape(shape), bias.dtype)
        convolution = ir.node("Conv", node.inputs[:2], attributes_of(node))
        convolution.outputs[0].shape = node.outputs[0].shape
        replaced(graph, node, [convolution, ir.node("Sub", [convolution.outputs[0], negated])])


def _name_global_pools(graph: Any) -> None:
    """The mean of all pixels of quantized values, quantized again, is a GlobalAveragePool.

    torch exports a ReduceMean, which has no integer kernel.
    """
    for node in list(graph):
        if node.op_type != "ReduceMean" or not maker(node.inputs[0], "DequantizeLinear"):
            continue
        shape = node.inputs[0].shape
        axes = constant_of(graph, node.inputs[1]) if len(node.inputs) > 1 else None
        if shape is None or axes is None or not attributes_of(node).get("keepdims", 1):
            continue
        over = {int(axis) % len(shape) for axis in axes.numpy().reshape(-1)}
        if len(shape) != 4 or over != {2, 3} or not _is_quantized_next(node.outputs[0]):
            continue
        replaced(graph, node, [ir.node("GlobalAveragePool", [node.inputs[0]])])


def _pools_as_convolutions(graph: Any) -> None:
    """An average of quantized values that is quantized again becomes a depthwise convolution of ones.

    The integer kernel of AveragePool takes three to ten times as long as that of the convolution. The scale
    of the ones is one over their number.
    """
    for node in list(graph):
        made = maker(node.inputs[0], "DequantizeLinear") if node.op_type == "AveragePool" else None
        if made is None or is_float8(made.inputs[0]):
            continue
        shape, how = node.inputs[0].shape, attributes_of(node)
        kernel = list(how["kernel_shape"])
        if (
            shape is None
            or not isinstance(shape[1], int)
            or len(kernel) != 2
            or how.get("ceil_mode", 0)
            or how.get("auto_pad", "NOTSET") != "NOTSET"
            or (any(how.get("pads", ())) and not how.get("count_include_pad", 0))
            or not _is_quantized_next(node.outputs[0])
        ):
            continue
        size = "x".join(map(str, kernel))
        ones = constant(graph, f"ones.{shape[1]}x{size}", np.ones((shape[1], 1, *kernel), np.int8))
        scale = constant(graph, f"share.{size}", np.array(1 / np.prod(kernel), np.float32))
        kept: dict[str, Any] = {key: how[key] for key in how if key in ("strides", "pads", "dilations")}
        weight = ir.node("DequantizeLinear", [ones, scale])
        weight.outputs[0].shape = ones.shape
        weight.outputs[0].type = scale.type
        convolution = ir.node(
            "Conv", [node.inputs[0], weight.outputs[0]], {"kernel_shape": kernel, "group": shape[1], **kept}
        )
        replaced(graph, node, [weight, convolution])


def _keep_hanging_pools_float(graph: Any) -> None:
    """Averages over windows that hang over the edge are followed by a Max with the lowest float.

    The integer kernel of AveragePool divides by the size of the whole window there, where ceil_mode means the
    part inside; what is between it and the QuantizeLinear keeps it from being taken.
    """
    lowest = np.array(np.finfo(np.float32).min, np.float32)
    for node in list(graph):
        if node.op_type == "AveragePool" and attributes_of(node).get("ceil_mode", 0):
            pool = ir.node("AveragePool", list(node.inputs), attributes_of(node))
            replaced(
                graph, node, [pool, ir.node("Max", [pool.outputs[0], constant(graph, "lowest", lowest)])]
            )


def _is_quantized_next(value: Any) -> bool:
    """Whether a value goes into one QuantizeLinear and nowhere else, at most reshaped before."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return False
    node = uses[0].node
    if node.op_type in ("Reshape", "Flatten"):
        return _is_quantized_next(node.outputs[0])
    return bool(node.op_type == "QuantizeLinear")
