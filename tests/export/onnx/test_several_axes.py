"""Scales on several axes, which ONNX's operators take on one: the axes are joined around the pair."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.export import export_onnx
from quantpatch.export.onnx.sessions import session_options

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnx
import onnxruntime as ort
from tensorrt_rules import violations

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Experts(nn.Module):
    """A matrix for each expert, (experts, out, in) or (experts, in, out)."""

    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.weight = nn.Parameter(torch.randn(3, 6, 4) if turned else torch.randn(3, 4, 6))
        with torch.no_grad():
            self.weight.select(2 if turned else 1, 2)[1] = 0.0  # a dead channel of one expert

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight if self.turned else self.weight.transpose(1, 2))


class QuantExperts(qp.QuantizedLayer, Experts):
    inputs = ("x",)

    def weight_axes(self) -> Any:
        return {"weight": (0, 2) if self.turned else (0, 1)}


X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


def experts(recipe: Any, *, turned: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Experts(turned=turned)).eval()
    qp.convert(model, custom=[(Experts.__module__, "Experts", QuantExperts)], recipe=recipe)
    qp.calibrate(model, [X], progress=False)
    assert model[0].weight_quantizer.amax.numel() == 12
    return model


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = ort.InferenceSession(
        str(path), session_options(optimized=False), providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(
    ("recipe", "stored", "turned"),
    [
        ("int8", "INT8", True),
        ("w4a8", "INT4", False),
        ("w4a8", "INT4", True),
        ("rows", "FLOAT8E4M3FN", False),
    ],
)
def test_weights_of_experts_are_stored_as_codes_and_floats_once_loaded(
    recipe: str, stored: str, turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantpatch.export.onnx.weights._WORTH_PACKING", 1)  # for weights as small as these
    chosen: Any = recipe
    if recipe == "rows":  # an activation with several axes as well
        weight = qp.QuantDescriptor(num_bits=(4, 3), axis="channel")
        chosen = qp.Recipe(name="rows", input=qp.QuantDescriptor(axis=(0, 2)), weight=weight)
    model = experts(chosen, turned=turned)
    path = tmp_path / "m.onnx"
    report = export_onnx(model, X, path, dynamic_shapes=({1: "tokens"},))
    assert report.comparison is not None
    assert (report.comparison.differing, report.comparison.mismatching) == (0, 0)
    more = torch.randn(3, 9, 6)
    for x in (X, more):
        torch.testing.assert_close(run(path, x), model(x), rtol=1e-5, atol=1e-6)
    kinds = {t.data_type for t in onnx.load(str(path)).graph.initializer if list(t.dims) == [12, 6]}
    assert kinds == {getattr(onnx.TensorProto, stored)}
    options = session_options(optimized=True)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    left = Counter(node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node)
    assert not {"Cast", "Mul"} & left.keys()
    assert left["DequantizeLinear"] == left["QuantizeLinear"] == 1


def test_for_tensorrt_the_weights_are_floats_with_a_pair(tmp_path: Path) -> None:
    model = experts("int8", turned=True)
    report = export_onnx(model, X, tmp_path / "m.onnx", runtime="tensorrt")
    assert report.nodes["QuantizeLinear"] == report.nodes["DequantizeLinear"] == 2
    assert violations(tmp_path / "m.onnx") == []
    assert report.comparison is not None
    assert report.comparison.differing == 0
    torch.testing.assert_close(run(tmp_path / "m.onnx", X), model(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("known", ["each", "one"])
def test_every_pair_of_axes_is_exact_bit_for_bit(known: str, tmp_path: Path) -> None:
    class Quantizers(nn.Module):
        """One for each pair of axes, side by side."""

        def __init__(self) -> None:
            super().__init__()
            pairs = [(0, 1), (0, 2), (2, 1), (-1, 0)]
            self.quantizers = nn.ModuleList(
                qp.TensorQuantizer(qp.QuantDescriptor(axis=axis, narrow_range=True)) for axis in pairs
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([quantizer(x) for quantizer in self.quantizers])

    model = Quantizers()
    for i, quantizer in enumerate(model.quantizers):
        kept = {a % 3 for a in quantizer.descriptor.axis}
        shape = [n if d in kept else 1 for d, n in enumerate(X.shape)]
        quantizer.amax = torch.rand(shape) + 0.1 if known == "each" else torch.tensor(1.3 + 0.1 * i)
    report = export_onnx(model, X, tmp_path / "m.onnx")
    assert report.comparison is not None
    assert (report.comparison.differing, report.comparison.mismatching) == (0, 0)
    assert report.comparison.integers == 4 * 2 * X.numel()
    assert torch.equal(run(tmp_path / "m.onnx", X), model(X))
