"""Files for OpenVINO, run by it beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ExportError, MissingExtraError
from quantpatch.export.onnx.comparison import Comparison
from quantpatch.plugins.registry import registry

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """What convolutions give, added; a transposed one behind it, and one of volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.volume = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv3d(8, 4, 1)
        self.head = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.up(x + self.inner(x))
        return self.head(self.volume(x[:, :, None])[:, :, 0].mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), nn.MultiheadAttention(32, 2, batch_first=True)
        self.wide, self.act, self.narrow = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.narrow(self.act(self.wide(x)))


def exported(
    build: Any, x: torch.Tensor, path: Path, recipe: str = "int8", **options: Any
) -> tuple[nn.Module, Comparison]:
    torch.manual_seed(0)
    with qp.quantize_modules(recipe):
        model = build().eval()
    qp.prepare(model, x, runtime="openvino")
    qp.calibrate(model, [x], progress=False)
    report = qp.export_onnx(model, x, path, runtime="openvino", **options)
    return model, report.comparison  # type: ignore[return-value]


def opened(path: Path, x: torch.Tensor) -> torch.Tensor:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
    return torch.as_tensor(compiled([x.numpy()])[0])


def test_convolutions_and_their_sum_run_on_integers_and_give_what_the_model_gives(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "m.onnx"
    model, compared = exported(Residual, IMAGES, path)
    assert compared.mismatching == 0
    assert compared.within_step == 1.0
    assert set(compared.on_integers) == {"stem", "inner", "up", "head"}
    assert compared.on_integers["stem"].startswith("Convolution, ")
    assert compared.on_integers["up"].startswith("Deconvolution, ")
    assert compared.latency is not None
    assert compared.latency.on_floats == ()
    expected = model(IMAGES)
    assert (opened(path, IMAGES) - expected).abs().max() <= 1.01 * expected.abs().max() / 127
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_attention_is_right_for_another_batch(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "m.onnx"
    shapes = ({0: "batch"},)
    model, compared = exported(Block, TOKENS, path, dynamic_shapes=shapes, latency=False)
    assert set(compared.on_integers) == {"attention", "wide", "narrow"}
    more = torch.cat([TOKENS, TOKENS.flip(1)])
    torch.testing.assert_close(opened(path, more), model(more).detach(), rtol=0, atol=0.02)


@pytest.mark.parametrize(("recipe", "size"), [("int8-weight-only", 64), ("int4-weight-only", 256)])
def test_weights_alone_are_exact_and_the_report_says_that_by_default_they_are_not(
    recipe: str, size: int, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    x = torch.randn(4, size)
    path = tmp_path / "m.onnx"
    model, compared = exported(lambda: nn.Linear(size, 64), x, path, recipe, latency=False)
    assert set(compared.on_integers) == {"the model"}
    assert "rounds the activations of layers whose weights alone are quantized" in compared.unlike
    assert "'EXECUTION_MODE_HINT': 'ACCURACY'" in compared.unlike
    torch.testing.assert_close(opened(path, x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_blocks_that_do_not_divide_a_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"leave a shorter one of the 200 values .* OpenVINO takes equal"):
        exported(
            lambda: nn.Linear(200, 8),
            torch.randn(2, 200),
            tmp_path / "m.onnx",
            "int4-weight-only",
            check=False,
        )


def test_layers_without_an_integer_kernel_are_left_float_and_named() -> None:
    with qp.quantize_modules():
        model = Residual().eval()
        recurrent = nn.Sequential(nn.LSTM(4, 4))
    report = qp.prepare(model, IMAGES, runtime="openvino")
    assert "OpenVINO runs convolutions of volumes on floats" in report.skipped["volume"]
    assert model.volume.weight_quantizer.disabled
    report = qp.prepare(recurrent, torch.randn(3, 2, 4), runtime="openvino")
    assert "OpenVINO runs recurrent layers on floats" in report.skipped["0"]


def test_without_openvino_the_file_is_written_only_unchecked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "quantpatch.export.onnx.openvino_file", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'quantpatch\[openvino\]'"):
        exported(lambda: nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    with qp.quantize_modules():
        model = nn.Linear(4, 4).eval()
    qp.calibrate(model, [torch.randn(2, 4)], progress=False)
    qp.export_onnx(model, torch.randn(2, 4), tmp_path / "m.onnx", runtime="openvino", check=False)
    assert registry.runtime("openvino").file == "onnx"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
