"""Weights and biases in the form that ONNX Runtime computes with: integers, or floats that it makes at load.

The values are the same, as in ``fast_kernels.py``. A DequantizeLinear of a constant that no kernel takes in
would run each time, which takes longer than a product with one row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from quantpatch.export.onnx.graph import (
    attributes_of,
    constant,
    constant_of,
    maker,
    quantizers_behind,
    replaced,
)

_PRODUCTS = ("Conv", "MatMul", "Gemm")
_CONVOLUTIONS = ("Conv", "ConvTranspose")
# As an integer; half of what an int32 holds is left to the products.
_LARGEST_BIAS = 2**30
# Below that many a weight in bytes of two codes saves nothing that counts.
_WORTH_PACKING = 256


def weights_for_onnxruntime(graph: Any) -> None:
    """Weights that no kernel takes as integers become floats once loaded: codes, cast, and times the scale.

    ONNX Runtime computes that when it loads the file, and packs the floats for its kernels. The product is
    the same, and the file as small. Weights that are float in the model stay what they are.

    Args:
        graph: An ``onnx_ir.Graph``; changed in place.
    """
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or len([i for i in node.inputs if i is not None]) != 2:
            continue
        if any(constant_of(graph, value) is None for value in node.inputs[:2]):
            continue
        weight = node.outputs[0]
        if weight.is_graph_output() or _takes_codes(node):
            continue
        fold_weight(graph, node)
    for node in list(graph):
        if node.op_type not in _CONVOLUTIONS or maker(node.inputs[1], "DequantizeLinear") is not None:
            continue
        if node.inputs[0].producer() is not None and quantizers_behind(node.outputs[0])[0]:
            _guard(graph, node)


def _takes_codes(dequantized: Any) -> bool:
    """Whether all products of a weight have kernels that take its codes as they are."""
    codes = dequantized.inputs[0]
    uses = dequantized.outputs[0].uses()
    if attributes_of(dequantized).get("block_size", 0):
        return all(_takes_blocks(use, dequantized) for use in uses)
    if codes.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return False
    return all(_takes_integers(use) for use in uses)


def _takes_integers(use: Any) -> bool:
    """Whether a use of a weight is as the right operand of an integer kernel's product."""
    x = maker(use.node.inputs[0], "DequantizeLinear")
    if use.node.op_type not in _PRODUCTS or use.idx != 1 or x is None:
        return False
    zero = x.inputs[2] if len(x.inputs) > 2 else None
    if zero is not None and (zero.dtype not in (ir.DataType.INT8, ir.DataType.UINT8) or zero.shape.rank()):
        return False
    # A convolution's kernel gives integers, a matrix product's floats.
    return use.node.op_type != "Conv" or gives_integers(use.node.outputs[0])


def gives_integers(result: Any) -> bool:
    """Whether a convolution's result is quantized wherever it goes, and a ReLU before that does nothing.

    Args:
        result: Its output, an ``onnx_ir.Value``.
    """
    behind, is_all = quantizers_behind(result)
    if not is_all:
        return False
    relu = any(use.node.op_type == "Relu" for use in result.uses())
    return not relu or all(map(_starts_at_zero, behind))


def _starts_at_zero(quantize: Any) -> bool:
    """Whether the smallest integer of a QuantizeLinear means 0, so that ONNX Runtime drops a ReLU before."""
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    if zero is None or zero.const_value is None:
        return zero is None
    value = zero.const_value.numpy()
    return not np.issubdtype(value.dtype, np.integer) or bool((value == np.iinfo(value.dtype).min).all())


def _takes_blocks(use: Any, dequantized: Any) -> bool:
    """Whether ONNX Runtime makes a MatMulNBits of a product: of floats, with a matrix in blocks of 4 bits."""
    how, codes = attributes_of(dequantized), dequantized.inputs[0]
    size = how["block_size"]
    return (
        use.node.op_type == "MatMul"
        and use.idx == 1
        and codes.dtype in (ir.DataType.INT4, ir.DataType.UINT4)
        and len(codes.shape) == 2
        and how.get("axis", 1) % 2 == 0
        and size >= 16
        and size & (size - 1) == 0
        and maker(use.node.inputs[0], "DequantizeLinear") is None
    )


