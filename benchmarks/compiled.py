"""Whole models under ``torch.compile``: quantized and compiled, to float and compiled; and graph breaks.

The encoder has two layers here, since compiling takes longest. In eval mode a compiled model quantizes its
weights in each call; ``fold_weights`` spares it that, which is told beside it. The LSTM is not among the
times: ``torch.compile`` leaves it uncompiled, float or quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import quantpatch as qp
from benchmarks.models import CASES, evaluation, pair, step, twins
from benchmarks.timing import medians

__all__ = ["rows"]


def two_layers() -> nn.Module:
    """A transformer encoder."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


COMPILED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": CASES["ResNet-18"],
    "two-layer transformer encoder": (two_layers, (4, 64, 256)),
}


def graph_breaks(model: nn.Module, x: Tensor) -> int | str:
    """How often tracing the model stops and starts again."""
    torch._dynamo.reset()
    try:
        found = torch._dynamo.explain(model)(x)
    except Exception as error:
        return type(error).__name__
    # Of a model that is left uncompiled as a whole there is no graph.
    return found.graph_break_count if found.graph_count else "not compiled"


def rows() -> list[dict[str, Any]]:
    """Times of compiled models, then the graph breaks of ours and of each peer's."""
    torch.set_num_threads(1)
    found = []
    for name, (build, shape) in COMPILED.items():
        x = torch.randn(shape)
        float_model, quantized = pair(build, x)
        for kind, make in (("training step", step), ("eval", evaluation)):
            torch._dynamo.reset()
            runs = {
                "float": make(torch.compile(float_model, fullgraph=True), x),
                "ours": make(torch.compile(quantized, fullgraph=True), x),
            }
            times = medians(runs, repeats=11)
            ratios = {}
            if kind == "eval":
                with qp.fold_weights(quantized):
                    runs["ours"] = make(torch.compile(quantized, fullgraph=True), x)
                    folded = medians(runs, repeats=11)
                ratios["ours with folded weights"] = folded["ours"] / folded["float"]
            found.append(
                {
                    "name": f"{name}, compiled: {kind}",
                    "ours_ms": times["ours"],
                    "baseline_ms": times["float"],
                    "ratio": times["ours"] / times["float"],
                    "aim": 1.1,
                    "peers": ratios,
                }
            )
    for name, (build, shape) in CASES.items():
        x = torch.randn(shape)
        float_model, quantized = pair(build, x)
        others, missing = twins(float_model, x)
        breaks = {peer: graph_breaks(twin.train(), x) for peer, twin in others.items()}
        found.append(
            {
                "name": f"{name}: graph breaks",
                "ours_ms": None,
                "baseline_ms": None,
                "ratio": graph_breaks(quantized.train(), x),
                "aim": 0,
                "peers": {"float": graph_breaks(float_model.train(), x), **breaks, **missing},
            }
        )
    return found


if __name__ == "__main__":
    for row in rows():
        print(row)
