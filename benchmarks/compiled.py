"""Whole models under ``torch.compile``: quantized and compiled, to float and compiled; and graph breaks.

Compiling takes most of the time, so the encoder has two layers and the ResNet a block a stage. In eval mode a
compiled model quantizes its weights in each call; ``folded_weights`` spares it that, which stands beside it.
``torch.compile`` leaves an LSTM uncompiled, float or quantized: its rows compare what runs then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

import quantpatch as qp
from benchmarks.models import CASES, Block, evaluation, pair, step, twins
from benchmarks.timing import medians

__all__ = ["breaks", "rows", "times"]


def two_layers() -> nn.Module:
    """A transformer encoder."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def resnet() -> nn.Module:
    """A ResNet with one block where ResNet-18 has two."""
    blocks = [Block(64, 64, 1), Block(64, 128, 2), Block(128, 256, 2), Block(256, 512, 2)]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))


COMPILED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet, a block a stage": (resnet, (4, 3, 96, 96)),
    "two-layer transformer encoder": (two_layers, (4, 64, 256)),
    "two-layer LSTM": CASES["two-layer LSTM"],
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


def _compiled(model: nn.Module, whole: bool) -> nn.Module:
    return cast(nn.Module, torch.compile(model, fullgraph=whole))


def times() -> list[dict[str, Any]]:
    """Times of compiled models, to the float model compiled."""
    torch.set_num_threads(1)
    found = []
    for name, (build, shape) in COMPILED.items():
        x = torch.randn(shape)
        float_model, quantized = pair(build, x)
        whole = not name.endswith("LSTM")
        for kind, make in (("training step", step), ("eval", evaluation)):
            torch._dynamo.reset()
            runs = {
                "float": make(_compiled(float_model, whole), x),
                "ours": make(_compiled(quantized, whole), x),
            }
            measured = medians(runs, repeats=15)
            ratios = {}
            if kind == "eval" and whole:
                with qp.folded_weights(quantized):
                    folded = medians(runs, repeats=15)
                ratios["ours with folded weights"] = folded["ours"] / folded["float"]
            found.append(
                {
                    "name": f"{name}, {'compiled' if whole else 'left uncompiled by torch'}: {kind}",
                    "ours_ms": measured["ours"],
                    "baseline_ms": measured["float"],
                    "ratio": measured["ours"] / measured["float"],
                    "aim": 1.1,
                    "peers": ratios,
                }
            )
    return found


def breaks() -> list[dict[str, Any]]:
    """Graph breaks of ours, of the float model and of each peer's."""
    found = []
    for name, (build, shape) in COMPILED.items():
        x = torch.randn(shape)
        float_model, quantized = pair(build, x)
        ours = graph_breaks(quantized.train(), x)
        others, missing = twins(float_model, x)
        peers = {peer: graph_breaks(twin.train(), x) for peer, twin in others.items()}
        found.append(
            {
                "name": f"{name}: graph breaks",
                "ours_ms": None,
                "baseline_ms": None,
                "ratio": ours,
                "aim": 0,
                "peers": {"float": graph_breaks(float_model.train(), x), **peers, **missing},
            }
        )
    return found


def rows() -> list[dict[str, Any]]:
    """Times of ours, then the graph breaks of ours and of each peer's."""
    return [*times(), *breaks()]


if __name__ == "__main__":
    # One half may be asked for by name.
    for part in sys.argv[1:] or ("times", "breaks"):
        for row in {"times": times, "breaks": breaks}[part]():
            print(row, flush=True)
