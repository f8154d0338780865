"""The quantizers that an export has to express: those that the run reaches, or that have a range."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class OwnWeights(nn.Module):
    """Multiplies by weights of its own: on the left, standardized, a product of two, two in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(24, 24))
        self.kernel = nn.Parameter(torch.randn(16, 16, 3))
        self.down, self.up = nn.Parameter(torch.randn(3, 16)), nn.Parameter(torch.randn(16, 3))
        self.turns = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixing @ x
        y = F.conv1d(y.mT, self.kernel - self.kernel.mean((1, 2), keepdim=True), padding=1).mT
        y = F.linear(y, self.up @ self.down)
        for turn in self.turns:
            y = torch.tanh(y) @ turn
        return y


@pytest.fixture
def own_weights() -> Any:
    torch.manual_seed(0)
    with qp.quantize_modules(operations="products"):
        built = OwnWeights().eval()
    x = torch.randn(2, 24, 16)
    qp.calibrate(built, [x], progress=False)
    return built, x


def test_what_a_forward_makes_of_weights_is_the_weight_of_its_quantizer(own_weights: Any) -> None:
    model, x = own_weights
    found = {operand.name: operand.weight for operand in reached(model, operands(model), (x,), {})}
    expected = {
        "matmul_0_left_quantizer": model.mixing,
        "conv1d_0_weight_quantizer": model.kernel - model.kernel.mean((1, 2), keepdim=True),
        "matmul_1_left_quantizer": model.up,
        "matmul_1_right_quantizer": model.down,
        # Of quantized factors.
        "linear_0_weight_quantizer": model.matmul_1_left_quantizer(model.up, batch_axis=None)
        @ model.matmul_1_right_quantizer(model.down, batch_axis=None),
    }
    assert {name for name, weight in found.items() if weight is not None} == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


def test_weights_that_a_forward_reads_itself_are_codes_in_exports(own_weights: Any, tmp_path: Path) -> None:
    model, x = own_weights
    model.turns.data[1] = model.turns.data[0]  # the same at each turn: a weight, too
    program = qp.export_program(model, x)
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)
    stored = {name for name, value in program.state_dict.items() if value.dtype.is_floating_point}
    assert all(name.endswith(".scale") for name in stored)
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    report = qp.export_onnx(model, x, tmp_path / "m.onnx", latency=False, progress=False)
    assert report.comparison is not None
    assert report.comparison.mismatching == 0
    onnx = importlib.import_module("onnx")
    matrices = [t for t in onnx.load(report.path).graph.initializer if min([*t.dims, 0][:2]) > 1]
    assert {tensor.data_type for tensor in matrices} == {onnx.TensorProto.INT8}
    assert len(matrices) == 4
