"""Kernels of quantized products, each by itself: what one gives of its inputs, beside what the file says.

Whole outputs say little of kernels: one value on the edge between two integers, which another order of float
sums puts on its other side, changes what all layers behind it get. Here ONNX Runtime's optimized graph runs
once; then the file runs with optimizations off, cut open wherever a kernel ends, so that each piece of it
gets the very values that the kernels got. Kernels are those of integers, and float ones of what was integers
before: ONNX Runtime may have quantized their weights in a way that no file says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import onnx

from quantpatch.export.onnx.sessions import changed, session_options

# What ONNX Runtime adds to the name of a value in front of which it moves a QuantizeLinear.
_MOVED_UP = "_q_to_dq"
# Products of floats, with an activation fused into them or not.
_FLOAT_PRODUCTS = ("Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul")
# What lays channels out in blocks for a float kernel.
_REORDERING = ("ReorderInput", "ReorderOutput")
# What integer kernels do besides, on their way to the QuantizeLinear.
_INTEGER_KERNELS = ("QLinear", "QGemm", "QAttention", "DynamicQuantize")
_QUANTIZE = "QuantizeLinear"
_GIVING_INTEGERS = ("QLinear", "QGemm", _QUANTIZE)
_FUSED = ("BatchNormalization", "Relu", "Clip", _QUANTIZE)


@attrs.frozen
class KernelCheck:
    """How the kernels of an optimized graph compare, each by itself.

    Attributes:
        compared: Names of the outputs of those that were compared.
        skipped: The same of those that no value of the file was found for.
        values: How many values they gave.
        within: How many of these are within a step: of integers 1, of floats 1/127 of the largest.
    """

    compared: tuple[str, ...]
    skipped: tuple[str, ...]
    values: int
    within: int

    @property
    def share(self) -> float | None:
        """The share that is within a step; None if there was nothing to compare."""
        return self.within / self.values if self.values else None


def check_kernels(path: Path, optimized: Path, feeds: Iterable[Mapping[str, Any]]) -> KernelCheck:
    """Compares the kernels of an optimized graph with the file that it was made of.

    Args:
        path: The file.
        optimized: The graph that ONNX Runtime made of it.
        feeds: Inputs to run it on.
    """
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph

    graph, file = (onnx.load(str(each), load_external_data=False) for each in (optimized, path))
    kernels = kernels_of(graph.graph)
    twins = _Twins(graph.graph, file.graph)
    found = {output: twins.of(output) for output in kernels}
    pairs = dict(pair for pair in found.values() if pair is not None)
    compared, left = ([o for o in kernels if (found[o] is None) is missing] for missing in (False, True))
    if not pairs:
        return KernelCheck((), tuple(left), 0, 0)
    own = {output.name for output in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=output) for output in pairs if output not in own)
    _cut(file, set(pairs.values()))
    off = session_options(optimized=False)
    try:
        runs = changed(graph, optimized, off)
    except InvalidGraph:  # older releases write loops and branches that they do not read again
        return KernelCheck((), tuple(kernels), 0, 0)
    pieces = changed(file, path, off)
    channels_last = {output for output in pairs if output in twins.named}
    del graph, file, twins  # with all the weights that are in them
    values = within = 0
    for feed in feeds:
        given = dict(zip([o.name for o in runs.get_outputs()], runs.run(None, dict(feed)), strict=True))
        given = {o: np.moveaxis(given[o], -1, 1) if o in channels_last else given[o] for o in pairs}
        wanted = [f"{name}.own" for name in pairs.values()]
        inside = {name: given[o] for o, name in pairs.items()}
        for expected, name in zip(pieces.run(wanted, {**feed, **inside}), pairs.values(), strict=True):
            difference = np.abs(inside[name].astype(np.float64) - expected.astype(np.float64))
            is_integer = np.issubdtype(expected.dtype, np.integer)
            step = 1.0 if is_integer or not expected.size else np.abs(expected).max() / 127 * 1.001
            values += difference.size
            within += int((difference <= step).sum())
    return KernelCheck(tuple(compared), tuple(left), values, within)


def kernels_of(graph: Any) -> list[str]:
    """Outputs of the kernels of an optimized ``onnx.GraphProto``; as integers, if they are quantized next."""
    made, users = {name: node for node in graph.node for name in node.output}, _users(graph)

    def multiplies_integers(node: Any) -> bool:
        x = made.get(node.input[0]) if node.input else None
        while x is not None and x.op_type in _REORDERING:
            x = made.get(x.input[0])
        return x is not None and x.op_type == "DequantizeLinear"

    found: list[str] = []
    for node in graph.node:
        if is_kernel(node):
            found += filter(None, node.output)
        elif node.op_type in _FLOAT_PRODUCTS and multiplies_integers(node):
            quantized = [
                user.output[0] for user in users.get(node.output[0], ()) if user.op_type == _QUANTIZE
            ]
            found += quantized or node.output[:1]
    return found


def is_kernel(node: Any) -> bool:
    """Whether a node of an optimized graph multiplies, adds, averages or puts together integers."""
    kind = node.op_type
    return kind.startswith(_INTEGER_KERNELS) or "Integer" in kind


class _Twins:
    """What values of an optimized graph are in the file it was made of."""

    def __init__(self, graph: Any, file: Any) -> None:
        self._typed = {value.name for value in (*file.value_info, *file.output)}
        self._made = {name: node for node in file.node for name in node.output}
        self.named = {node.name: node for node in file.node}
        self._made_here = {name: node for node in graph.node for name in node.output}
        self._users, self._users_in_file = _users(graph), _users(file)

    def of(self, output: str) -> tuple[str, str] | None:
        """The first value from a kernel's output on that the file has too, and its name there.

        In between are operators that only move values, which the file may have on the other side of a
        QuantizeLinear.
        """
        waiting, seen = [output], set()
        while waiting:
            value = waiting.pop(0)
            name = self._name(value)
            if name is not None:
                return value, name
            seen.add(value)
            users = [user for user in self._users.get(value, ()) if not is_kernel(user)]
            waiting += [name for user in users for name in user.output if name not in seen]
        return None

    def _name(self, value: str) -> str | None:
        """What a value is called in the file; None if it is not there.

        Where ONNX Runtime put channels last, it has the name of the node that computed it; where a
        QuantizeLinear was moved up to a float, that of the float with something added. Both are integers:
        a float of that name, as of a sum with a Relu behind it, is what is quantized later. A value that is
        only turned into the file's own has any layout: the file's own comes next, and is compared.
        """
        if value in self._made:
            return value if value in self._typed else None
        if not self._is_integer(value):
            return None
        node = self._made.get(value.removesuffix(_MOVED_UP)) or self.named.get(value)
        while node is not None and node.op_type != _QUANTIZE:
            users = self._users_in_file.get(node.output[0], [])
            fused = len(users) == 1 and users[0].op_type in _FUSED
            node = users[0] if fused else None
        if node is None or node.output[0] not in self._typed:
            return None
        turned = any(node.output[0] in user.output for user in self._users.get(value, ()))
        return None if turned else str(node.output[0])

    def _is_integer(self, value: str) -> bool:
        """Whether a value of the optimized graph is quantized: by its operator, or moved since."""
        node = self._made_here.get(value)
        while node is not None and node.op_type != "DequantizeLinear":
            if is_kernel(node) or node.op_type == _QUANTIZE:
                return str(node.op_type).startswith(_GIVING_INTEGERS)
            node = self._made_here.get(node.input[0]) if node.input else None
        return False


def _users(graph: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _cut(model: Any, names: set[str]) -> None:
    """Makes values of a graph its inputs, and what it computes of them its outputs, called ``<name>.own``."""
    graph = model.graph
    types = {value.name: value for value in (*graph.value_info, *graph.output)}
    for node in graph.node:
        for position, name in enumerate(node.output):
            if name in names:
                node.output[position] = f"{name}.own"
    del graph.output[:]
    for name in sorted(names):
        graph.input.append(types[name])
        graph.output.append(onnx.ValueInfoProto(name=f"{name}.own"))
