"""Passes over a program before torch's compiler gets it, and over what the compiler made of it.

The compiler makes integer kernels of ``dequantize -> convolution or linear -> quantize`` and takes a few
things for granted there that do not hold for every model: that a convolution is not transposed, that max
pooling comes and goes in one scale, that integers fill their type. What it would compute otherwise it does
not get in that form. It rounds what it did not fuse by multiplying with the inverse of a scale; here that is
a division, as in the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from quantpatch.dataflow import traits
from quantpatch.export.program.weight_constants import (
    DEQUANTIZE_BLOCKS,
    DEQUANTIZE_CHANNELS,
    as_constant,
    constant_of,
)
from quantpatch.export.program.weight_only import (
    is_in_float32,
    multiply_and_sum,
    use_weight_only_kernels,
)

_OPERATORS = torch.ops.quantized_decomposed
_QUANTIZE = _OPERATORS.quantize_per_tensor.default
_DEQUANTIZE = _OPERATORS.dequantize_per_tensor.default
_ATEN = torch.ops.aten
# What the compiler has integer kernels for, by operators that take (input, weight, ...).
_PRODUCTS = (
    _ATEN.linear.default,
    _ATEN.conv1d.default,
    _ATEN.conv1d.padding,
    _ATEN.conv2d.default,
    _ATEN.conv2d.padding,
)
_PRODUCTS_OF_ACTIVATIONS = frozenset(
    f"aten::{name}" for name in ("matmul", "bmm", "mm", "baddbmm", "einsum", "scaled_dot_product_attention")
)
_POOLS = ("aten::max_pool2d", "aten::max_pool1d", "aten::max_pool3d")


def before_compiling(module: GraphModule, reasons: dict[str, str]) -> dict[str, Tensor]:
    """Rewrites a functional program for the compiler.

    Nothing here changes a value, but for the roundings of kernels that read weights alone as integers.

    Args:
        module: The program, its weights attributes; changed in place.
        reasons: Takes why weights that are quantized alone are read as floats.

    Returns:
        Tensors of weights that are new: of their parts, ``"<weight>[0].codes"``, or packed.
    """
    _join_parts(module.graph)
    _quantize_early(module.graph)
    _merge_equal(module.graph)
    parts = _split_weights(module)
    _quantize_once(module.graph)
    reasons |= _float_products(module.graph)
    parts |= use_weight_only_kernels(module, reasons)
    for node in list(module.graph.nodes):
        if node.target is DEQUANTIZE_BLOCKS or (
            node.target is DEQUANTIZE_CHANNELS and not all(_is_for_a_kernel(use, node) for use in node.users)
        ):
            as_constant(module, node)
        elif node.target is _QUANTIZE and (not _fills_its_type(node) or _is_pooled_otherwise(node)):
            _by_division(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return parts


def after_fusing(graph: Graph) -> None:
    """Rewrites what is left of quantizers once the compiler has fused what it can.

    Args:
        graph: Changed in place.
    """
    module = graph.owning_module
    assert module is not None
    for node in list(graph.nodes):
        if node.target is DEQUANTIZE_CHANNELS:
            as_constant(module, node)
        elif is_in_float32(node):
            multiply_and_sum(node)
        elif node.target is _QUANTIZE and not _is_pooled(node):
            _by_division(node)
    graph.eliminate_dead_code()


def _join_parts(graph: Graph) -> None:
    """What is split and put together again stays whole: so a list is quantized by one range."""
    for cat in list(graph.nodes):
        if _name(cat) != "aten::cat":
            continue
        pieces, dim = list(cat.args[0]), cat.args[1] if len(cat.args) > 1 else 0
        split = pieces[0].args[0] if getattr(pieces[0].target, "__name__", "") == "getitem" else None
        if split is None or _name(split) != "aten::split_with_sizes":
            continue
        along = split.args[2] if len(split.args) > 2 else 0
        is_whole = [piece.args for piece in pieces] == [(split, i) for i in range(len(split.args[1]))]
        if is_whole and along == dim:
            cat.replace_all_uses_with(split.args[0])
            graph.erase_node(cat)
    graph.eliminate_dead_code()


def _quantize_early(graph: Graph) -> None:
    """What is quantized behind an operator that only moves values, or takes the largest, is so before it.

    The values are the same. A kernel that computes them then ends in the quantizer, and integers are moved.
    """
    waiting = [node for node in graph.nodes if node.target is _QUANTIZE]
    while waiting:
        second = waiting.pop()
        move = second.args[0]
        name = _name(move)
        is_cat = name == "aten::cat"
        if not isinstance(move, Node) or not (is_cat or traits(name).moves) or len(move.users) > 1:
            continue
        sources: list[Any] = list(move.args[0]) if is_cat else [move.args[0]]  # type: ignore[arg-type]
        if not all(isinstance(source, Node) and source.op == "call_function" for source in sources):
            continue
        if all(source.target is _DEQUANTIZE for source in sources) or (
            not is_cat and len(sources[0].users) > 1
        ):
            continue
        for source in dict.fromkeys(sources):
            with graph.inserting_after(source):
                codes = _copied(graph, second, source)
            with graph.inserting_after(codes):
                floats = graph.call_function(_DEQUANTIZE, (codes, *second.args[1:]))
            floats.meta.update(source.meta)
            move.replace_input_with(source, floats)
            waiting.append(codes)
    graph.lint()


def _copied(graph: Graph, quantize: Node, x: Node) -> Node:
    """The same quantizer of another value."""
    node = graph.call_function(_QUANTIZE, (x, *quantize.args[1:]))
    value = x.meta.get("val")
    if isinstance(value, Tensor):
        node.meta["val"] = value.to(quantize.args[5])  # type: ignore[arg-type]
    return node


def _float_products(graph: Graph) -> dict[str, str]:
    """Products of activations that are quantized: the modules that compute them, and what is made of them."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        if _name(node) not in _PRODUCTS_OF_ACTIVATIONS:
            continue
        if any(_is_rounded(argument) for argument in node.args):
            modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            name = modules[-1] if modules else ""
            found[f"{name}.{_name(node).removeprefix('aten::')}".lstrip(".")] = (
                "PyTorch's compiler has no integer kernel for products of activations: what is multiplied is "
                "rounded as in the model, and computed with in float"
            )
    return found