def fold_weight(graph: Any, node: Any) -> None:
    """Writes a weight as its codes, cast, times its scales.

    Blocks get an axis of their own for that. With scales repeated along the blocks' axis, OpenVINO, which
    keeps codes of 4 bits, takes each for that of another element.

    Args:
        graph: An ``onnx_ir.Graph``; changed in place.
        node: The DequantizeLinear.
    """
    codes, scale = node.inputs[:2]
    how, shape = attributes_of(node), list(codes.shape)
    axis = how.get("axis", 1) % max(len(shape), 1)
    is_in_blocks = len(scale.shape) > 1 and scale.shape[axis] > 1
    if len(scale.shape) == 1:
        scale = _shaped(graph, scale, [-1 if d == axis else 1 for d in range(len(shape))])
    elif is_in_blocks:
        codes = _in_blocks(graph, codes, axis, scale.shape[axis], how["block_size"])
        scale = _in_blocks(graph, scale, axis, scale.shape[axis], 1)
    cast = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})
    steps = [cast, ir.node("Mul", [cast.outputs[0], scale])]
    shapes = [list(codes.shape)] * 2
    if is_in_blocks:
        joined = [*shape[:axis], -1, *shape[axis + 1 :]]
        steps.append(ir.node("Reshape", [steps[-1].outputs[0], _integers(graph, joined)]))
        shapes.append([*joined[:axis], codes.shape[axis] * codes.shape[axis + 1], *joined[axis + 1 :]])
        if shapes[-1] != shape:  # the last block is shorter
            ends = [_integers(graph, [n]) for n in (0, shape[axis], axis)]
            steps.append(ir.node("Slice", [steps[-1].outputs[0], *ends]))
            shapes.append(shape)
    for step, dims in zip(steps, shapes, strict=True):
        step.outputs[0].type, step.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(dims)
    replaced(graph, node, steps)


def _shaped(graph: Any, value: Any, shape: list[int]) -> Any:
    """A constant of another shape."""
    name = f"{value.name}.{'x'.join(map(str, shape))}"
    return constant(graph, name, value.const_value.numpy().reshape(shape), value.dtype)


def _in_blocks(graph: Any, value: Any, axis: int, blocks: int, size: int) -> Any:
    """A constant whose axis is two: of the blocks, and of what is in each; zeros fill the last one."""
    array = value.const_value.numpy()
    missing = blocks * size - array.shape[axis]
    ends = [(0, missing if d == axis else 0) for d in range(array.ndim)]
    shape = [*array.shape[:axis], blocks, size, *array.shape[axis + 1 :]]
    name = f"{value.name}.{'x'.join(map(str, shape))}"
    return constant(graph, name, np.pad(array, ends).reshape(shape), value.dtype)


def _integers(graph: Any, values: list[int]) -> Any:
    return constant(graph, f"integers.{'x'.join(map(str, values))}", np.array(values, np.int64))


def _guard(graph: Any, convolution: Any) -> None:
    """Gives a convolution of float weights a bias that is computed: of signs, times the magnitudes.

    Between quantized values ONNX Runtime quantizes weights that are float, or are once loaded, with one scale
    for all channels, unless the bias is not a constant. A sign times a magnitude is the same float, and takes
    no time.
    """
    inputs = list(convolution.inputs)
    bias = inputs[2] if len(inputs) > 2 else None
    if bias is not None and constant_of(graph, bias) is None:
        return
    if bias is None:
        channels = convolution.outputs[0].shape[1]
        if not isinstance(channels, int):
            return
        values = np.zeros(channels, np.float32)
        name = f"{inputs[1].name}.no_bias"
    else:
        values, name = bias.const_value.numpy(), bias.name
    signs = constant(graph, f"{name}.sign", np.sign(values).astype(np.int32))
    magnitudes = np.where(values == 0, 1, np.abs(values)).astype(values.dtype)
    sizes = constant(graph, f"{name}.magnitude", magnitudes)
    _set_bias(graph, convolution, ir.node("DequantizeLinear", [signs, sizes], {"axis": 0}), name)


