"""The quantizers that an export has to express: those that the run reaches, or that have a range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.export.prepare.exported import operands, reached

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

X, STATES = torch.randn(4, 6), torch.randn(4, 6)


class Decoder(nn.Module):
    """Attends to what an encoder gives, if it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, states: Tensor | None = None) -> Tensor:
        y: Tensor = self.own(x)
        return y if states is None else y + self.cross(states) @ x.T @ x


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    with qp.quantize_modules(operations="products"):
        built = Decoder().eval()
    with pytest.warns(qp.QuantPatchWarning, match=r"cross\.input_quantizer"):
        qp.calibrate(built, [X], progress=False, strict=False)
    return built


def test_what_neither_calibration_nor_the_run_reaches_is_left_out(model: Any) -> None:
    found = reached(model, operands(model), (X,), {})
    assert {operand.name for operand in found} == {"own.input_quantizer", "own.weight_quantizer"}
    assert len(operands(model)) > 4


def test_what_the_run_reaches_without_a_range_is_kept_to_be_refused(model: Any) -> None:
    found = reached(model, operands(model), (X,), {"states": STATES})
    unknown = {operand.name for operand in found if operand.is_unknown}
    assert unknown > {"cross.input_quantizer", "cross.weight_quantizer"}
    assert [operand.name for operand in found] == [operand.name for operand in operands(model)]
    with pytest.raises(qp.QuantPatchError, match=r"cross\.input_quantizer: its range is not known"):
        qp.export_program(model, (X, STATES))


def test_a_model_of_which_a_branch_was_never_taken_is_exported_without_it(model: Any) -> None:
    program = qp.export_program(model, X)
    torch.testing.assert_close(program.module()(X), model(X))


def test_a_file_is_written_without_it_and_its_report_names_it(model: Any, tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    report = qp.export_onnx(model, X, tmp_path / "m.onnx", latency=False, progress=False)
    assert set(report.quantizers) == {"own.input_quantizer", "own.weight_quantizer"}
    assert {"cross.input_quantizer", "cross.weight_quantizer"} < set(report.unreached)
    assert "never reached, so not in it" in str(report)
    assert report.comparison is not None
    assert report.comparison.mismatching == 0
