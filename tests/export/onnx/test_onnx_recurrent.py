"""Recurrent layers in ONNX files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.export.onnx.export import export_onnx

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from exported_files import assert_same, calibrated, fingerprint, run  # noqa: E402

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


class Many(nn.Module):
    """Recurrent layers of every kind, one after the other."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.tanh = nn.RNN(4, 3, bidirectional=True, bias=False, batch_first=batch_first)
        self.relu = nn.RNN(6, 4, nonlinearity="relu", batch_first=batch_first)
        self.lstm = nn.LSTM(4, 2, 2, bidirectional=True, batch_first=batch_first)
        self.gru = nn.GRU(4, 5, batch_first=batch_first)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> Any:
        x, _ = self.tanh(x)
        x, last = self.relu(x)
        x, states = self.lstm(x)
        return self.gru(x, h), last, states


@pytest.mark.parametrize(("runtime", "batch_first"), [("onnxruntime", True), ("tensorrt", False)])
def test_time_and_batch_may_be_dynamic_and_onnxruntime_finds_the_shapes_that_the_file_says(
    runtime: Any, batch_first: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def inputs(steps: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = (batch, steps, 4) if batch_first else (steps, batch, 4)
        return torch.randn(sizes), torch.randn(1, batch, 5)

    names = ("batch", "time") if batch_first else ("time", "batch")
    model = calibrated(lambda: Many(batch_first=batch_first), *inputs(2, 3))
    shapes = (dict(enumerate(names)), {1: "batch"})
    report = export_onnx(model, inputs(2, 3), tmp_path / "m.onnx", runtime=runtime, dynamic_shapes=shapes)
    assert {name: report.nodes[name] for name in ("RNN", "LSTM", "GRU")} == {"RNN": 2, "LSTM": 2, "GRU": 1}
    assert report.comparison is not None
    assert report.comparison.differing == 0
    assert report.comparison.relative_difference < 1e-5
    # Not by the sessions of the other tests, which are quiet: ONNX Runtime warns of shapes.
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    y, *states = [output.shape for output in session.get_outputs()]
    assert y == [*names, 5]
    assert states == [[1, "batch", 5], [1, "batch", 4], [4, "batch", 2], [4, "batch", 2]]
    for x, h in inputs(7, 5), inputs(1, 1):
        results = session.run(None, {"x": x.numpy(), "h": h.numpy()})
        for got, expected in zip(results, tree_leaves(model(x, h)), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), expected, rtol=0, atol=0.02)
    assert capfd.readouterr().err == ""


def test_float_layers_have_as_many_steps_as_they_are_given_as_well(tmp_path: Path) -> None:
    with qp.quantize_modules(skip=["GRU"]):
        model = nn.Sequential(nn.GRU(4, 6), nn.Identity()).eval()
    with pytest.warns(UserWarning, match="will be float"):
        export_onnx(model, torch.randn(5, 2, 4), tmp_path / "m.onnx", dynamic_shapes=({0: "time"},))
    x = torch.randn(9, 2, 4)
    for got, expected in zip(run(tmp_path / "m.onnx", x), model(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_packed_sequences_are_refused_and_what_to_do_is_said(tmp_path: Path) -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 6)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))[1][0]

    inputs = (torch.randn(5, 2, 4), torch.tensor([3, 5]))
    model = calibrated(Packing, *inputs)
    before = fingerprint(model)
    with pytest.raises(ExportError, match="packed sequences have .* hand the padded sequence to the layer"):
        export_onnx(model, inputs, tmp_path / "m.onnx")
    assert_same(before, fingerprint(model))
    assert list(tmp_path.iterdir()) == []


class Projecting(nn.Module):
    def __init__(self, layers: int, *, batch_first: bool, bidirectional: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, layers, proj_size=3, batch_first=batch_first, bidirectional=bidirectional)

    def forward(self, x: torch.Tensor) -> Any:
        y, (h, c) = self.rnn(x)
        return y, h, c


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("layers", "batch_first", "bidirectional", "disabled"),
    [(2, True, True, False), (1, False, False, False), (1, True, False, True)],
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


@pytest.mark.parametrize("inside", ["projection", "hidden state"])
def test_steps_that_are_written_out_are_as_many_as_given(inside: str, tmp_path: Path) -> None:
    x = torch.randn(5, 2, 4)
    if inside == "projection":
        model = calibrated(lambda: Projecting(1, batch_first=False, bidirectional=False), x)
    else:
        recipe = qp.Recipe(name="hidden", hidden=qp.QuantDescriptor())
        model = calibrated(lambda: nn.GRU(4, 6), x, recipe=recipe)
    with pytest.raises(ExportError, match=r"(static shape|Constraints)(.|\n)*: written out .* but not the"):
        export_onnx(model, x, tmp_path / "m.onnx", dynamic_shapes=({0: "steps"},))
    assert list(tmp_path.iterdir()) == []