def _is_rounded(node: Any) -> bool:
    """Whether a value comes out of a quantizer, moved or scaled at most."""
    while isinstance(node, Node) and traits(_name(node)).keeps_grid:
        node = node.args[0]
    return isinstance(node, Node) and node.target is _DEQUANTIZE


def _merge_equal(graph: Graph) -> None:
    """Of pairs that do the same to one value, one is enough: a kernel can end in only one."""
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.target in (_QUANTIZE, _DEQUANTIZE):
            first = seen.setdefault((node.target, node.args), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _split_weights(module: GraphModule) -> dict[str, Tensor]:
    """Parts of a weight along its channels, as attention has of its projections, become weights."""
    parts: dict[str, Tensor] = {}
    for node in list(module.graph.nodes):
        if node.target is not DEQUANTIZE_CHANNELS:
            continue
        dim, tensors = node.args[3], [constant_of(module, argument) for argument in node.args[:3]]
        splits = [use for use in node.users if use.target is _ATEN.split.Tensor]
        if len(splits) != len(node.users) or any(t is None for t in tensors):
            continue
        for split in splits:
            if (split.args[2] if len(split.args) > 2 else 0) != dim:
                continue
            for piece in list(split.users):
                index, size = int(piece.args[1]), int(split.args[1])
                name = f"{str(node.args[0].target).rpartition('.')[0]}[{index}]"
                constants = []
                for end, tensor in zip(("codes", "scale", "zero_point"), tensors, strict=True):
                    assert tensor is not None
                    along = dim if end == "codes" else 0
                    own = torch.split(tensor.detach(), size, along)[index].clone()
                    parts[f"{name}.{end}"] = own
                    attribute = f"_part_{len(parts)}"
                    module.register_buffer(attribute, own)
                    with module.graph.inserting_before(piece):
                        constants.append(module.graph.create_node("get_attr", attribute))
                with module.graph.inserting_before(piece):
                    new = module.graph.call_function(node.target, (*constants, *node.args[3:]))
                new.meta.update(piece.meta)
                piece.replace_all_uses_with(new)
                module.graph.erase_node(piece)
    return parts


def _quantize_once(graph: Graph) -> None:
    """Integers that are dequantized, moved at most, and quantized by the same scale stay integers."""
    for second in list(graph.nodes):
        if second.target is not _QUANTIZE:
            continue
        moves: list[Node] = []
        node = second.args[0]
        while _is_moved_by_view(node):
            moves.append(node)
            node = node.args[0]
        if not (isinstance(node, Node) and node.target is _DEQUANTIZE and node.args[1:] == second.args[1:]):
            continue
        codes = node.args[0]
        with graph.inserting_before(second):
            for move in reversed(moves):
                target: Any = move.target
                moved = graph.call_function(target, (codes, *move.args[1:]), dict(move.kwargs))
                moved.meta.update(move.meta)
                value = move.meta.get("val")
                if isinstance(value, Tensor):
                    moved.meta["val"] = value.to(second.args[5])
                codes = moved
        second.replace_all_uses_with(codes)
        graph.erase_node(second)


def _name(node: Any) -> str:
    """The name of a node's operator, ``"aten::relu"``; empty of others."""
    target = getattr(node, "target", None)
    return str(target._schema.name).partition(".")[0] if isinstance(target, torch._ops.OpOverload) else ""


def _is_moved_by_view(node: Any) -> bool:
    name = _name(node)
    return isinstance(node, Node) and traits(name).moves and name not in _POOLS and len(node.users) == 1


def _fills_its_type(quantize: Node) -> bool:
    """Whether a kernel's saturation gives the bounds of a quantizer."""
    return tuple(quantize.args[3:]) == (0, 255, torch.uint8)


def _pool_before(quantize: Node) -> Node | None:
    """The max pooling whose result is quantized, if its input is dequantized."""
    node: Any = quantize.args[0]
    if isinstance(node, Node) and getattr(node.target, "__name__", "") == "getitem":
        node = node.args[0]
    if not isinstance(node, Node) or "max_pool" not in str(node.target):
        return None
    source = node.args[0]
    return source if isinstance(source, Node) and source.target is _DEQUANTIZE else None


def _is_pooled(quantize: Node) -> bool:
    """Whether integers are pooled: to the compiler they stay such."""
    return _pool_before(quantize) is not None


def _is_pooled_otherwise(quantize: Node) -> bool:
    """Whether what is pooled comes in another scale, which the compiler does not look at."""
    source = _pool_before(quantize)
    return source is not None and source.args[1:] != quantize.args[1:]


def _is_for_a_kernel(use: Node, weight: Node) -> bool:
    """Whether a use of a weight may become an integer kernel."""
    if use.target not in _PRODUCTS or use.args[1] is not weight:
        return False
    x: Any = use.args[0]
    return isinstance(x, Node) and x.target is _DEQUANTIZE


def _by_division(node: Node) -> None:
    """Writes out a quantizer as the model computes it."""
    x, scale, zero_point, low, high, kind = node.args
    graph = node.graph
    with graph.inserting_before(node):
        steps: Iterable[tuple[Any, tuple[Any, ...], dict[str, Any]]] = (
            (_ATEN.div.Tensor, (scale,), {}),
            (_ATEN.round.default, (), {}),
            (_ATEN.add.Tensor, (zero_point,), {}),
            (_ATEN.clamp_min.default, (low,), {}),
            (_ATEN.clamp_max.default, (high,), {}),
            (torch.ops.prims.convert_element_type.default, (kind,), {}),
        )
        value: Any = x
        for target, arguments, keywords in steps:
            before = value.meta.get("val") if isinstance(value, Node) else None
            value = graph.call_function(target, (value, *arguments), keywords)
            if isinstance(before, Tensor):
                value.meta["val"] = target(before, *arguments)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
