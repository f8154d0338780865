"""A plugin's subclass of Integer is what it rounds to, and nowhere taken for plain integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ArgumentError, CheckpointError, ExportError
from quantpatch.numerics.fake_quant import dequantize, fake_quantize, quantize
from quantpatch.numerics.formats import Blocked, Integer, NumberFormat, OnnxCodes


class Halves(Integer):
    """Every half is on its grid."""

    def round_(self, y: torch.Tensor) -> torch.Tensor:
        return y.mul_(2).round_().div_(2).clamp_(self.min, self.max)


class Down(Integer):
    """Integers, but never the one above."""

    @property
    def onnx(self) -> OnnxCodes:
        return OnnxCodes("UINT8" if self.unsigned else "INT8", rounds=False)

    def round_(self, y: torch.Tensor) -> torch.Tensor:
        return y.floor_().clamp_(self.min, self.max)


class Plain(Integer):
    """Its name is its own, and nothing else."""


FORMATS: dict[str, NumberFormat] = {
    "halves": Halves(8),
    "halves_of_four": Halves(4),
    "down": Down(8),
    "down_unsigned": Down(8, unsigned=True),
    "plain": Plain(8),
}
X = torch.randn(9, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def _offered(plugin: Any) -> None:
    plugin("integers-of-its-own", formats=FORMATS)


@pytest.mark.parametrize("kernels", [False, True], ids=["operations", "kernels"], indirect=True)
@pytest.mark.parametrize("number_format", [Down(8), Halves(8), Blocked(Down(8), 4)], ids=str)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_it_rounds_as_it_says_whether_the_range_is_given_or_its_own(
    kernels: bool, number_format: NumberFormat, needs_grad: bool
) -> None:
    x = X.clone().requires_grad_(needs_grad)
    own = fake_quantize(x, None, number_format)
    codes, scale = quantize(X, None, number_format)
    assert torch.equal(own, dequantize(codes, scale, number_format))
    assert not torch.equal(own, fake_quantize(X, None, Integer(8)))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()


def quantized(input: Any, weight: Any) -> nn.Module:
    model = build()
    activation = None if input is None else qp.QuantDescriptor(format=input)
    blocks = isinstance(weight, Blocked)
    of_weight = qp.QuantDescriptor(format=weight, axis="reduction" if blocks else "channel", dynamic=blocks)
    qp.convert(model, recipe=qp.Recipe(name="r", input=activation, weight=of_weight))
    if not blocks:
        qp.calibrate(model, [X], progress=False, strict=False)
    return model


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_what_it_rounds_to(name: str) -> None:
    format, amax = FORMATS[name], torch.tensor(2.0)
    codes, scale = quantize(X, amax, format)
    assert codes.dtype == torch.float32
    assert torch.equal(dequantize(codes, scale, format), fake_quantize(X, amax, format))
    assert bool((codes % 1 == 0.5).any()) is name.startswith("halves")


@pytest.mark.usefixtures("_offered")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weight", ["halves", "down", "plain", Blocked(Halves(4), 4)])
@pytest.mark.parametrize("input", [None, "down", "down_unsigned"])
@pytest.mark.filterwarnings("ignore:.*unsigned numbers saw negative values")
def test_a_checkpoint_gives_back_its_class(input: Any, weight: Any, packed: bool, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = quantized(input, weight)
    report = qp.save(model, tmp_path / "m.safetensors", packed=packed)
    assert report.packed == ()
    assert len(report.skipped) == (2 if packed else 0)
    again = qp.load(build, tmp_path / "m.safetensors")
    assert torch.equal(again(X), model(X))
    for one, other in zip(model.modules(), again.modules(), strict=True):
        if isinstance(one, qp.TensorQuantizer):
            assert type(other.format) is type(one.format)
            assert other.format == one.format


@pytest.mark.parametrize(
    ("weight", "unsaved", "unexported"),
    [
        (Plain(8), r"'int8' \(Plain\)", "offered by no plugin"),
        (Blocked(Halves(4), 4), r"'int4' \(Halves\)", "no operator in ONNX"),
    ],
)
def test_one_that_no_plugin_offers_is_in_no_file(
    weight: NumberFormat, unsaved: str, unexported: str, tmp_path: Path
) -> None:
    for package in ("safetensors", "onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    model = quantized(None, weight)
    with pytest.raises(CheckpointError, match=unsaved):
        qp.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ExportError, match=unexported):
        qp.export_onnx(model, X, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_offered")
@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_has_the_values_that_it_rounds_to_or_is_refused(runtime: Any, tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    path = tmp_path / "m.onnx"
    for input, weight, named in (
        (None, "halves", "weight"),
        ("down", None, "input"),
        ("halves", None, "input"),
        (None, Blocked(Halves(4), 4), "weight"),
    ):
        with pytest.raises(ExportError) as caught:
            qp.export_onnx(quantized(input, weight), X, path, runtime=runtime)
        assert caught.value.quantizers == tuple(f"{layer}.{named}_quantizer" for layer in (0, 2))
        assert list(tmp_path.iterdir()) == []
    # Weights are constants: however they were rounded, these are integers. And Plain rounds as ONNX does.
    report = qp.export_onnx(quantized("plain", "down"), X, path, runtime=runtime)
    assert report.comparison is not None
    assert (report.comparison.differing, report.comparison.mismatching) == (0, 0)
    assert report.comparison.integers == 2 * 9 * (8 + 6)
    assert report.comparison.relative_difference < 1e-5


@pytest.mark.usefixtures("_offered")
def test_no_zero_point_is_fitted_to_it() -> None:
    model = quantized("down", "down")
    assert qp.fit_zero_points(model, [X]).fitted == {}  # the second input is never negative
    assert qp.prepare(model, X, runtime="onnxruntime").unsigned == ()
    assert type(model[2].input_quantizer.format) is Down
    with pytest.raises(ArgumentError, match="int8 is a Down"):
        model[2].input_quantizer.use_zero_point(0)
    assert type(model[2].input_quantizer.format) is Down
    for given in (Down(8, unsigned=True), "down_unsigned"):
        with pytest.raises(ArgumentError, match="is a Down"):
            qp.TensorQuantizer(qp.QuantDescriptor(format=given, zero_point=9))
