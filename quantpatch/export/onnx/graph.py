"""What passes over the exported graph are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from quantpatch.dataflow import PASSED_NODES


def constant(graph: Any, name: str, array: Any, kind: Any = None) -> Any:
    """An initializer of a name; the one that is there already if there is one."""
    known = graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.Tensor(array, dtype=kind, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def constant_of(graph: Any, value: Any) -> Any:
    """The tensor that a value is a constant of; None if it is computed."""
    return value.const_value if value is not None and value.name in graph.initializers else None


def maker(value: Any, *kinds: str) -> Any:
    """The node that a value comes from if it is of one of these kinds, else None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in kinds else None


def is_float8(value: Any) -> bool:
    """Whether a value is of FP8."""
    return value is not None and value.dtype in (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)


def quantizers_behind(value: Any) -> tuple[list[Any], bool]:
    """The QuantizeLinears that a value goes into, an activation at most before; and whether that is all."""
    found, is_all = [], not value.is_graph_output() and bool(value.uses())
    for use in value.uses():
        if use.node.op_type == "QuantizeLinear":
            found.append(use.node)
        elif use.node.op_type in PASSED_NODES and use.idx == 0:
            more, only = quantizers_behind(use.node.outputs[0])
            found += more
            is_all = is_all and only
        else:
            is_all = False
    return found, is_all


def attributes_of(node: Any) -> dict[str, Any]:
    """A node's attributes by name: numbers, tuples and strings."""
    return {key: attribute.value for key, attribute in node.attributes.items()}


def replaced(graph: Any, node: Any, steps: Sequence[Any]) -> None:
    """Puts nodes in the place of one; the last one's output takes its output's name, type and shape."""
    old, new = node.outputs[0], steps[-1].outputs[0]
    name = old.name
    for step in steps[:-1]:
        step.outputs[0].name = step.outputs[0].name or f"{name}.{step.op_type.lower()}"
        step.outputs[0].type = step.outputs[0].type or old.type
    old.name = f"{name}.{node.op_type.lower()}"
    new.name, new.type, new.shape = name, old.type, old.shape
    graph.insert_before(node, steps)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def store_four_bits(graph: Any) -> None:
    """Casts of constants to 4 bits, which torch has no type for, become constants of 4 bits."""
    for node in list(graph):
        if node.op_type != "Cast" or constant_of(graph, node.inputs[0]) is None:
            continue
        kind = ir.DataType(node.attributes["to"].as_int())
        if kind not in (ir.DataType.INT4, ir.DataType.UINT4):
            continue
        source = node.inputs[0]
        codes = source.const_value.numpy().astype(kind.numpy())
        new = constant(graph, f"{source.name}.{kind.name.lower()}", codes, kind)
        ir.convenience.replace_all_uses_with(node.outputs[0], new)
        graph.remove(node, safe=True)
