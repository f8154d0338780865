"""Passes over the exported graph: what runs faster or is smaller, and computes the same.

Each looks only at what the exporter itself makes of quantized layers, and leaves alone what it does not know.
"""

from __future__ import annotations

from typing import Any

__all__ = ["tidy"]


def tidy(model: Any, target: str) -> None:
    """Stores 4-bit codes as such, turns weights the way kernels want them, and shares what is there twice.

    Args:
        model: An ``onnx_ir.Model``; changed in place.
        target: As in ``export_onnx``.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    _store_four_bits(model.graph)
    if target == "onnxruntime":
        _turn_weights(model.graph)
        _subtract_biases(model.graph)
    ir.passes.Sequential(
        common.ClearMetadataAndDocStringPass(),  # stack traces, with the paths of whoever exports
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )(model)


def _new_constant(graph: Any, name: str, array: Any, kind: Any) -> Any:
    import onnx_ir as ir

    known = graph.initializers.get(name)
    if known is not None:
        return known
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(kind),
        const_value=ir.Tensor(array, dtype=kind, name=name),
    )
    graph.register_initializer(value)
    return value


def _is_constant(graph: Any, value: Any) -> bool:
    return value is not None and value.name in graph.initializers and value.const_value is not None


def _store_four_bits(graph: Any) -> None:
    """Casts of constants to 4 bits, which torch has no type for, become constants of 4 bits."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Cast" or not _is_constant(graph, node.inputs[0]):
            continue
        kind = ir.DataType(node.attributes["to"].as_int())
        if kind not in (ir.DataType.INT4, ir.DataType.UINT4):
            continue
        source = node.inputs[0]
        codes = source.const_value.numpy().astype(kind.numpy())
        new = _new_constant(graph, f"{source.name}.{kind.name.lower()}", codes, kind)
        ir.convenience.replace_all_uses_with(node.outputs[0], new)
        graph.remove(node, safe=True)


def _turn_weights(graph: Any) -> None:
    """Weights of linear layers become (in, out) constants of a MatMul.

    torch keeps them (out, in). ONNX Runtime has integer kernels for MatMul with a constant of its own
    layout, also where the scales are per channel.
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type == "Transpose":
            turned = _turned(graph, node.inputs[0])
            perm = node.attributes.get("perm")
            if turned is not None and (perm is None or list(perm.as_ints()) == [1, 0]):
                ir.convenience.replace_all_uses_with(node.outputs[0], turned)
                graph.remove(node, safe=True)
        elif node.op_type == "Gemm" and _is_linear(node):
            turned = _turned(graph, node.inputs[1])
            if turned is None:
                continue
            steps = [ir.node("MatMul", [node.inputs[0], turned])]
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                steps.append(ir.node("Add", [steps[-1].outputs[0], node.inputs[2]]))
            output = node.outputs[0]
            name = output.name
            for step in steps[:-1]:
                step.outputs[0].name = f"{name}.{step.op_type.lower()}"
                step.outputs[0].type = output.type
            output.name = f"{name}.gemm"
            result = steps[-1].outputs[0]
            result.name, result.type, result.shape = name, output.type, output.shape
            graph.insert_before(node, steps)
            ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _subtract_biases(graph: Any) -> None:
    """After a product with quantized weights a bias is subtracted, negated: the same sum, bit for bit.

    Of a MatMul and an Add ONNX Runtime makes a Gemm, and its integer kernel for that takes only a bias that
    is rounded to integers.
    """
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Add":
            continue
        product, bias = node.inputs
        if _is_constant(graph, product):
            product, bias = bias, product
        if not _is_constant(graph, bias) or not _is_product(product):
            continue
        negated = _new_constant(
            graph, f"{bias.name}.negated", -bias.const_value.numpy(), bias.const_value.dtype
        )
        difference = ir.node("Sub", [product, negated])
        old, new = node.outputs[0], difference.outputs[0]
        name = old.name
        old.name = f"{name}.added"
        new.name, new.type, new.shape = name, old.type, old.shape
        graph.insert_before(node, difference)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _is_product(value: Any) -> bool:
    """Whether a value is a MatMul of two dequantized operands."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "MatMul":
        return False
    makers = [operand.producer() for operand in node.inputs]
    return all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)


def _is_linear(gemm: Any) -> bool:
    def number(name: str, default: float) -> float:
        attribute = gemm.attributes.get(name)
        return default if attribute is None else float(attribute.value)

    return (number("alpha", 1), number("beta", 1), number("transA", 0), number("transB", 0)) == (1, 1, 0, 1)


def _turned(graph: Any, value: Any) -> Any:
    """The transpose of a matrix that is dequantized from a constant; None if it is none."""
    import onnx_ir as ir

    node = value.producer()
    if (
        node is None
        or node.op_type != "DequantizeLinear"
        or len([i for i in node.inputs if i is not None]) != 2
    ):
        return None
    codes, scale = node.inputs
    if not (_is_constant(graph, codes) and _is_constant(graph, scale)) or len(codes.shape) != 2:
        return None
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    array = codes.const_value.numpy().T.copy()
    new_codes = _new_constant(graph, f"{codes.name}.T", array, codes.const_value.dtype)
    new_scale = scale
    if len(scale.shape) == 2:
        array = scale.const_value.numpy().T.copy()
        new_scale = _new_constant(graph, f"{scale.name}.T", array, scale.const_value.dtype)
    if "axis" in attributes:
        attributes["axis"] = 1 - attributes["axis"] % 2
    new = ir.node("DequantizeLinear", [new_codes, new_scale], attributes)
    new.outputs[0].name = f"{value.name}.T"
    new.outputs[0].type = value.type
    new.outputs[0].shape = ir.Shape([codes.shape[1], codes.shape[0]])
    graph.insert_before(node, new)
    return new.outputs[0]
