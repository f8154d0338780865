"""The constants of a program that is to be compiled: weights as integers, or as floats."""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import Tensor
from torch.fx import GraphModule, Node

DEQUANTIZE_CHANNELS = torch.ops.quantized_decomposed.dequantize_per_channel.default
DEQUANTIZE_BLOCKS = torch.ops.quantized_decomposed.dequantize_per_channel_group.default


def constant_of(module: GraphModule, node: Any) -> Tensor | None:
    """The tensor that a node is, if it is a constant."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    name = str(node.target)
    value: Any = module
    for part in [name] if hasattr(module, name) else name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def as_constant(module: GraphModule, node: Node) -> None:
    """A weight that no kernel takes as integers is a constant of floats, and not computed at each call."""
    tensors = [constant_of(module, argument) for argument in node.args[:3]]
    if any(tensor is None for tensor in tensors):
        return
    with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
        floats = node.target(*[tensor.detach() for tensor in tensors if tensor is not None], *node.args[3:])  # type: ignore[operator]
    constant = new_constant(module, node, floats)
    constant.meta.update(node.meta)
    node.replace_all_uses_with(constant)
    node.graph.erase_node(node)


def new_constant(module: GraphModule, before: Node, tensor: Tensor) -> Node:
    """A constant of a program, for use from a node on."""
    name = f"_constant_{sum(1 for _ in module.buffers(recurse=False))}"
    module.register_buffer(name, tensor)
    with before.graph.inserting_before(before):
        return before.graph.create_node("get_attr", name)
