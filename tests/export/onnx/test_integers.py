"""Integers are moved, not floats: in the file what moves values stands between integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantpatch as qp
from quantpatch.dataflow import MOVING_NODES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Moving(nn.Module):
    """Two convolutions with something between them, which goes into an addition as well."""

    def __init__(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.move = nn.ReLU(), move

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.move(self.act(self.first(x)))
        return self.second(y) + y


MOVES = {
    "max pooling": lambda x: F.max_pool2d(x, 3, 2, 1),
    "nearest neighbours": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "a transpose": lambda x: x.transpose(2, 3),
    "a slice": lambda x: x[:, :, 1:],
    "a part": lambda x: x.chunk(2, dim=3)[1],
}


@pytest.mark.parametrize("case", MOVES)
def test_between_integer_kernels_integers_are_moved(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with qp.quantize_modules():
        model = nn.Sequential(Moving(MOVES[case])).eval()
    x = torch.randn(2, 3, 8, 8)
    report = qp.prepare(model, x)
    assert report.skipped == {}
    qp.calibrate(model, [x], progress=False)
    exported = qp.export_onnx(model, x, tmp_path / "m.onnx")
    assert exported.comparison is not None
    assert exported.comparison.mismatching == 0
    assert exported.comparison.kernels_within_step == 1.0
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    (addition,) = (node for node in graph.node if node.op_type == "Add")
    assert [makers[name] for name in addition.input] == ["DequantizeLinear"] * 2
    moving = [node for node in graph.node if node.op_type in MOVING_NODES]
    assert moving
    assert all(makers.get(node.input[0]) in {"QuantizeLinear", *MOVING_NODES} for node in moving)


def test_integers_are_made_before_what_moves_them_where_a_quantizer_stands_behind(tmp_path: Path) -> None:
    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.up, self.last = nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.up(self.first(x) + self.second(x)))

    torch.manual_seed(0)
    with qp.quantize_modules():
        model = Coarse().eval()
    x = torch.randn(2, 3, 8, 8)
    qp.prepare(model, x)
    qp.calibrate(model, [x], progress=False)
    exported = qp.export_onnx(model, x, tmp_path / "m.onnx")
    assert exported.comparison is not None
    assert exported.comparison.mismatching == 0
    nodes = list(onnx.load(str(tmp_path / "m.onnx")).graph.node)
    (addition,) = (node for node in nodes if node.op_type == "Add")
    assert [node.op_type for node in nodes if addition.output[0] in node.input] == ["QuantizeLinear"]
