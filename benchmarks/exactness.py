"""Counts values on which fake quantization and ONNX Runtime differ by a bit; the count must be 0.

Run it with ``python -m benchmarks.exactness [values]``; 10**8 values by default. The graph is
``QuantizeLinear`` then ``DequantizeLinear`` with graph optimizations off.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import Integer
from quantpatch.numerics.qparams import QParams

CHUNK = 5 * 10**6
CASES = [
    (name, amax)
    for amax in (1.0, 2.7182817, 1e-6, 6.5e4, 3.3e-37)
    for name in ("int8", "uint8", "uint8_z1", "uint8_z37", "uint8_z128", "uint8_z254", "int4", "uint4")
]


def grid_of(name: str) -> QParams:
    """The grid of a name, such as ``"uint8_z37"``: with a zero point."""
    kind, _, zero_point = name.partition("_z")
    integers = Integer(int(kind.rpartition("int")[2]), unsigned=kind.startswith("u"))
    return QParams(integers, None, zero_point=int(zero_point) if zero_point else None)


def session(name: str) -> onnxruntime.InferenceSession:
    """A graph that quantizes to ``name`` and back."""
    kind, _, zero_point = name.partition("_z")
    zero = helper.make_tensor("zero", getattr(TensorProto, kind.upper()), [], [int(zero_point or 0)])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy")
    scale = helper.make_tensor_value_info("scale", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "qdq", [x, scale], [y], [zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def values(scale: np.float32, high: float, count: int, rng: np.random.Generator) -> Any:
    """A third each: all bit patterns, ties and their neighbours, a normal sample."""
    third = count // 3
    patterns = rng.integers(0, 2**32, third, dtype=np.uint64).astype(np.uint32).view(np.float32)
    patterns = np.where(np.isnan(patterns), np.float32(np.inf), patterns)
    span = int(2 * high) + 4
    ties = (rng.integers(-span, span, third) / 2).astype(np.float32) * scale
    towards = rng.choice(np.array([-np.inf, 0, np.inf], np.float32), third)
    ties = np.where(towards == 0, ties, np.nextafter(ties, towards))
    normal = rng.standard_normal(count - 2 * third, dtype=np.float32) * np.float32(scale * high / 3)
    return np.concatenate([patterns, ties, normal])


def mismatches(total: int = 10**8) -> dict[str, tuple[int, int]]:
    """Values compared and values that differ, by case."""
    rng = np.random.default_rng(0)
    counts = {}
    for name, amax in CASES:
        q, runtime = grid_of(name), session(name)
        high = q.longer_side()
        range_ = torch.tensor(amax)
        scale = (range_ / q.max()).numpy()
        wanted, differing = -(-total // len(CASES)), 0
        for start in range(0, wanted, CHUNK):
            x = values(np.float32(scale), high, min(CHUNK, wanted - start), rng)
            theirs = runtime.run(None, {"x": x, "scale": scale})[0]
            ours = fake_quantize(torch.from_numpy(x), range_, q.format, zero_point=q.zero_point).numpy()
            differing += int((ours.view(np.int32) != theirs.view(np.int32)).sum())
        counts[f"{name}, amax {amax:g}"] = (wanted, differing)
    return counts


def rows() -> list[dict[str, Any]]:
    """One row a format; the ratio is the number of values that differ."""
    together: dict[str, list[tuple[int, int]]] = {}
    for case, counted in mismatches().items():
        together.setdefault(case.split(",")[0], []).append(counted)
    table = []
    for name, counts in together.items():
        compared, differing = (sum(column) for column in zip(*counts, strict=True))
        table.append(
            {
                "name": f"{name}: values unlike ONNX Runtime's, of {compared:,}",
                "ours_ms": None,
                "baseline_ms": None,
                "ratio": differing,
                "aim": 0,
                "peers": {},
            }
        )
    return table


def main() -> None:
    counts = mismatches(int(float(sys.argv[1])) if len(sys.argv) > 1 else 10**8)
    for case, (compared, differing) in counts.items():
        print(f"{case:24s} {compared:12,d} values {differing:10,d} mismatches")
    compared, differing = (sum(column) for column in zip(*counts.values(), strict=True))
    print(f"{'together':24s} {compared:12,d} values {differing:10,d} mismatches")


if __name__ == "__main__":
    main()
