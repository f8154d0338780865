"""Exported files in ONNX Runtime: int8 against float, beside onnxruntime.quantization.quantize_static.

Each model is exported once as float and once quantized by quantpatch, from the same weights and calibration
data as quantize_static gets. Latency is of one thread on the CPU provider with all optimizations.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantpatch as qp
from benchmarks.timing import medians
from quantpatch.demo import build_model
from quantpatch.export import export_onnx, fold_batchnorm, quantize_conv_outputs, use_unsigned

__all__ = ["rows"]


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.down = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.down(x))


def small_resnet() -> nn.Module:
    """A ResNet of six blocks for images of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        *(
            _Block(*sizes)
            for sizes in ((32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1))
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 100),
    )


def plain_cnn() -> nn.Module:
    """Convolutions one after the other, for digits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 10),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small ResNet": (small_resnet, (1, 3, 96, 96)),
    "plain CNN": (plain_cnn, (1, 1, 28, 28)),
    "demo CNN": (build_model, (64, 1, 8, 8)),
}


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _static(float_path: Path, path: Path, batches: list[Tensor]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Any:
            batch = next(self.left, None)
            return None if batch is None else {"x": batch.numpy()}

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(str(float_path), str(prepared))
    # Weights per channel, and activations as uint8: its default, int8, is slower on x86.
    quantize_static(str(prepared), str(path), Reader(), per_channel=True, activation_type=QuantType.QUInt8)


def measure(name: str) -> dict[str, Any]:
    """A row for one model."""
    build, shape = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2.0)
    batches = [torch.randn(shape) for _ in range(16)]
    quantized = copy.deepcopy(model)
    fold_batchnorm(quantized)
    qp.convert(quantized, skip=["AdaptiveAvgPool2d"])
    quantize_conv_outputs(quantized)
    qp.calibrate(quantized, batches, progress=False)
    use_unsigned(quantized, batches)
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"{kind}.onnx" for kind in ("float", "ours", "static")}
        x = batches[0]
        export_onnx(model, x, paths["float"], input_names=["x"], check=False)
        report = export_onnx(quantized, x, paths["ours"], input_names=["x"])
        logging.getLogger().setLevel(logging.ERROR)  # quantize_static's advice goes to the root logger
        _static(paths["float"], paths["static"], batches)
        sessions = {kind: _session(path) for kind, path in paths.items()}
        times = medians(
            {kind: lambda s=s: s.run(None, {"x": x.numpy()}) for kind, s in sessions.items()}, repeats=51
        )
        tests = [torch.randn(shape) for _ in range(16)]
        outputs = {
            kind: torch.stack([torch.from_numpy(s.run(None, {"x": t.numpy()})[0]) for t in tests])
            for kind, s in sessions.items()
        }
        sizes = {kind: path.stat().st_size for kind, path in paths.items()}

    def error(kind: str) -> float:
        difference = outputs[kind] - outputs["float"]
        return (difference.norm() / outputs["float"].norm()).item()

    assert report.comparison is not None
    return {
        "name": f"{name} on ONNX Runtime",
        "ours_ms": times["ours"],
        "baseline_ms": times["float"],
        "ratio": times["ours"] / times["float"],
        "aim": times["static"] / times["float"],
        "peers": {
            "quantize_static (ms)": times["static"],
            "error": error("ours"),
            "its error": error("static"),
            "differing integers": report.comparison.differing_share,
            "size to float": sizes["ours"] / sizes["float"],
        },
    }


def rows() -> list[dict[str, Any]]:
    """A row for each model; the aim is quantize_static's ratio to float."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [measure(name) for name in CASES]


if __name__ == "__main__":
    for row in rows():
        peers = ", ".join(f"{key} {value:.3g}" for key, value in row["peers"].items())
        print(
            f"{row['name']:30} {row['ours_ms']:8.3f} ms, float {row['baseline_ms']:.3f} ms, "
            f"ratio {row['ratio']:.2f} (aim {row['aim']:.2f}); {peers}"
        )
