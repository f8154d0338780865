"""A file in OpenVINO: opened, and which layers run on integers, as OpenVINO's own graph has them.

By its defaults OpenVINO computes what is float in bfloat16 where the processor has instructions for it, and
rounds the activations of weight-only layers to 8 bits. No file says that, so it is opened for accuracy here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from quantpatch.errors import MissingExtraError
from quantpatch.export.onnx.latency import by_layer
from quantpatch.plugins.runtime import Kernels, OpenedFile, WrittenFile

try:
    import openvino
except ImportError:
    raise MissingExtraError.of("openvino", "openvino", "running a file in OpenVINO") from None

#: What makes OpenVINO compute what a file says.
ACCURATE = {"EXECUTION_MODE_HINT": "ACCURACY"}
_INTEGERS = ("i8", "u8", "i4", "u4")
# What stands in a file between a weight and what multiplies it.
_DEQUANTIZING = ("Cast", "DequantizeLinear", "Reshape", "Transpose")
# What multiplies; a "Subgraph" is several operators in one kernel.
_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "Subgraph")


def open_file(path: Path, threads: int | None) -> OpenedFile:
    """A file in OpenVINO, compiled for the CPU, and for accuracy.

    Args:
        path: The file.
        threads: How many threads run it; None for OpenVINO's default.
    """
    request = _compiled(path, threads).create_infer_request()

    def run(feed: Mapping[str, Any]) -> Sequence[Any]:
        return list(request.infer(dict(feed)).values())

    return run


def _compiled(path: Path, threads: int | None = None, options: Mapping[str, Any] = ACCURATE) -> Any:
    some = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
    return openvino.Core().compile_model(str(path), "CPU", {**options, **some})


def kernels(file: WrittenFile) -> Kernels:
    """What runs on integers, and what OpenVINO's defaults compute otherwise.

    Args:
        file: The file, and the quantizers in it.
    """
    compiled = _compiled(file.path)
    graph = onnx.load(str(file.path), load_external_data=False).graph
    weights = _weights_of_products(graph)
    taken = dict(_products(compiled.get_runtime_model(), weights))
    on_integers, on_floats = by_layer(file.found, (tensor.name for tensor in graph.initializer), taken)
    return Kernels(on_floats=on_floats, on_integers=on_integers, unlike=_unlike(compiled, file))


def _weights_of_products(graph: Any) -> dict[str, list[str]]:
    """The constants that each operator of a file takes, dequantized, by the names that OpenVINO gives it."""
    made = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    found: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            while name in made and made[name].op_type in _DEQUANTIZING:
                name = made[name].input[0]
            if name in constants:
                for own in (node.name, *node.output):
                    found.setdefault(own, []).append(name)
    return found


def _products(graph: Any, weights: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Of each product on integers: the constants of the file that it takes as integers, and what it is."""
    constants = {name for names in weights.values() for name in names}
    for node in graph.get_ordered_ops():
        kind, precision, names = (
            node.get_rt_info()[key].astype(str)
            for key in ("layerType", "runtimePrecision", "originalLayersNames")
        )
        if kind not in _PRODUCTS or (precision not in _INTEGERS and kind != "Subgraph"):
            continue
        for value in node.inputs():
            source = value.get_source_output().get_node()
            info = source.get_rt_info()
            if info["layerType"].astype(str) != "Const":
                continue
            if info["outputPrecisions"].astype(str) not in _INTEGERS:
                continue
            own = source.get_friendly_name()
            # One that OpenVINO packed otherwise has another name.
            others = [n for name in names.split(",") for n in weights.get(name.partition("/")[0], [])]
            for constant in [own] if own in constants else others:
                yield constant, f"{kind}, {precision}"


def _unlike(compiled: Any, file: WrittenFile) -> str:
    """What OpenVINO computes otherwise than the file says if it is given no hint."""
    weights = {id(operand.layer) for operand in file.found if operand.weight is not None}
    activations = {id(operand.layer) for operand in file.found if operand.weight is None}
    default = _compiled(file.path, None, {}).get_property("INFERENCE_PRECISION_HINT")
    said = []
    if default == openvino.Type.bf16:
        said.append("computes in bfloat16 what is float")
    if weights - activations:
        said.append("rounds the activations of layers whose weights alone are quantized to 8 bits")
    if not said:
        return ""
    return (
        f"by its defaults OpenVINO {' and '.join(said)} here; what was compared and measured is "
        f"compile_model(path, 'CPU', {ACCURATE})"
    )
