"""Exported files in ONNX Runtime: int8 against float, beside onnxruntime.quantization.quantize_static.

Each model is exported once as float and once quantized by quantpatch, from the same weights and calibration
data as quantize_static gets, whose activations are uint8 (its default, int8, is slower on x86) and whose
weights have a range for each channel. Latency is of one thread on the CPU provider with all optimizations,
medians of runs in turn. The error is that of the output on data that calibration did not see, to the float
file's; two networks are trained, and have an accuracy.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantpatch as qp
from benchmarks.networks import (
    Inception,
    LanguageModel,
    Pyramid,
    Transformer,
    UNet,
    decoder,
    mobilenet,
    plain_cnn,
    recognizer,
    resnet_stem,
    segmentation_head,
    small_resnet,
    strided,
    volumes,
)
from benchmarks.timing import medians
from quantpatch.cli import demo
from quantpatch.export import ExportReport

__all__ = ["rows"]

_FILES = ("float", "ours", "static")

Batches = list[Tensor]


def _digits_cnn() -> nn.Module:
    """The demo's network, trained as the demo does."""
    model = demo.build_model()
    demo.train(model, demo.load_data()[0], 20, 3e-3)
    return model


def as_photographs(images: Tensor) -> Tensor:
    """Digits in the size and the channels that a MobileNet wants."""
    return nn.functional.interpolate(images.expand(-1, 3, -1, -1), size=(64, 64), mode="bilinear")


def digits_mobilenet() -> nn.Module:
    """A MobileNetV3-small, trained on the demo's digits."""
    images, labels = demo.load_data()[0]
    # Channels last take half the time on a CPU.
    photographs = as_photographs(images).contiguous(memory_format=torch.channels_last)
    model = mobilenet()
    demo.train(model, (photographs, labels), 8, 2e-3)
    return model


def _digits() -> tuple[Batches, Batches]:
    batches = demo.load_data()[0][0].split(64)
    return list(batches[:10]), list(batches[10:20])


def _photographs() -> tuple[Batches, Batches]:
    (images, _), (unseen, _) = demo.load_data()
    return list(as_photographs(images[:64]).split(1)), list(as_photographs(unseen).split(1))


def _images(*shape: int) -> Callable[[], tuple[Batches, Batches]]:
    return lambda: ([torch.randn(shape) for _ in range(10)], [torch.randn(shape) for _ in range(10)])


def _ids(*shape: int) -> Callable[[], tuple[Batches, Batches]]:
    def draw() -> Batches:
        return [torch.randint(0, 1000, shape) for _ in range(10)]

    return lambda: (draw(), draw())


@attrs.frozen
class Case:
    """A model to measure.

    Attributes:
        build: What builds it.
        batches: What gives the batches to calibrate on, and those to measure the error on.
        look: What makes its inputs of the demo's digits, if it is trained on these: it has an accuracy then.
        method: How its ranges are found.
        recipe: How it is quantized; quantize_static makes it int8.
    """

    build: Callable[[], nn.Module]
    batches: Callable[[], tuple[Batches, Batches]]
    look: Callable[[Tensor], Tensor] | None = None
    method: str = "mse"
    recipe: str = "int8"


def _mlp(recipe: str) -> Case:
    """What a transformer does between its attentions, for one token."""
    return Case(
        lambda: nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)),
        _images(1, 512),
        recipe=recipe,
    )


CASES = {
    "demo CNN": Case(_digits_cnn, _digits, torch.clone),
    "small ResNet": Case(small_resnet, _images(1, 3, 96, 96)),
    "ResNet's stem": Case(resnet_stem, _images(1, 3, 128, 128)),
    "Inception": Case(Inception, _images(1, 3, 32, 32)),
    "feature pyramid": Case(Pyramid, _images(1, 3, 64, 64)),
    "segmentation head": Case(segmentation_head, _images(1, 64, 40, 40)),
    "a convolution": Case(lambda: nn.Sequential(nn.Conv2d(64, 64, 3)), _images(1, 64, 40, 40)),
    "plain CNN": Case(plain_cnn, _images(1, 1, 28, 28)),
    # What is far out makes the surest of its answers, and "mse" cuts it off.
    "MobileNetV3-small": Case(digits_mobilenet, _photographs, as_photographs, "max"),
    "U-Net": Case(UNet, _images(1, 3, 64, 64)),
    "LSTM": Case(LanguageModel, _ids(1, 64)),
    "BERT": Case(lambda: Transformer("BERT"), _ids(1, 64)),
    "GPT-2": Case(lambda: Transformer("GPT-2"), _ids(1, 64)),
    "strides of 2": Case(strided, _images(1, 16, 64, 64)),
    "volumes": Case(volumes, _images(1, 3, 8, 24, 24)),
    "text recognizer": Case(recognizer, _images(1, 3, 48, 160)),
    "decoder": Case(decoder, _images(1, 32, 12, 12)),
    **{f"MLP, {recipe}": _mlp(recipe) for recipe in ("int8", "w4a8", "int4", "int4-weight-only", "fp8")},
}


