"""Files for TensorRT: what it takes, and that nothing else is written.

WQT: "Working with Quantized Types" in the documentation of TensorRT 10.11.
OPS: docs/operators.md of onnx-tensorrt. PQ: tensor_quant.py of pytorch-quantization.
Every rule of ``tensorrt_rules`` names its own source.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.export import ExportReport, export_onnx, prepare

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnx
from exported_files import calibrated, initializers, linear, refused, run
from tensorrt_rules import violations

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


# --- Whole files --------------------------------------------------------------------------------------------


class Images(nn.Module):
    """Convolutions of each kind, pools, a residual addition, a concatenation and a dead channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down, self.up = nn.MaxPool2d(2), nn.ConvTranspose2d(8, 8, 2, 2)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
        with torch.no_grad():
            self.depthwise.weight[2] = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = torch.relu(self.depthwise(y) + y)
        return self.head(torch.cat([y, self.up(self.down(y))], 1))


class Tokens(nn.Module):
    """An embedding, a recurrent layer and a decoder's layer, with attention to itself and to others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.rnn = nn.GRU(16, 8, bidirectional=True, batch_first=True)
        self.layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.rnn(self.table(ids))[0]
        return self.layer(y, y[:, :3])


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 6))


IDS = torch.arange(14).reshape(2, 7)
FP8 = qp.QuantDescriptor(num_bits=(4, 3))
ROWS = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, Any]] = {
    "images": (Images, X, "int8"),
    "tokens": (Tokens, IDS, "int8"),
    "w4a8": (perceptron, ROWS, "w4a8"),
    "blocks of int4": (perceptron, ROWS, "int4-weight-only"),
    "fp8": (
        perceptron,
        ROWS,
        qp.Recipe(
            name="f", input=qp.QuantDescriptor(num_bits=(4, 3)), weight=qp.QuantDescriptor(num_bits=(4, 3))
        ),
    ),
    "half": (perceptron, ROWS, "int8"),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_file_keeps_to_the_rules(name: str, tmp_path: Path) -> None:
    build, x, recipe = MODELS[name]
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.ConvTranspose2d):
            module.weight_quantizer = qp.TensorQuantizer(qp.QuantDescriptor(axis=0, narrow_range=True))
    prepare(model, x, runtime="tensorrt")
    if recipe != "int4-weight-only":
        qp.calibrate(model, [x], progress=False)
    if name == "half":
        model, x = model.half(), x.half()
    report = export_onnx(model, x, tmp_path / "m.onnx", runtime="tensorrt")
    assert violations(tmp_path / "m.onnx") == []
    assert report.comparison is not None
    assert report.comparison.mismatching == 0
    assert report.comparison.within_step is None  # of another runtime's kernels
    assert report.comparison.relative_difference < (2e-2 if name == "half" else 1e-5)


def _of(proto: Any, kind: str, *, weight: bool) -> Any:
    constants = {tensor.name for tensor in proto.graph.initializer}
    return next(n for n in proto.graph.node if n.op_type == kind and (n.input[0] in constants) is weight)


def _change(proto: Any, name: str, change: Callable[[Any], Any]) -> None:
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    array = change(onnx.numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


BROKEN: dict[str, Callable[[Any], Any]] = {
    "scale is not positive": lambda p: _change(
        p, _of(p, "QuantizeLinear", weight=False).input[1], lambda scale: scale * 0
    ),
    "zero point is not 0": lambda p: _change(
        p, _of(p, "QuantizeLinear", weight=False).input[2], lambda zero: zero + 1
    ),
    "without a zero point its type is uint8": lambda p: _of(p, "QuantizeLinear", weight=False).input.pop(),
    "of its weight are on axis 1": lambda p: [
        a.CopyFrom(onnx.helper.make_attribute("axis", 1))
        for n in p.graph.node
        for a in n.attribute
        if a.name == "axis" and n.op_type in ("QuantizeLinear", "DequantizeLinear")
    ],
    "TensorRT has no such operator": lambda p: setattr(_of(p, "Relu", weight=False), "op_type", "BitwiseNot"),
    "its bias is quantized": lambda p: [
        n.input.__setitem__(2, n.input[0]) for n in p.graph.node if n.op_type == "Conv"
    ],
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_file_that_breaks_a_rule_is_found_out(
    problem: str, for_tensorrt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = onnx.load(str(for_tensorrt[0]))
    BROKEN[problem](proto)
    onnx.save(proto, str(tmp_path / "broken.onnx"))
    # ONNX itself would refuse some of them.
    monkeypatch.setattr(onnx.checker, "check_model", lambda *args, **options: None)
    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", lambda proto, **options: proto)
    assert any(problem in found for found in violations(tmp_path / "broken.onnx"))


# --- Rule by rule -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def for_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport, nn.Module]:
    path = tmp_path_factory.mktemp("tensorrt") / "m.onnx"
    model = calibrated(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3)), X)
    return path, export_onnx(model, X, path, runtime="tensorrt"), model


def test_tensorrt_zero_points_are_int8_zeros(for_tensorrt: Any) -> None:
    """OPS: the zero point is 0. WQT: values are signed INT8."""
    path, _, _ = for_tensorrt
    constants = initializers(path)
    nodes = [
        n for n in onnx.load(str(path)).graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")
    ]
    assert nodes
    for node in nodes:
        zero = onnx.numpy_helper.to_array(constants[node.input[2]])
        assert zero.dtype.name == "int8"
        assert not zero.any()


def test_tensorrt_scales_are_positive_constants(for_tensorrt: Any) -> None:
    """OPS: the scale is a constant and positive; here a channel's weights are all 0."""
    path, _, _ = for_tensorrt
    constants = initializers(path)
    for node in onnx.load(str(path)).graph.node:
        if node.op_type == "QuantizeLinear":
            assert (onnx.numpy_helper.to_array(constants[node.input[1]]) > 0).all()


