"""Convolutions and pools as ONNX Runtime runs them fast on a CPU: the same values, as in ``kernels``."""

from __future__ import annotations

import math
from typing import Any

from quantpatch.export.graph import attributes_of, constant, constant_of, maker, replaced

__all__ = ["convolutions_for_onnxruntime"]

# Channels that integer kernels of convolutions take at once, of inputs and of outputs.
_FOUR = 4
_SIXTEEN = 16
# As an integer; half of what an int32 holds is left to the products.
_LARGEST_BIAS = 2**30


def convolutions_for_onnxruntime(graph: Any) -> None:
    """Runs the passes below, in an order that lets later ones see what earlier ones made.

    Args:
        graph: An ``onnx_ir.Graph``; changed in place.
    """
    _keep_large_biases_float(graph)
    _name_global_pools(graph)
    _pools_as_convolutions(graph)
    _keep_hanging_pools_float(graph)
    _widen_outputs(graph)
    _pad_channels(graph)


def _keep_large_biases_float(graph: Any) -> None:
    """A bias that is too large for an integer is subtracted, negated, behind its convolution.

    ONNX Runtime's integer kernel takes it as an int32, in units of the input's scale times the weight's, and
    cuts it off at the ends of that type without a word. That happens where all that comes in is next to 0, or
    the weights of a channel are, as batch norm leaves them. Such a convolution runs on floats.
    """
    import numpy as np
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Conv" or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        x, weight = (maker(value, "DequantizeLinear") for value in node.inputs[:2])
        bias = constant_of(graph, node.inputs[2])
        if x is None or weight is None or bias is None:
            continue
        scales = [constant_of(graph, made.inputs[1]) for made in (x, weight)]
        if None in scales:
            continue
        unit = math.prod(scale.numpy().astype(np.float64) for scale in scales)
        if (np.abs(bias.numpy()) < unit * _LARGEST_BIAS).all():
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
    import onnx_ir as ir

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
    import numpy as np
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "AveragePool" or not maker(node.inputs[0], "DequantizeLinear"):
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
    import numpy as np
    import onnx_ir as ir

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


def _integer_weight(graph: Any, node: Any) -> Any:
    """The DequantizeLinear of a 2-d convolution's weight if its operands are 8-bit integers, else None."""
    import onnx_ir as ir

    if node.op_type != "Conv":
        return None
    x, w = (maker(value, "DequantizeLinear") for value in node.inputs[:2])
    if x is None or w is None or len(x.inputs) < 3 or x.inputs[2] is None or x.inputs[2].shape.rank():
        return None
    codes, how = w.inputs[0], attributes_of(w)
    if any(constant_of(graph, value) is None for value in w.inputs) or len(codes.shape) != 4:
        return None
    if any(kind not in (ir.DataType.INT8, ir.DataType.UINT8) for kind in (x.inputs[2].dtype, codes.dtype)):
        return None
    return None if len(w.inputs) > 2 or how.get("block_size", 0) or how.get("axis", 0) != 0 else w


def _padded_weight(graph: Any, node: Any, before: Any, outputs: int, inputs: int) -> None:
    """Gives a convolution a weight with zeros as further output and input channels."""
    import numpy as np
    import onnx_ir as ir

    codes, scale = before.inputs
    end = f".padded.{outputs}.{inputs}"
    array = np.pad(codes.const_value.numpy(), [(0, outputs), (0, inputs), (0, 0), (0, 0)])
    new_scale = scale
    if outputs and scale.shape.rank():
        ones = np.pad(scale.const_value.numpy(), (0, outputs), constant_values=1)
        new_scale = constant(graph, f"{scale.name}{end}", ones, scale.dtype)
    new_codes = constant(graph, f"{codes.name}{end}", array, codes.dtype)
    weight = ir.node("DequantizeLinear", [new_codes, new_scale], attributes_of(before))
    weight.outputs[0].name = f"{before.outputs[0].name}.{node.outputs[0].name}{end}"
    weight.outputs[0].type, weight.outputs[0].shape = before.outputs[0].type, new_codes.shape
    graph.insert_before(node, weight)
    node.replace_input_with(1, weight.outputs[0])
    if outputs and len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node.inputs[2]
        wide = np.pad(bias.const_value.numpy(), (0, outputs))
        node.replace_input_with(2, constant(graph, f"{bias.name}{end}", wide, bias.dtype))


