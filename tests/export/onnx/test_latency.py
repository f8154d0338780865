"""The export measures its file beside the same in float, and says what makes it slow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

import quantpatch as qp
from quantpatch.errors import QuantPatchWarning
from quantpatch.export import export_onnx
from quantpatch.export.onnx import check, export
from quantpatch.export.onnx.comparison import Latency
from quantpatch.torch_tools.progress import Bar

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnxruntime
from exported_files import run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Mixed(nn.Module):
    """A convolution, a transposed one, and linear layers, with what the passes rewrite between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU6(), nn.AvgPool2d(2))
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 32), nn.GELU(), nn.Linear(32, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.first(x)))


X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def quantized(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    # Of a ReLU and what clips to 4 bits the exporter makes one operator, and both are left out.
    linear = nn.Sequential(nn.Flatten(), nn.Linear(300, 32), nn.GELU(), nn.Linear(32, 4))
    model = (linear if recipe == "int4" else Mixed()).eval()
    qp.convert(model, recipe=recipe)
    qp.prepare(model, X)
    qp.calibrate(model, [X], progress=False)
    return model


def measuring(monkeypatch: pytest.MonkeyPatch, *times: float) -> list[Any]:
    """Makes the export measure these times, and returns what it measured: outputs of the two files."""
    seen: list[Any] = []

    def measured(opens: Any, path: Path, float_path: Path, feed: Any) -> tuple[float, ...]:
        inputs = [torch.from_numpy(x) for x in feed.values()]
        seen.append([run(each, *inputs)[0] for each in (path, float_path)])
        return times

    monkeypatch.setattr(check, "measure", measured)
    return seen


@pytest.mark.parametrize("recipe", ["int8", "w4a8", "int4", "fp8", "int4-weight-only"])
def test_it_is_measured_beside_the_same_model_in_float(
    recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = measuring(monkeypatch, 1.0, 2.0)
    model = quantized(recipe)
    if recipe == "fp8" and TorchVersion(onnxruntime.__version__) < "1.32":
        pytest.skip("ONNX Runtime before 1.32 runs no average of FP8")
    report = export_onnx(model, X, tmp_path / "m.onnx")
    ((own, as_float),) = seen
    torch.testing.assert_close(own, model(X).detach(), rtol=0, atol=float(own.abs().max()) / 50)
    for name, module in model.named_modules():
        if isinstance(module, qp.TensorQuantizer) and not name.endswith("weight_quantizer"):
            module.disable()
    torch.testing.assert_close(as_float, model(X).detach(), rtol=1e-4, atol=1e-5)
    assert report.comparison is not None
    assert report.comparison.latency is not None
    assert report.comparison.latency.ratio == 0.5
    assert "1 ms here, 0.50 of float (2 ms)" in str(report)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_a_file_that_is_slower_than_float_is_warned_of_with_what_runs_on_floats(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measuring(monkeypatch, 3.0, 2.0)
    with pytest.warns(QuantPatchWarning, match=r"m\.onnx takes 1\.50 times as long as in float") as caught:
        report = export_onnx(quantized("int8"), X, tmp_path / "m.onnx")
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    assert "kernels are float: up. qp.prepare(model, args) before calibration, if it was not" in message
    assert "or leave them float (skip=[...], or disable() their quantizers)" in message
    assert report.comparison is not None
    assert report.comparison.latency is not None
    assert report.comparison.latency.on_floats == ("up",)


@pytest.mark.parametrize(
    ("recipe", "formats"), [("int4", "int4"), ("fp8", "fp8_e4m3"), ("int8-weight-only", "float")]
)
def test_activations_that_no_integer_kernel_takes_are_named_and_preparing_is_not_advised(
    recipe: str, formats: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if recipe == "fp8" and TorchVersion(onnxruntime.__version__) < "1.32":
        pytest.skip("ONNX Runtime before 1.32 runs no average of FP8")
    measuring(monkeypatch, 3.0, 2.0)
    model = quantized(recipe)
    with pytest.warns(QuantPatchWarning, match=f"as they are; here are {formats}. Use int8") as caught:
        export_onnx(model, X, tmp_path / "m.onnx")
    assert "qp.prepare" not in str(caught[0].message)


def test_a_convolution_of_few_channels_is_named_where_integers_do_not_gain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measuring(monkeypatch, 3.0, 2.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()).eval()
    qp.convert(model)
    qp.prepare(model, X[:, :2])
    qp.calibrate(model, [X[:, :2]], progress=False)
    with pytest.warns(QuantPatchWarning, match="images that 0 takes are padded to 4 channels") as caught:
        export_onnx(model, X[:, :2], tmp_path / "m.onnx")
    assert "qp.configure(model, {'0': None}) leaves it float" in str(caught[0].message)


def test_noise_and_the_smallest_of_models_are_not_warned_of() -> None:
    assert Latency(1.2, 1.0).is_slower
    assert not Latency(1.05, 1.0).is_slower
    assert not Latency(0.04, 0.02).is_slower


@pytest.mark.sweep(2)
@pytest.mark.parametrize("options", [{"latency": False}, {"check": False}, {"runtime": "tensorrt"}])
def test_it_is_not_measured_where_that_is_not_asked_for(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = measuring(monkeypatch, 3.0, 2.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 4)).eval()
    qp.convert(model)
    qp.calibrate(model, [X], progress=False)
    report = export_onnx(model, X, tmp_path / "m.onnx", **options)
    assert seen == []
    assert report.comparison is None or report.comparison.latency is None


def test_what_is_being_done_is_shown_step_by_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps: list[str] = []
    bars: list[tuple[str, float | None]] = []

    class Noted(Bar):
        def step(self, text: str) -> None:
            steps.append(text)

    @contextlib.contextmanager
    def noted(description: str, total: float | None, *, progress: bool) -> Iterator[Bar]:
        bars.append((description, total))
        yield Noted()

    monkeypatch.setattr(export, "progress_bar", noted)
    measuring(monkeypatch, 1.0, 2.0)
    export_onnx(quantized("int4"), X, tmp_path / "m.onnx")
    assert bars == [("m.onnx", len(steps))]
    assert steps[0] == "tracing Sequential"
    assert steps[-1] == "measuring the file beside float"