def test_tensorrt_weights_are_floats_with_a_pair(for_tensorrt: Any) -> None:
    """WQT: each fake quantization is a pair of QuantizeLinear and DequantizeLinear, weights included."""
    path, report, model = for_tensorrt
    assert report.nodes["QuantizeLinear"] == report.nodes["DequantizeLinear"] == 4
    kinds = {tensor.data_type for tensor in initializers(path).values() if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT}
    assert torch.allclose(run(path, X)[0], model(X), atol=1e-5)


@pytest.mark.filterwarnings("ignore:these quantizers of unsigned numbers saw negative")
def test_tensorrt_takes_no_unsigned_integers(tmp_path: Path) -> None:
    """WQT: signed INT8."""
    error = refused(linear(input=qp.QuantDescriptor(unsigned=True)), tmp_path / "m.onnx", runtime="tensorrt")
    assert error.quantizers == ("0.input_quantizer", "1.input_quantizer")
    assert "unsigned=False" in str(error)


def test_tensorrt_takes_one_scale_for_an_activation(tmp_path: Path) -> None:
    """WQT: scales of activations are per tensor."""
    error = refused(linear(input=qp.QuantDescriptor(axis=-1)), tmp_path / "m.onnx", runtime="tensorrt")
    assert "one scale" in str(error)


def test_tensorrt_takes_fp8_e4m3_per_tensor(tmp_path: Path) -> None:
    """WQT: FP8 is E4M3, and has one scale for the tensor."""
    path = tmp_path / "m.onnx"
    per_channel = linear(
        input=qp.QuantDescriptor(num_bits=(4, 3)), weight=qp.QuantDescriptor(num_bits=(4, 3), axis="channel")
    )
    assert "without axis" in str(refused(per_channel, path, runtime="tensorrt"))
    wide = qp.QuantDescriptor(num_bits=(5, 2))
    assert "E4M3 only" in str(refused(linear(input=wide, weight=wide), path, runtime="tensorrt"))
    good = qp.QuantDescriptor(num_bits=(4, 3))
    assert export_onnx(
        linear(input=good, weight=good), torch.randn(3, 4), path, runtime="tensorrt"
    ).comparison


def test_tensorrt_takes_blocks_of_int4_weights_only(tmp_path: Path) -> None:
    """WQT: INT4 is for weights only, and blocks are of INT4."""
    eight = qp.QuantDescriptor(format="int8_g128", axis="reduction", dynamic=True)
    error = refused(linear(weight=eight), tmp_path / "m.onnx", runtime="tensorrt")
    assert "blocks are of INT4" in str(error)


@pytest.mark.parametrize(
    ("layer", "shape", "format", "message"),
    [
        (nn.Linear(200, 8), (2, 200), "int4_g128", "takes the size of blocks to be 200 / 2"),
        (nn.Conv2d(32, 8, 3), (2, 32, 5, 5), "int4_g32", "takes blocks of matrices"),
        (nn.Linear(31, 5, bias=False), (2, 31), "int4_g32", "has an odd number"),
    ],
)
def test_tensorrt_reads_blocks_from_shapes(
    layer: nn.Module, shape: tuple[int, ...], format: str, message: str, tmp_path: Path
) -> None:
    """onnx-tensorrt, onnxOpImporters.cpp: a shorter last block would be read as smaller blocks throughout."""
    model = nn.Sequential(layer).eval()
    weight = qp.QuantDescriptor(format=format, axis="reduction", dynamic=True)
    qp.convert(model, recipe=qp.Recipe(name="blocks", input=None, weight=weight))
    with pytest.raises(ExportError, match=message) as caught:
        export_onnx(model, torch.randn(shape), tmp_path / "m.onnx", runtime="tensorrt")
    assert caught.value.quantizers == ("0.weight_quantizer",)
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_takes_transposed_convolutions_on_axis_0(tmp_path: Path) -> None:
    """PQ: the per-channel descriptors of ConvTranspose weights have axis 0."""
    model = calibrated(lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3)), torch.randn(2, 4, 5))
    with pytest.raises(ExportError, match="axis 0") as caught:
        export_onnx(model, torch.randn(2, 4, 5), tmp_path / "m.onnx", runtime="tensorrt")
    assert caught.value.quantizers == ("0.weight_quantizer",)
    assert list(tmp_path.iterdir()) == []
    # What the message says to do:
    model[0].weight_quantizer = qp.TensorQuantizer(qp.QuantDescriptor(axis=0, narrow_range=True))
    qp.calibrate(model, [torch.randn(2, 4, 5)], existing="overwrite", progress=False)
    report = export_onnx(model, torch.randn(2, 4, 5), tmp_path / "m.onnx", runtime="tensorrt")
    assert report.comparison is not None
    assert report.comparison.differing == 0
