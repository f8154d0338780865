"""``lower``: latency on integer kernels of PyTorch's compiler, to the float model compiled by the same.

Beside it: eager, bfloat16 compiled, the file of ``export_onnx`` in ONNX Runtime, and, where torchao is
installed, its PT2E flow with the quantizer for x86. One thread. The error is that of the output to the float
model's.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantpatch as qp
from benchmarks.networks import Transformer, UNet, mobilenet, small_resnet
from benchmarks.timing import medians

__all__ = ["rows"]

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "ResNet, 96 x 96": (small_resnet, lambda: torch.randn(1, 3, 96, 96)),
    "MobileNetV3-small, 96 x 96": (mobilenet, lambda: torch.randn(1, 3, 96, 96)),
    "U-Net, 64 x 64": (UNet, lambda: torch.randn(1, 3, 64, 64)),
    "BERT, 4 layers of 256, 64 tokens": (
        lambda: Transformer("BERT"),
        lambda: torch.randint(0, 1000, (1, 64)),
    ),
    "GPT-2, 4 layers of 256, 32 tokens": (
        lambda: Transformer("GPT-2"),
        lambda: torch.randint(0, 1000, (1, 32)),
    ),
    "MLP of a transformer, 32 rows": (
        lambda: nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)),
        lambda: torch.randn(32, 768),
    ),
}


def calibrated(build: Callable[[], nn.Module], x: Tensor, runtime: str) -> nn.Module:
    """A quantized model, prepared and calibrated."""
    torch.manual_seed(0)
    with qp.quantize_modules():
        model = build().eval()
    qp.prepare(model, x, runtime=runtime)
    qp.calibrate(model, [x], progress=False)
    return model


def compiled(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """The model by torch.compile, its weights constants."""
    from torch._inductor import config

    torch._dynamo.reset()
    run = torch.compile(model)
    with config.patch(freezing=True), torch.no_grad():
        run(x)
    return lambda: run(x)


def in_onnxruntime(build: Callable[[], nn.Module], x: Tensor) -> Callable[[], Any]:
    """The file of ``export_onnx``, on one thread."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        qp.export_onnx(calibrated(build, x, "onnxruntime"), x, path, check=False, progress=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def by_torchao(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Torchao's PT2E flow: exported, annotated for x86, calibrated, converted, compiled with freezing."""
    flow: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86: Any = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = flow.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    prepared(x)
    return compiled(flow.convert_pt2e(prepared), x)


def row(name: str) -> dict[str, Any]:
    """What one model takes in each way."""
    build, inputs = CASES[name]
    torch.manual_seed(1)
    x = inputs()
    torch.manual_seed(0)
    model = build().eval()
    quantized = calibrated(build, x, "inductor")
    lowered = qp.lower(quantized, x, latency=False, progress=False)
    half, few = copy.deepcopy(model).bfloat16(), x.bfloat16() if x.is_floating_point() else x
    runs: dict[str, Callable[[], Any]] = {
        "lowered": lambda: lowered(x),
        "float compiled": compiled(model, x),
        "eager": lambda: model(x),
        "bfloat16 compiled": compiled(half, few),
    }
    left_out = {}
    for other, make in (
        ("ONNX Runtime", lambda: in_onnxruntime(build, x)),
        ("torchao PT2E", lambda: by_torchao(model, x)),
    ):
        try:
            runs[other] = make()
        except Exception as error:  # noqa: PERF203  # not installed, or not of this torch: said in the table
            left_out[other] = type(error).__name__
    with torch.no_grad():
        ms = medians(runs)
        off, size = lowered(x) - model(x), model(x)
    report = lowered.report
    assert report.comparison is not None
    layers = f"{len(report.integers)} of {len(report.integers) + len(report.skipped)}"
    return {
        "name": f"{name} ({report.instructions})",
        "ours_ms": ms["lowered"],
        "baseline_ms": ms["float compiled"],
        "ratio": ms["lowered"] / ms["float compiled"],
        "aim": 0.5,
        "peers": {
            **{other: taken for other, taken in ms.items() if other not in ("lowered", "float compiled")},
            **left_out,
            "error": float(off.norm() / size.norm()),
            "layers on integers": layers,
            "integers that differ": f"{report.comparison.differing} of {report.comparison.integers}",
        },
    }


def rows() -> list[dict[str, Any]]:
    """A row for each model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row(name) for name in CASES]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for each in rows():
        print(each)
