"""Linear layers of which the weights alone are quantized: integers are read, and floats computed with.

That pays where reading the weights is what takes the time: at few rows, as of a language model that gives one
token after the other. In bfloat16 torch has kernels for it, with weights of 8 bits
(``_weight_int8pack_mm``) and of 4 bits in blocks (``_weight_int4pack_mm_for_cpu``). In float32 these are
slower than float, but the compiler's own code for a product that is a sum is not, with 8 bits at least.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quantpatch.export.program.weight_constants import (
    DEQUANTIZE_BLOCKS,
    DEQUANTIZE_CHANNELS,
    constant_of,
    new_constant,
)

_ATEN = torch.ops.aten
_INT8, _INT4 = _ATEN._weight_int8pack_mm.default, _ATEN._weight_int4pack_mm_for_cpu.default
# With more rows the kernels take longer than those of floats.
_MOST_ROWS = 2
# What the kernels take: they look no further, and read past the end of others.
_INT8_ROW, _INT4_ROWS, _INT4_BLOCKS = 16, 16, (32, 64, 128, 256)


def use_weight_only_kernels(module: GraphModule, reasons: dict[str, str]) -> dict[str, Tensor]:
    """Gives linear layers of which the weights alone are quantized to kernels for these.

    Args:
        module: The program; changed in place.
        reasons: Takes why weights are read as floats, by the names of their quantizers.

    Returns:
        What the kernels have as weights, by the quantizer: ``"<weight>.codes"``.
    """
    packed: dict[str, Tensor] = {}
    for node in list(module.graph.nodes):
        weight = _weight_alone(node)
        if weight is None:
            continue
        name = str(weight.args[0].target).rpartition(".")[0]  # type: ignore[union-attr]
        why = _why_not(node, weight)
        if why is not None:
            reasons[name] = why
            continue
        packed[f"{name}.codes"] = _give_to_kernel(module, node, weight)
    return packed


def is_in_float32(node: Node) -> bool:
    """Whether a node is such a kernel in float32, in the place of code that the compiler makes."""
    return node.target is _INT8 and node.meta["val"].dtype == torch.float32


def multiply_and_sum(node: Node) -> None:
    """Writes out a kernel as a product and its sum, which the compiler makes code of."""
    x, codes, scale = node.args
    with node.graph.inserting_before(node):
        rows = _call(node, _ATEN.unsqueeze.default, x, 1)
        floats = _call(node, torch.ops.prims.convert_element_type.default, codes, torch.float32)
        products = _call(node, _ATEN.mul.Tensor, rows, floats)
        sums = _call(node, _ATEN.sum.dim_IntList, products, [-1])
        result = _call(node, _ATEN.mul.Tensor, sums, scale)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _call(before: Node, target: Any, *args: Any) -> Node:
    """A call with the value that it has while a graph is compiled, from those of its arguments."""
    node = before.graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return node


def _weight_alone(node: Node) -> Node | None:
    """The operator that makes floats of the weight of a linear layer, if its input is float."""
    if node.target is not _ATEN.linear.default:
        return None
    x, weight = (_without_cast(argument) for argument in node.args[:2])
    is_weight = isinstance(weight, Node) and weight.target in (DEQUANTIZE_CHANNELS, DEQUANTIZE_BLOCKS)
    is_quantized = isinstance(x, Node) and str(x.target).startswith("quantized_decomposed.dequantize")
    return weight if is_weight and not is_quantized else None


def _without_cast(node: Any) -> Any:
    while isinstance(node, Node) and node.target is _ATEN._to_copy.default:
        node = node.args[0]
    return node


def _why_not(node: Node, weight: Node) -> str | None:
    """Why the kernels do not take a layer, as a clause; None if one does."""
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    columns, rows = weight.meta["val"].shape[::-1]
    count = math.prod(x.shape[:-1])
    if not isinstance(count, int):
        return "how many rows it gets is not fixed, and kernels that read weights as integers pay at few"
    if count > _MOST_ROWS:
        return (
            f"it gets {count} rows, and kernels that read weights as integers pay at up to {_MOST_ROWS}: "
            f"lower the model for single tokens, or quantize its activations, too"
        )
    is_blocked = weight.target is DEQUANTIZE_BLOCKS
    if x.dtype == torch.float32 and not is_blocked:
        return None
    if x.dtype != torch.bfloat16:
        kind = "4-bit weights in blocks" if is_blocked else "weights"
        return (
            f"the kernel for {kind} alone computes in bfloat16, and its input is {x.dtype}: model.bfloat16()"
        )
    if not is_blocked:
        short = f"the kernel takes rows of a multiple of {_INT8_ROW}, and these are {columns} long"
        return short if columns % _INT8_ROW else None
    low, high, size = weight.args[3], weight.args[4], weight.args[6]
    if low < -8 or high > 7:  # type: ignore[operator]
        return "the kernel for weights in blocks takes those of 4 bits; use axis='channel' for others"
    if size not in _INT4_BLOCKS:
        return f"the kernel takes blocks of {', '.join(map(str, _INT4_BLOCKS))}, and these are of {size}"
    if rows % _INT4_ROWS:
        return f"the kernel takes a multiple of {_INT4_ROWS} features of the result, and these are {rows}"
    return None


def _give_to_kernel(module: GraphModule, node: Node, weight: Node) -> Tensor:
    """Puts a kernel in the place of a linear layer; returns what it has as its weight."""
    x, _, *rest = node.args
    bias = rest[0] if rest else None
    value = node.meta["val"]
    kind, columns, features = value.dtype, weight.meta["val"].shape[1], weight.meta["val"].shape[0]
    codes, scale, zeros = (constant_of(module, argument) for argument in weight.args[:3])
    assert codes is not None
    assert scale is not None
    assert zeros is not None
    codes, scale = codes.detach(), scale.detach()
    with node.graph.inserting_before(node):
        flat: Node = _call(node, _ATEN.view.default, x, [math.prod(value.shape[:-1]), columns])
    if weight.target is DEQUANTIZE_BLOCKS:
        # It computes (q - 8) * scale + zero of each block.
        packed: Tensor = _ATEN._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
        blocks = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).to(kind).contiguous()
        args: tuple[Any, ...] = (new_constant(module, node, packed), weight.args[6])
        args += (new_constant(module, node, blocks),)
        target, factor = _INT4, None
    else:
        packed, factor = codes, scale
        if kind != torch.float32:  # the kernel has scales of that type, which would round them
            scale = torch.ones(features, dtype=kind)
        args = (new_constant(module, node, codes), new_constant(module, node, scale))
        target = _INT8
    with node.graph.inserting_before(node):
        result: Node = node.graph.call_function(target, (flat, *args))
        if factor is not None and kind != torch.float32:
            result = node.graph.call_function(
                _ATEN.mul.Tensor, (result, new_constant(module, result, factor))
            )
        if bias is not None:
            result = node.graph.call_function(_ATEN.add.Tensor, (result, bias))
        result = node.graph.call_function(_ATEN._to_copy.default, (result,), {"dtype": kind})
        result = node.graph.call_function(_ATEN.view.default, (result, list(value.shape)))
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return packed
