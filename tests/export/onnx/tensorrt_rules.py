"""What TensorRT's parser takes of an ONNX file, as far as documents tell: TensorRT itself is not needed.

Sources:

- PARSER: onnx-tensorrt for TensorRT 10, onnxOpImporters.cpp, what its helper for QuantizeLinear and
  DequantizeLinear demands.
- MATRIX: onnx-tensorrt, docs/operators.md, "TensorRT 10.15 supports operators ...".
- API: class references of IQuantizeLayer and IDequantizeLayer.
- WQT: "Working with Quantized Types" in the documentation of TensorRT 10.11.
- PQ: pytorch-quantization, tensor_quant.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

__all__ = ["violations"]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_QUANTIZED = (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1)
_MOVING = ("Reshape", "Transpose", "Cast", "Identity")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: MATRIX: operators marked N.
_MISSING = frozenset(
    {
        "AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
        "BitwiseXor", "Col2Im", "CenterCropPad", "Compress", "ConcatFromSequence", "ConvInteger",
        "DFT", "Det", "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool",
        "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional",
        "OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul",
        "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
        "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss",
    }
)  # fmt: skip


def violations(path: Path) -> list[str]:
    """What of a file TensorRT would refuse, or read otherwise than ONNX means it; empty if nothing.

    Raises:
        onnx.checker.ValidationError: The file is no valid ONNX.
        onnx.shape_inference.InferenceError: Its types or shapes contradict each other.
    """
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True, data_prop=True)
    graph = _Graph(proto.graph)
    return [problem for node in proto.graph.node for problem in graph.problems(node)]


class _Graph:
    def __init__(self, graph: Any) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.infos = {info.name: info for info in (*graph.value_info, *graph.input, *graph.output)}

    def problems(self, node: Any) -> Iterator[str]:
        """What is wrong with a node."""
        checks = [self.operator]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            checks += [self.scale, self.zero_point, self.granularity, self.types]
        if node.op_type in _WEIGHTED:
            checks += [self.weight, self.bias]
        for check in checks:
            yield from (f"{node.op_type} {node.name}: {problem}" for problem in check(node))

    # --- what is known of a value ------------------------------------------------------------------

    def kind(self, name: str) -> int:
        """The element type of a value."""
        constant = self.constants.get(name)
        return constant.data_type if constant is not None else self.infos[name].type.tensor_type.elem_type

    def shape(self, name: str) -> list[int | None]:
        """The shape of a value, None for a size that is not fixed."""
        constant = self.constants.get(name)
        if constant is not None:
            return list(constant.dims)
        dims = self.infos[name].type.tensor_type.shape.dim
        return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]

    def array(self, name: str) -> Any:
        """The values of a constant."""
        return onnx.numpy_helper.to_array(self.constants[name])

    def source(self, name: str) -> Any:
        """The node that a value comes from, moved at most."""
        node = self.makers.get(name)
        while node is not None and node.op_type in _MOVING:
            node = self.makers.get(node.input[0])
        return node

    # --- rules ---------------------------------------------------------------------------------------

    def operator(self, node: Any) -> Iterator[str]:
        """MATRIX."""
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in _MISSING or node.domain:
            yield "TensorRT has no such operator"
        pools = node.op_type in ("AveragePool", "MaxPool")
        dilated = any(d != 1 for d in options.get("dilations", ()))
        if pools and (dilated or len(options["kernel_shape"]) not in (2, 3)):
            yield "pooling is over 2 or 3 axes, without dilations"
        if node.op_type in ("MaxPool", "LayerNormalization") and len(list(filter(None, node.output))) > 1:
            yield "only the first output is supported"
        if node.op_type in ("LSTM", "GRU", "RNN") and (options.get("layout") or options.get("input_forget")):
            yield "layout and input_forget are 0"
        if node.op_type == "Cast" and {options["to"], self.kind(node.input[0])} & {*_QUANTIZED}:
            yield "quantized types come from QuantizeLinear and constants only"

    def scale(self, node: Any) -> Iterator[str]:
        """PARSER and API: a constant of floats, each of them positive."""
        if node.input[1] not in self.constants:
            yield "the scale is no constant"
        elif self.kind(node.input[1]) not in _FLOATS or not (self.array(node.input[1]) > 0).all():
            yield "the scale is not positive"

    def zero_point(self, node: Any) -> Iterator[str]:
        """PARSER and MATRIX: zeros, as many as there are scales; it tells QuantizeLinear's type."""
        if len(node.input) < 3 or not node.input[2]:
            if node.op_type == "QuantizeLinear":
                yield "without a zero point its type is uint8"
        elif node.input[2] not in self.constants:
            yield "the zero point is no constant"
        else:
            if self.array(node.input[2]).astype("float32").any():
                yield "the zero point is not 0"
            if math.prod(self.shape(node.input[2])) != math.prod(self.shape(node.input[1])):
                yield "there are not as many zero points as scales"

    def granularity(self, node: Any) -> Iterator[str]:
        """PARSER: the size of blocks is read from the shapes. API: they are on one of the last two axes."""
        shape, scales = self.shape(node.input[0]), self.shape(node.input[1])
        options = {a.name: a.i for a in node.attribute}
        if math.prod(scales) == 1:
            return
        if len(scales) == 1:
            if scales[0] != shape[options.get("axis", 1)]:
                yield "there are not as many scales as channels"
            first = self.makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else node
            if first is not None and first.input[0] not in self.constants:
                yield "an activation has more than one scale"  # WQT
            return
        ratios = [None if size is None else size / count for size, count in zip(shape, scales, strict=True)]
        blocked = [axis for axis, ratio in enumerate(ratios) if ratio != 1]
        if len(blocked) != 1 or len(shape) > 2:
            yield "blocks are along one axis of a matrix"
        elif ratios[blocked[0]] not in (options["block_size"], shape[blocked[0]]):
            yield f"blocks of {options['block_size']} would be read as of {ratios[blocked[0]]}"

    def types(self, node: Any) -> Iterator[str]:
        """MATRIX and WQT: what is signed; INT4 is of constants, and in pairs."""
        quantized = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        other = node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]
        if self.kind(quantized) not in _QUANTIZED or self.kind(other) not in _FLOATS:
            yield "it is not between a float and INT8, FP8 E4M3, INT4 or FP4"
        if self.kind(quantized) == TensorProto.INT4:
            if quantized not in self.constants:
                yield "INT4 is for weights"
            elif math.prod(self.shape(quantized)) % 2:
                yield "the number of INT4 values is odd"
        if self.kind(quantized) == TensorProto.FLOAT8E4M3FN and math.prod(self.shape(node.input[1])) != 1:
            yield "FP8 has one scale"

    def weight(self, node: Any) -> Iterator[str]:
        """WQT and PQ: the scales of a weight are on its output channels, of ConvTranspose on axis 0."""
        pair = self.source(node.input[1])
        if pair is None or pair.op_type != "DequantizeLinear" or math.prod(self.shape(pair.input[1])) == 1:
            return
        axis = next((a.i for a in pair.attribute if a.name == "axis"), 1)
        if node.op_type in ("Conv", "ConvTranspose") and axis != 0:
            yield f"the scales of its weight are on axis {axis}"

    def bias(self, node: Any) -> Iterator[str]:
        """WQT: of a weighted operator the inputs are quantized that are multiplied, and the bias is not."""
        if node.op_type != "MatMul" and len(node.input) > 2 and node.input[2]:
            source = self.source(node.input[2])
            if source is not None and source.op_type in ("QuantizeLinear", "DequantizeLinear"):
                yield "its bias is quantized"
