"""How long a file takes beside the same one in float, and what in it runs on floats nevertheless.

Quantizing does not gain time by itself: a layer without an integer kernel takes the time of the float one and
that of the conversions around it. The graph does not show that, so the export measures it, and says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from quantpatch.export.onnx.graph import constant_of, maker, store_four_bits
from quantpatch.export.onnx.kernel_check import is_kernel
from quantpatch.export.onnx.weights import fold_weight
from quantpatch.export.prepare.exported import ExportedQuantizer
from quantpatch.layers.operations import quantizer_name
from quantpatch.numerics.formats import Integer
from quantpatch.plugins.runtime import OpenedFile
from quantpatch.reports.latency import medians
from quantpatch.torch_tools import nn

# Rounds to measure at most and at least, and after how many seconds no other one begins.
_ROUNDS, _LEAST, _SECONDS = 21, 3, 0.5
# The kernel of weights in blocks of 4 bits.
_IN_BLOCKS = "MatMulNBits"


# --- The same file in float ---------------------------------------------------------------------------------


def float_twin(model: Any, found: Collection[ExportedQuantizer]) -> Any:
    """A copy of what the exporter made, without quantizers: weights are floats once the file is loaded.

    Args:
        model: An ``onnx_ir.Model``, not tidied yet.
        found: The quantizers in it.
    """
    twin = ir.from_proto(ir.to_proto(model))
    graph = twin.graph
    store_four_bits(graph)
    clipping = {operand.name for operand in found if operand.is_clipped}
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            continue
        quantize = maker(node.inputs[0], "QuantizeLinear")
        if quantize is not None:
            x = quantize.inputs[0]
            clip = maker(x, "Clip")
            if clip is not None and quantize.outputs[0].name.partition(".codes")[0] in clipping:
                x = clip.inputs[0]  # which is of the quantizer
            ir.convenience.replace_all_uses_with(node.outputs[0], x, replace_graph_outputs=True)
            graph.remove(node, safe=True)
        elif all(constant_of(graph, value) is not None for value in node.inputs[:2]):
            fold_weight(graph, node)
    common.RemoveUnusedNodesPass()(twin)
    return twin


# --- Measuring ----------------------------------------------------------------------------------------------


def measure(
    opens: Callable[[Path, int | None], OpenedFile], path: Path, float_path: Path, feed: Mapping[str, Any]
) -> tuple[float, float]:
    """Medians of the times that two files take, in ms, run in turn.

    Args:
        opens: What opens them, of a ``Runtime``.
        path: The file.
        float_path: The same in float.
        feed: What to run them on.
    """
    opened = [opens(each, None) for each in (path, float_path)]
    calls = [functools.partial(run, feed) for run in opened]
    own, as_float = medians(calls, seconds=_SECONDS / 2, least=_LEAST, most=_ROUNDS)
    return own, as_float


def kernels_of_weights(
    file: Any, optimized: Any, found: Collection[ExportedQuantizer]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The layers whose weights are quantized in a file: what runs each on integers, and those on floats.

    Args:
        file: The file, an ``onnx.ModelProto``.
        optimized: What ONNX Runtime made of it.
        found: The quantizers in it.
    """
    taken: dict[str, str] = {}
    for node in optimized.graph.node:
        if is_kernel(node) or node.op_type == _IN_BLOCKS:
            taken |= dict.fromkeys(node.input, node.op_type)
    return by_layer(found, (tensor.name for tensor in file.graph.initializer), taken)


def by_layer(
    found: Collection[ExportedQuantizer], constants: Iterable[str], taken: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The layers whose weights are quantized in a file: what runs each on integers, and those on floats.

    Args:
        found: The quantizers in the file.
        constants: What is stored in it, by name.
        taken: The integer kernels by the names of the constants that they take.
    """
    quantizers = [operand.name for operand in found if operand.weight is not None]
    stored = _named(quantizers, constants)
    kernels = {name: kernel for constant, kernel in taken.items() for name in _named(quantizers, [constant])}
    on_floats = dict.fromkeys(_layer(name) for name in quantizers if name in stored and name not in kernels)
    on_integers = {_layer(name): kernels[name] for name in quantizers if name in kernels}
    return {k: v for k, v in on_integers.items() if k not in on_floats}, tuple(on_floats)


def _layer(quantizer: str) -> str:
    return quantizer.rpartition(".")[0] or "the model"


def without_kernels(layers: Collection[str], found: Collection[ExportedQuantizer]) -> tuple[str, ...]:
    """The formats of activations that integer kernels do not take, or only behind a float operator.

    Args:
        layers: Those that run on floats.
        found: The quantizers in the file.
    """
    activations: dict[str, ExportedQuantizer] = {}
    for operand in found:
        if operand.weight is None and not operand.name.endswith(quantizer_name("output")):
            activations.setdefault(_layer(operand.name), operand)
    formats = ["float" for layer in layers if layer not in activations]
    for layer, operand in activations.items():
        kernel = isinstance(operand.format, Integer) and operand.format.bits == 8
        if operand.is_clipped or (layer in layers and not kernel):
            formats.append(operand.format.name)
    return tuple(dict.fromkeys(formats))


def padded(found: Collection[ExportedQuantizer]) -> tuple[str, ...]:
    """The convolutions of images with so few channels that integer kernels add some."""
    layers = {_layer(operand.name): operand.layer for operand in found if operand.weight is not None}
    few = (n for n, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.in_channels < 4)
    return tuple(name for name in few if layers[name].groups == 1)


def _named(quantizers: Collection[str], constants: Any) -> set[str]:
    """The quantizers that constants are called after, as the exporter does it."""
    found = (name.rpartition("_quantizer.")[0] + "_quantizer" for name in constants if "_quantizer." in name)
    return {name for name in found if name in quantizers}
