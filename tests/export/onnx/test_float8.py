"""FP8 in files for ONNX Runtime, whose optimizations know integers only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from quantpatch.errors import ExportError
from quantpatch.export.onnx.export import export_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnxruntime
from exported_files import calibrated, run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Clipping(nn.Module):
    """What is clipped before a quantizer, also in halves, and operands that are reshaped behind one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
        self.layers = nn.Sequential(nn.Linear(16, 8), nn.ReLU6(), nn.Linear(8, 8), nn.Hardtanh(-0.2, 0.3))
        self.last = nn.Bilinear(8, 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.last(self.layers(y).clamp(min=-0.1), y)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("half", [False, True])
def test_it_gives_the_same_with_optimizations_on(half: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)  # of few numbers one in halves lies between two of 8 bits, where either is right
    x = torch.randn(6, 3, 4, 4)
    model = calibrated(Clipping, x, recipe="fp8")
    if half:
        model, x = model.half(), x.half()
    if not half and TorchVersion(onnxruntime.__version__) < "1.32":
        with pytest.raises(ExportError, match=r"Runtime before 1\.32 move FP8 into operators"):
            export_onnx(model, x, tmp_path / "m.onnx", dynamic_shapes=({0: "batch"},))
        return
    report = export_onnx(model, x, tmp_path / "m.onnx", dynamic_shapes=({0: "batch"},))
    assert report.comparison is not None
    assert report.comparison.within_step == 1.0
    assert not {"Relu", "Clip"} & report.nodes.keys()
    more = torch.randn(20, 3, 4, 4).to(x)
    expected = model(more)
    for optimized in (False, True):
        (got,) = run(tmp_path / "m.onnx", more, optimized=optimized)
        # Floats on the edge between two numbers of FP8 may fall on either side.
        assert ((got - expected).abs() > 0.01 * expected.abs().max()).float().mean() < 0.05