def _widen_outputs(graph: Any) -> None:
    """Convolutions of fewer than 16 output channels get zeros as further ones, which add nothing later.

    Below 16 the integer kernel is another, which takes twice the time (4 to 8 channels, 64 images of 8 x 8:
    108 and 56 us).
    """
    import onnx_ir as ir

    for node in list(graph):
        weight = _integer_weight(graph, node)
        how = attributes_of(node)
        if weight is None or how.get("group", 1) != 1 or set(how.get("kernel_shape", (1,))) == {1}:
            continue
        missing = _SIXTEEN - weight.inputs[0].shape[0]
        through: list[Any] = []
        takers: list[tuple[Any, Any]] = []
        if missing <= 0 or not _pads_bias(graph, node):
            continue
        if not _follow(graph, node.outputs[0], through, takers):
            continue
        _padded_weight(graph, node, weight, missing, 0)
        for taker, its_weight in takers:
            depthwise = attributes_of(taker).get("group", 1) > 1
            if depthwise:
                groups = attributes_of(taker)["group"] + missing
                taker.attributes["group"] = ir.AttrInt64("group", groups)
            _padded_weight(graph, taker, its_weight, *((missing, 0) if depthwise else (0, missing)))
        for value in through:
            _set_channels(value, missing)


def _pads_bias(graph: Any, node: Any) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias is None or constant_of(graph, bias) is not None


def _follow(graph: Any, value: Any, through: list[Any], takers: list[tuple[Any, Any]]) -> bool:
    """Follows a value to the convolutions that sum over its channels; False if it goes anywhere else."""
    through.append(value)
    if value.is_graph_output() or value.shape is None or not value.uses():
        return False
    for use in value.uses():
        node = use.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not node.inputs[1].shape.rank():
            pass
        elif node.op_type == "Conv" and use.idx == 0:
            weight = _integer_weight(graph, node)
            groups = attributes_of(node).get("group", 1)
            if weight is None or not _pads_bias(graph, node):
                return False
            takers.append((node, weight))
            if groups == 1:
                continue
            if weight.inputs[0].shape[:2] != (groups, 1):
                return False
        elif node.op_type not in ("Relu", "MaxPool"):
            return False
        if not _follow(graph, node.outputs[0], through, takers):
            return False
    return True


def _set_channels(value: Any, more: int) -> None:
    import onnx_ir as ir

    dims = list(value.shape)
    value.shape = ir.Shape([dims[0], dims[1] + more, *dims[2:]])


def _pad_channels(graph: Any) -> None:
    """Convolutions get zeros as further input channels, up to a multiple of four.

    The integer kernel for that takes a third of the time of the one for any number (3 to 32 channels, 96 x
    96: 37 and 116 us; the Pad takes 5). A zero times a zero adds nothing.
    """
    import numpy as np
    import onnx_ir as ir

    for node in list(graph):
        weight = _integer_weight(graph, node)
        if weight is None or attributes_of(node).get("group", 1) != 1:
            continue
        missing = -weight.inputs[0].shape[1] % _FOUR
        if not missing:
            continue
        x = maker(node.inputs[0], "DequantizeLinear")
        codes, zero = x.inputs[0], x.inputs[2]
        pads = constant(graph, f"pad_channels.{missing}", np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64))
        padded = ir.node("Pad", [codes, pads, zero])
        dequantized = ir.node("DequantizeLinear", [padded.outputs[0], *x.inputs[1:]])
        for new, kind in ((padded, zero.type), (dequantized, x.outputs[0].type)):
            new.outputs[0].name = f"{codes.name}.{node.outputs[0].name}.{new.op_type.lower()}"
            new.outputs[0].type, new.outputs[0].shape = kind, codes.shape
            if codes.shape is not None:
                _set_channels(new.outputs[0], missing)
        graph.insert_before(node, [padded, dequantized])
        node.replace_input_with(0, dequantized.outputs[0])
        _padded_weight(graph, node, weight, 0, missing)