@attrs.frozen
class Row:
    """What was measured of a model; of its files by their kind: "float", "ours", "static"."""

    name: str
    report: ExportReport
    ms: dict[str, float]
    error: dict[str, float]
    size: dict[str, int]
    accuracy: dict[str, float] | None

    def ratio(self, kind: str) -> float:
        """Latency to the float file's."""
        return self.ms[kind] / self.ms["float"]


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _static(float_path: Path, path: Path, batches: Batches) -> None:
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
    quantize_static(str(prepared), str(path), Reader(), per_channel=True, activation_type=QuantType.QUInt8)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter and quantize_static print."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _quantized(model: nn.Module, batches: Batches, case: Case) -> nn.Module:
    """As docs/deploy.md does it."""
    quantized = copy.deepcopy(model)
    qp.convert(quantized, recipe=case.recipe)
    qp.prepare(quantized, batches[0], runtime="onnxruntime")
    # A zero point is of integers.
    is_int8 = case.recipe == "int8"
    qp.calibrate(quantized, batches, method=case.method, zero_points=is_int8, progress=False, strict=False)
    return quantized


def measure(name: str) -> Row:
    """Exports a model in three ways and runs the files."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and case.look is None:
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2.0)
    seen, unseen = case.batches()
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"{kind}.onnx" for kind in _FILES}
        with _quiet():
            quantized = _quantized(model, seen, case)
            qp.export_onnx(model, seen[0], paths["float"], input_names=["x"], check=False)
            report = qp.export_onnx(quantized, seen[0], paths["ours"], input_names=["x"], latency=False)
            _static(paths["float"], paths["static"], seen)
        sessions = {kind: _session(path) for kind, path in paths.items()}
        x = seen[0].numpy()
        ms = medians({k: partial(s.run, None, {"x": x}) for k, s in sessions.items()}, repeats=151, warmup=5)
        outputs = {kind: [s.run(None, {"x": t.numpy()})[0] for t in unseen] for kind, s in sessions.items()}
        results = {kind: torch.stack([torch.from_numpy(y) for y in found]) for kind, found in outputs.items()}
        size = {kind: path.stat().st_size for kind, path in paths.items()}
        accuracy = None
        if case.look is not None:
            accuracy = {kind: _accuracy(s, case.look, len(x)) for kind, s in sessions.items()}
    norm = results["float"].norm()
    error = {kind: float((results[kind] - results["float"]).norm() / norm) for kind in ("ours", "static")}
    return Row(name, report, ms, error, size, accuracy)


def _accuracy(session: Any, look: Callable[[Tensor], Tensor], size: int) -> float:
    """Share of the demo's test images that are recognised, in whole batches of a size."""
    images, labels = demo.load_data()[1]
    count = len(images) // size * size
    right = [
        (torch.from_numpy(session.run(None, {"x": look(x).numpy()})[0]).argmax(1) == y).float()
        for x, y in zip(images[:count].split(size), labels[:count].split(size), strict=True)
    ]
    return float(torch.cat(right).mean())


def table_of(measured: list[Row]) -> Table:
    """The whole table: a line for each model."""
    table = Table(title="int8 files in ONNX Runtime, and those of quantize_static (qs)")
    table.add_column("model", overflow="fold")
    table.add_column("nodes", overflow="fold", ratio=1)
    for heading in (
        "mismatching / differing of integers", "largest difference", "optimized: within a step",
        "... kernels alone",
        "KB: float, int8, qs", "ms: float, int8, qs", "to float: int8, qs", "error: int8, qs",
        "accuracy: float, int8, qs",
    ):  # fmt: skip
        table.add_column(heading, justify="right", overflow="fold")
    for row in measured:
        compared = row.report.comparison
        assert compared is not None
        nodes = sorted(row.report.nodes.items(), key=lambda item: (-item[1], item[0]))
        table.add_row(
            row.name,
            ", ".join(f"{count} {kind}" for kind, count in nodes),
            f"{compared.mismatching} / {compared.differing} of {compared.integers:,}",
            f"{compared.largest_difference:.2g}",
            f"{compared.within_step:.2%}",
            "-" if not compared.kernels else f"{compared.kernels_within_step:.2%} of {compared.kernels}",
            ", ".join(f"{row.size[kind] / 1024:.0f}" for kind in _FILES),
            ", ".join(f"{row.ms[kind]:.3f}" for kind in _FILES),
            f"{row.ratio('ours'):.2f}, {row.ratio('static'):.2f}",
            f"{row.error['ours']:.4f}, {row.error['static']:.4f}",
            "-" if row.accuracy is None else ", ".join(f"{row.accuracy[kind]:.2%}" for kind in _FILES),
        )
    return table


def rows() -> list[dict[str, Any]]:
    """A row for each model, for the table of all suites; the aim is quantize_static's ratio to float."""
    torch.set_num_threads(1)
    measured = [measure(name) for name in CASES]
    Console(width=200).print(table_of(measured))
    return [
        {
            "name": f"{row.name} in ONNX Runtime",
            "ours_ms": row.ms["ours"],
            "baseline_ms": row.ms["float"],
            "ratio": row.ratio("ours"),
            "aim": f"{row.ratio('static'):.2f}",
            "peers": {
                "quantize_static (ms)": row.ms["static"],
                "error": row.error["ours"],
                "its error": row.error["static"],
                "size to float": row.size["ours"] / row.size["float"],
            },
        }
        for row in measured
    ]


if __name__ == "__main__":
    rows()
