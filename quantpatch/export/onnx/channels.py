"""More channels of zeros, for ONNX Runtime to take faster kernels: the same values (``fast_kernels.py``)."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import onnx_ir as ir

from quantpatch.export.onnx.graph import attributes_of, constant, constant_of, maker
from quantpatch.export.onnx.weights import gives_integers

# Channels that integer kernels of convolutions take at once, of inputs and of outputs.
_FOUR = 4
_SIXTEEN = 16

# Operators that compute each channel by itself, of one tensor and of two.
_OF_ONE = (
    "Clip", "DequantizeLinear", "GlobalAveragePool", "HardSigmoid", "HardSwish", "LeakyRelu", "MaxPool",
    "QuantizeLinear", "Relu", "Sigmoid", "Tanh",
)  # fmt: skip
_OF_TWO = ("Add", "Mul", "Sub")


def widen_channels(graph: Any) -> None:
    """Convolutions give zeros as further channels where that makes them, or those who take them, faster.

    - Below 16 output channels the integer kernel is another, which takes about twice the time; of one pixel
      by one it is the same.
    - The depthwise kernel takes 16 channels at once and those left over one by one, so 88 channels take
      longer than 96.
    - Kernels that sum over the channels take four at once, see ``pad_inputs``; wider ones need no Pad.

    All that is computed channel by channel up to those sums is widened too, and the sums get weights of 0 for
    the new channels: they add nothing.

    Args:
        graph: An ``onnx_ir.Graph``; changed in place.
    """
    for node in list(graph):
        weight = _integer_weight(graph, node)
        if (
            weight is None
            or attributes_of(node).get("group", 1) != 1
            or not weight.inputs[0].shape[0] % _SIXTEEN
        ):
            continue
        region = _Region.of(graph, node.outputs[0])
        if region is not None:
            region.widen(graph)


def pad_inputs(graph: Any) -> None:
    """Convolutions get zeros as further input channels, up to a multiple of four.

    The integer kernel for that takes about a third of the time of the one for any number, and the Pad little.
    A zero times a zero adds nothing.

    Args:
        graph: An ``onnx_ir.Graph``; changed in place.
    """
    for node in list(graph):
        weight = _integer_weight(graph, node)
        if weight is None or attributes_of(node).get("group", 1) != 1 or not gives_integers(node.outputs[0]):
            continue
        missing = -weight.inputs[0].shape[1] % _FOUR
        if not missing:
            continue
        x = maker(node.inputs[0], "DequantizeLinear")
        codes, zero = x.inputs[0], x.inputs[2]
        rank = len(weight.inputs[0].shape)
        ends = [0] * (rank + 1) + [missing] + [0] * (rank - 2)
        pads = constant(graph, f"pad_channels.{rank - 2}d.{missing}", np.array(ends, np.int64))
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


@attrs.define
class _Region:
    """Values that are computed channel by channel, all of the same channels.

    Attributes:
        channels: How many channels they have.
        values: The values.
        sources: Convolutions that give some of the values.
        depthwise: Convolutions that give some, each channel of the same channel of another.
        sums: Convolutions that take some, and sum over the channels.
    """

    channels: int
    values: dict[Any, None] = attrs.field(factory=dict)
    sources: dict[Any, None] = attrs.field(factory=dict)
    depthwise: dict[Any, None] = attrs.field(factory=dict)
    sums: dict[Any, None] = attrs.field(factory=dict)

    @classmethod
    def of(cls, graph: Any, value: Any) -> _Region | None:
        """What a value belongs to; None if it goes where further channels would be seen."""
        if value.shape is None or not isinstance(value.shape[1], int):
            return None
        rank = len(value.shape)
        region = cls(value.shape[1])
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if value in region.values:
                continue
            node = value.producer()
            if node is None or value.is_graph_output() or not value.uses():
                return None
            if value.shape is None or len(value.shape) != rank or value.shape[1] != region.channels:
                return None
            region.values[value] = None
            for neighbour, is_input in ((node, False), *((use.node, use.idx == 0) for use in value.uses())):
                more = region._next(graph, neighbour, is_input=is_input)
                if more is None:
                    return None
                waiting += more
        return region

    def _next(self, graph: Any, node: Any, *, is_input: bool) -> list[Any] | None:
        """The values that a node gives or takes with those of the region; None if it does not fit in."""
        if node.op_type in _OF_TWO:
            return [*node.inputs, node.outputs[0]]
        if node.op_type in _OF_ONE:
            per_tensor = "Linear" not in node.op_type or not node.inputs[1].shape.rank()
            return [node.inputs[0], node.outputs[0]] if per_tensor and len(node.outputs) == 1 else None
        weight = _integer_weight(graph, node)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if weight is None or (bias is not None and constant_of(graph, bias) is None):
            return None
        groups = attributes_of(node).get("group", 1)
        if groups == 1:
            (self.sums if is_input else self.sources)[node] = None
            return []
        self.depthwise[node] = None
        fits = weight.inputs[0].shape[:2] == (groups, 1)
        return [node.inputs[0], node.outputs[0]] if fits else None

    def widen(self, graph: Any) -> None:
        """Widens all of it to the next number of channels that is faster, if there is one."""
        is_small = self.channels < _SIXTEEN and any(
            set(_integer_weight(graph, node).inputs[0].shape[2:]) != {1} for node in self.sources
        )
        missing = -self.channels % (_SIXTEEN if self.depthwise or is_small else _FOUR)
        if not missing:
            return
        for node in {**self.sources, **self.depthwise, **self.sums}:
            if node in self.depthwise:
                groups = attributes_of(node)["group"] + missing
                node.attributes["group"] = ir.AttrInt64("group", groups)
            outputs = missing if node in self.sources or node in self.depthwise else 0
            inputs = missing if node in self.sums else 0
            _padded_weight(graph, node, _integer_weight(graph, node), outputs, inputs)
        for value in self.values:
            _set_channels(value, missing)


def _set_channels(value: Any, more: int) -> None:
    dims = list(value.shape)
    value.shape = ir.Shape([dims[0], dims[1] + more, *dims[2:]])


def _integer_weight(graph: Any, node: Any) -> Any:
    """The DequantizeLinear of a convolution's weight if its operands are 8-bit integers, else None."""
    if node.op_type != "Conv":
        return None
    x, w = (maker(value, "DequantizeLinear") for value in node.inputs[:2])
    if x is None or w is None or len(x.inputs) < 3 or x.inputs[2] is None or x.inputs[2].shape.rank():
        return None
    codes, how = w.inputs[0], attributes_of(w)
    if any(constant_of(graph, value) is None for value in w.inputs):
        return None
    if any(kind not in (ir.DataType.INT8, ir.DataType.UINT8) for kind in (x.inputs[2].dtype, codes.dtype)):
        return None
    return None if len(w.inputs) > 2 or how.get("block_size", 0) or how.get("axis", 0) != 0 else w


def _padded_weight(graph: Any, node: Any, before: Any, outputs: int, inputs: int) -> None:
    """Gives a convolution a weight with zeros as further output and input channels."""
    codes, scale = before.inputs
    end = f".padded.{outputs}.{inputs}"
    array = np.pad(codes.const_value.numpy(), [(0, outputs), (0, inputs), *[(0, 0)] * (len(codes.shape) - 2)])
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