def _set_bias(graph: Any, convolution: Any, made: Any, name: str) -> None:
    signs, sizes = made.inputs
    made.outputs[0].name = f"{name}.{convolution.outputs[0].name}.bias"
    made.outputs[0].type, made.outputs[0].shape = ir.TensorType(sizes.dtype), signs.shape
    inputs = [*convolution.inputs[:2], made.outputs[0]]
    new = ir.node(convolution.op_type, inputs, attributes_of(convolution), name=convolution.name)
    replaced(graph, convolution, [made, new])


# --- What older runtimes want -------------------------------------------------------------------------------


def biases_as_integers(graph: Any) -> None:
    """Biases of convolutions on integers become int32, in units of the input's scale times the weight's.

    ONNX Runtime does that itself from 1.23 on; before, a convolution with a float bias runs on floats. It is
    a rounding that the model does not have, so it is left to the runtime where that can do it.

    Args:
        graph: An ``onnx_ir.Graph``; changed in place.
    """
    for node in list(graph):
        if node.op_type != "Conv" or len(node.inputs) < 3 or not gives_integers(node.outputs[0]):
            continue
        unit, bias = _unit_of_bias(graph, node), constant_of(graph, node.inputs[2])
        if unit is None or bias is None or not bias_fits(graph, node):
            continue
        name = node.inputs[2].name
        own = f"{name}.{node.outputs[0].name}"
        values = bias.numpy()
        unit = np.broadcast_to(unit.astype(np.float32), values.shape)
        codes = constant(graph, f"{own}.int32", np.round(values / unit).astype(np.int32))
        scale = constant(graph, f"{own}.unit", unit.copy())
        _set_bias(graph, node, ir.node("DequantizeLinear", [codes, scale], {"axis": 0}), name)


def _unit_of_bias(graph: Any, convolution: Any) -> Any:
    """What 1 is worth in a convolution's sums, by channel; None if its operands are not quantized."""
    scales = []
    for value in convolution.inputs[:2]:
        made = maker(value, "DequantizeLinear")
        scale = None if made is None else constant_of(graph, made.inputs[1])
        if scale is None:
            return None
        scales.append(scale.numpy().astype(np.float64))
    return scales[0] * scales[1]


def bias_fits(graph: Any, convolution: Any) -> bool:
    """Whether the bias of a convolution of quantized operands fits an int32; True if it has none.

    Args:
        graph: An ``onnx_ir.Graph``.
        convolution: The node.
    """
    bias = constant_of(graph, convolution.inputs[2]) if len(convolution.inputs) > 2 else None
    if bias is None:
        return True
    unit = _unit_of_bias(graph, convolution)
    return unit is None or bool((np.abs(bias.numpy()) < unit * _LARGEST_BIAS).all())


# --- Files of half the size ---------------------------------------------------------------------------------


def pack_four_bits(graph: Any) -> None:
    """Codes that need 4 bits are stored in 4 and cast to the 8 that kernels take when the file is loaded.

    Args:
        graph: An ``onnx_ir.Graph``; changed in place.
    """
    packed = {ir.DataType.INT8: (ir.DataType.INT4, -8, 7), ir.DataType.UINT8: (ir.DataType.UINT4, 0, 15)}
    for value in list(graph.initializers.values()):
        if value.dtype not in packed or value.const_value.size < _WORTH_PACKING:
            continue
        kind, low, high = packed[value.dtype]
        codes = value.const_value.numpy()
        uses = value.uses()
        if codes.min() < low or codes.max() > high:
            continue
        if not all(use.node.op_type in ("Cast", "DequantizeLinear") and use.idx == 0 for use in uses):
            continue
        stored = constant(graph, f"{value.name}.{kind.name.lower()}", codes.astype(kind.numpy()), kind)
        wide = ir.node("Cast", [stored], {"to": value.dtype})
        wide.outputs[0].name = f"{value.name}.codes"
        wide.outputs[0].type, wide.outputs[0].shape = value.type, value.shape
        graph.insert_before(graph[0], wide)
        ir.convenience.replace_all_uses_with(value, wide.outputs[0])
        del graph.initializers[value.name]
