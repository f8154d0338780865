"""Recurrent layers in ONNX files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.export.onnx import export_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from exported_files import assert_same, calibrated, fingerprint, run

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def test_recurrent_layers_keep_their_operator(tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 16, 2, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0])

    x = torch.randn(2, 7, 8)
    report = export_onnx(calibrated(Recurrent, x), x, tmp_path / "m.onnx")
    assert report.nodes["LSTM"] == 2  # not a loop over time steps
    assert report.comparison is not None
    assert report.comparison.differing == 0
    assert report.comparison.relative_difference < 1e-5


class Projecting(nn.Module):
    def __init__(self, layers: int, *, batch_first: bool, bidirectional: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, layers, proj_size=3, batch_first=batch_first, bidirectional=bidirectional)

    def forward(self, x: torch.Tensor) -> Any:
        y, (h, c) = self.rnn(x)
        return y, h, c


@pytest.mark.parametrize(
    ("layers", "batch_first", "bidirectional", "disabled"),
    [(1, False, False, False), (2, True, True, False), (1, True, False, True)],
)
def test_an_lstm_with_a_projection_is_written_out(
    layers: int, batch_first: bool, bidirectional: bool, disabled: bool, tmp_path: Path
) -> None:
    """ONNX's operator has none, and what torch makes of it nothing runs."""
    x = torch.randn(2, 3, 4)
    model = calibrated(lambda: Projecting(layers, batch_first=batch_first, bidirectional=bidirectional), x)
    if disabled:
        for quantizer in model.rnn.quantizers().values():
            quantizer.disable()
    before = fingerprint(model)
    along = 0 if batch_first else 1
    with pytest.warns(UserWarning, match="will be float") if disabled else contextlib.nullcontext():
        report = export_onnx(model, x, tmp_path / "m.onnx", dynamic_shapes=({along: "batch"},))
    assert_same(before, fingerprint(model))
    assert "LSTM" not in report.nodes
    assert report.comparison is not None
    assert report.comparison.differing == 0
    assert report.comparison.relative_difference < 1e-5
    more = torch.randn(7, 3, 4) if batch_first else torch.randn(2, 7, 4)
    for got, expected in zip(run(tmp_path / "m.onnx", more), model(more), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_float_lstm_with_a_projection_is_refused_by_name(tmp_path: Path) -> None:
    with qp.quantize_modules(skip=["LSTM"]):
        model = nn.Sequential(Projecting(1, batch_first=True, bidirectional=False), nn.Identity()).eval()
    before = fingerprint(model)
    with pytest.raises(ExportError, match=r"ONNX's LSTM has no projection: 0\.rnn \(proj_size=3\)") as caught:
        export_onnx(model, torch.randn(2, 5, 4), tmp_path / "m.onnx")
    assert caught.value.quantizers == ("0.rnn",)
    assert_same(before, fingerprint(model))
    assert list(tmp_path.iterdir()) == []


def test_steps_that_are_written_out_are_as_many_as_given(tmp_path: Path) -> None:
    x = torch.randn(5, 2, 4)
    model = calibrated(lambda: Projecting(1, batch_first=False, bidirectional=False), x)
    with pytest.raises(ExportError, match=r"conflicts .* static shape of 5"):
        export_onnx(model, x, tmp_path / "m.onnx", dynamic_shapes=({0: "steps"},))
    assert list(tmp_path.iterdir()) == []
