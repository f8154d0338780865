"""``quantpatch demo``: float, calibrated, fine-tuned and exported, on scikit-learn's handwritten digits.

``build_model`` is plain PyTorch: nothing in it knows of quantization.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional as F

from quantpatch.analysis.audit import audit
from quantpatch.errors import MissingExtraError
from quantpatch.export import export_onnx
from quantpatch.quantize.calibrate import calibrate
from quantpatch.quantize.scope import Scope, quantize_modules
from quantpatch.reports.report import Report, table_of

Data = tuple[Tensor, Tensor]


@attrs.frozen
class DemoRow:
    """A line of the demo's table.

    Attributes:
        model: What was measured.
        bits: Bits of weights and activations; 32 for float.
        accuracy: Share of test digits recognised.
        replaced: Share of the layers that multiply or pool that the block replaced.
        covered: Share of multiply-accumulates on quantized operands, by audit.
        seconds: Time of the step.
    """

    model: str
    bits: int
    accuracy: float
    replaced: float
    covered: float
    seconds: float


@attrs.frozen
class DemoReport(Report):
    """What the demo measured; prints as a table."""

    rows: tuple[DemoRow, ...]
    left_out: str = ""

    _of_names = False

    def __rich__(self) -> Table:
        numbers = ("bits", "accuracy", "layers replaced", "MACs quantized", "time")
        title = "Handwritten digits: accuracy on 360 test images"
        table = table_of("model", *numbers, right=numbers, title=title, caption=self._caption())
        for row in self.rows:
            table.add_row(
                row.model,
                str(row.bits),
                f"{row.accuracy:.2%}",
                f"{row.replaced:.0%}",
                f"{row.covered:.0%}",
                f"{row.seconds:.1f} s",
            )
        return table

    def _caption(self) -> Text:
        differ = "accuracy and time differ somewhat between machines and versions of torch"
        return Text("; ".join(filter(None, (differ, self.left_out))))


def build_model() -> nn.Module:
    """A small CNN for 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def load_data() -> tuple[Data, Data]:
    """Images of shape ``(N, 1, 8, 8)`` from 0 to 1, and labels: 1437 for training, 360 for testing.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError.of("demo", "scikit-learn", "the demo's data") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[:-360], labels[:-360]), (images[-360:], labels[-360:])


def batches(data: Data, seed: int, size: int = 64) -> Iterator[Data]:
    """Shuffled batches of a data set."""
    images, labels = data
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for chosen in torch.split(order, size):
        yield images[chosen], labels[chosen]


def train(model: nn.Module, data: Data, epochs: int, rate: float) -> None:
    """Trains with AdamW and a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for epoch in range(epochs):
        for images, labels in batches(data, seed=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    model.eval()


def accuracy(model: nn.Module, data: Data) -> float:
    """Share of images whose label the model finds."""
    images, labels = data
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    return float(right.float().mean())


def _timed(step: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    step(*args)
    return time.perf_counter() - start


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums come out the same on any number of cores, and layers this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _share_replaced(model: nn.Module, scope: Scope) -> float:
    """Replaced layers among those that multiply or pool."""
    kinds = (nn.Conv2d, nn.Linear, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    return sum(row.count for row in scope.replaced) / sum(isinstance(m, kinds) for m in model.modules())


def run(*, epochs: int = 20, tuning_epochs: int = 4) -> DemoReport:
    """Trains, quantizes to 8 and to 4 bits, calibrates and fine-tunes. The same figures in each run.

    Args:
        epochs: Passes over the data for the float model.
        tuning_epochs: Passes over the data to fine-tune each quantized one.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    data, test = load_data()
    left_out = ""
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(0)
        model = build_model()
        seconds = _timed(train, model, data, epochs, 3e-3)
        rows = [DemoRow("float", 32, accuracy(model, test), 0.0, 0.0, seconds)]
        for bits, recipe in ((8, "int8"), (4, "int4")):
            with quantize_modules(recipe=recipe) as scope:
                quantized = build_model()  # the same function, unchanged
            quantized.load_state_dict(model.state_dict())  # strict: a float checkpoint needs no ranges
            replaced = _share_replaced(model, scope)
            images = [x for x, _ in batches(data, seed=0)]
            for name, step in (
                ("calibrated", (calibrate, quantized, images)),
                ("fine-tuned", (train, quantized, data, tuning_epochs, 1e-3)),
            ):
                seconds = _timed(*step)
                covered = audit(quantized, test[0][:1]).share
                rows.append(DemoRow(name, bits, accuracy(quantized, test), replaced, covered, seconds))
            if bits == 8:
                start = time.perf_counter()
                try:
                    exported = _accuracy_of_file(quantized, test)
                except MissingExtraError as error:
                    left_out = f"not run in ONNX Runtime: {error}"
                    continue
                seconds = time.perf_counter() - start
                rows.append(DemoRow("in ONNX Runtime", bits, exported, replaced, covered, seconds))
    return DemoReport(tuple(rows), left_out)


def _accuracy_of_file(model: nn.Module, data: Data) -> float:
    """Writes the model as ONNX, runs the file on all images, and measures as for the model."""
    images, labels = data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.onnx"
        export_onnx(model, images[:2], path, dynamic_shapes=({0: "batch"},), check=False)
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError.of("onnx", "onnxruntime", "running the file") from None
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (scores,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return float((torch.from_numpy(scores).argmax(1) == labels).float().mean())
