"""Whole models, quantized against float: a training step and an evaluation, eager and compiled."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import quantpatch as qp
from benchmarks.timing import medians

__all__ = ["rows"]


class Block(nn.Module):
    """A residual block as in ResNet-18."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.down = (
            nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
            if stride != 1 or inside != outside
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.down(x))


def resnet18() -> nn.Module:
    """ResNet-18 for images of any size."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    width = 64
    for outside in (64, 128, 256, 512):
        layers += [Block(width, outside, 1 if outside == 64 else 2), Block(outside, outside, 1)]
        width = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))


def encoder() -> nn.Module:
    """A six-layer transformer encoder."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


class Recurrent(nn.Module):
    """A two-layer LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(128, 256, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": (resnet18, (4, 3, 96, 96)),
    "transformer encoder": (encoder, (4, 64, 256)),
    "two-layer LSTM": (Recurrent, (8, 64, 128)),
}


def pair(build: Callable[[], nn.Module], x: Tensor) -> tuple[nn.Module, nn.Module]:
    """A float model and its calibrated quantized twin."""
    torch.manual_seed(0)
    model = build()
    twin = copy.deepcopy(model)
    qp.convert(twin)
    qp.calibrate(twin, [x], progress=False, strict=False)
    return model, twin


def modelopt(model: nn.Module, x: Tensor) -> nn.Module:
    """NVIDIA ModelOpt with its default int8 configuration."""
    import modelopt.torch.quantization as mtq

    with contextlib.redirect_stdout(io.StringIO()):
        quantized: nn.Module = mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, lambda m: m(x))
    return quantized


def quanto(model: nn.Module, x: Tensor) -> nn.Module:
    """optimum-quanto with int8 weights and activations."""
    from optimum.quanto import Calibration, qint8, quantize

    quantized = copy.deepcopy(model)
    quantize(quantized, weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration():
        quantized(x)
    return quantized


PEERS = {"modelopt": modelopt, "quanto": quanto}


def twins(model: nn.Module, x: Tensor) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The model as each peer quantizes it, and why not where one does not."""
    made: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[name] = make(model, x)
        except Exception as error:  # a peer that fails is a result as well  # noqa: PERF203
            missing[name] = type(error).__name__
    return made, missing


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A training step without the optimizer, which both sides share."""
    model.train()

    def run() -> None:
        model(x).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


def evaluation(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward pass in eval mode."""
    model.eval()

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def rows() -> list[dict[str, Any]]:
    """A row for each model and kind of run; ratios to the float model."""
    torch.set_num_threads(1)
    found = []
    for name, (build, shape) in CASES.items():
        x = torch.randn(shape)
        for kind, make, aim in (("training step", step, 1.15), ("eval", evaluation, 1.2)):
            float_model, quantized = pair(build, x)
            others, missing = twins(float_model, x)
            runs = {"float": make(float_model, x), "ours": make(quantized, x)}
            for peer, twin in others.items():
                try:
                    runs[peer] = make(twin, x)
                    runs[peer]()
                except Exception as error:  # noqa: PERF203
                    runs.pop(peer, None)
                    missing[peer] = type(error).__name__
            times = medians(runs, repeats=7)
            if name.endswith("LSTM"):
                aim = 1.1
            found.append(
                {
                    "name": f"{name}: {kind}",
                    "ours_ms": times["ours"],
                    "baseline_ms": times["float"],
                    "ratio": times["ours"] / times["float"],
                    "aim": aim,
                    "peers": {**{p: times[p] / times["float"] for p in others if p in times}, **missing},
                }
            )
    return found


if __name__ == "__main__":
    for row in rows():
        print(
            f"{row['name']:40} {row['ours_ms']:9.2f} ms  ratio {row['ratio']:.2f} (aim {row['aim']})",
            row["peers"],
        )
