"""Weights and biases in files for ONNX Runtime: what kernels take as integers, and floats made at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.export import export_onnx
from quantpatch.numerics.formats import Blocked, Integer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from exported_files import Exported, built, images, run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def linears(recipe: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)).eval()
    qp.convert(model, recipe=recipe)
    return model


def dequantized_at_each_run(exported: Exported) -> list[str]:
    constants = {tensor.name for tensor in exported.optimized.graph.initializer}
    nodes = (n for n in exported.optimized.graph.node if n.op_type == "DequantizeLinear")
    return [node.name for node in nodes if node.input[0] in constants]


def kinds(exported: Exported) -> set[int]:
    """Types of the matrices in the file."""
    return {t.data_type for t in exported.proto.graph.initializer if min([*t.dims, 0][:2]) > 1}


@pytest.mark.parametrize("recipe", ["w4a8", "int4"])
def test_codes_of_four_bits_are_stored_in_four_and_run_on_integer_kernels(
    recipe: str, tmp_path: Path
) -> None:
    exported = Exported(linears(recipe), images(3, 64), tmp_path)
    exported.assert_same()
    assert kinds(exported) == {onnx.TensorProto.INT4}
    assert exported.kernels["MatMulIntegerToFloat"] == 2
    assert dequantized_at_each_run(exported) == []


def test_convolutions_of_four_bits_run_on_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1)
    )
    qp.convert(model.eval(), recipe="w4a8")
    exported = Exported(model, images(1, 3, 12, 12), tmp_path)
    exported.assert_same()
    assert kinds(exported) == {onnx.TensorProto.INT4}
    assert exported.kernels["QLinearConv"] == 3
    assert dequantized_at_each_run(exported) == []


def test_weights_of_fp8_are_floats_once_loaded(tmp_path: Path) -> None:
    exported = Exported(linears("fp8"), images(3, 64), tmp_path)
    assert kinds(exported) == {onnx.TensorProto.FLOAT8E4M3FN}
    assert exported.kernels["MatMul"] == 2
    assert dequantized_at_each_run(exported) == []
    assert exported.difference.max() < exported.step / 100


@pytest.mark.parametrize("end", ["what the model returns", "an activation of floats", "a signed quantizer"])
def test_a_convolution_whose_result_stays_float_dequantizes_no_weight_at_a_run(
    end: str, tmp_path: Path
) -> None:
    behind: dict[str, list[nn.Module]] = {
        "what the model returns": [],
        "an activation of floats": [nn.Softmax(1)],
        "a signed quantizer": [nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 3)],
    }
    model, x = built(nn.Conv2d(4, 16, 3), *behind[end]), images(1, 4, 8, 8)
    qp.calibrate(model, [x], progress=False)
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert report.comparison is not None
    assert (report.comparison.differing, report.comparison.mismatching) == (0, 0)
    (plain,), (optimized,) = (run(tmp_path / "m.onnx", x, optimized=on) for on in (False, True))
    torch.testing.assert_close(plain, optimized, rtol=1e-4, atol=1e-5)
    nodes = onnx.load(str(tmp_path / "m.onnx")).graph.node
    (conv,) = (node for node in nodes if node.op_type == "Conv")
    (weight,) = (node for node in nodes if conv.input[1] in node.output)
    assert weight.op_type == "Mul"


@pytest.mark.parametrize(
    ("size", "codes", "scales"), [(32, (2, 32), (2, 1)), (40, (2, 40), (2, 1)), (100, (64,), (1,))]
)
def test_blocks_that_no_kernel_takes_are_floats_once_loaded(
    size: int, codes: tuple[int, ...], scales: tuple[int, ...], tmp_path: Path
) -> None:
    """Those of 40 leave a shorter one. Repeated scales are what OpenVINO takes for other elements'."""
    blocks = qp.QuantDescriptor(format=Blocked(Integer(4), size), axis=1)
    recipe = qp.Recipe(name="r", input=qp.QuantDescriptor(), weight=blocks)
    exported = Exported(linears(recipe), images(3, 64), tmp_path)
    compared = exported.report.comparison
    assert compared is not None
    assert (compared.differing, compared.mismatching) == (0, 0)
    assert compared.relative_difference < 1e-5
    assert kinds(exported) >= {onnx.TensorProto.INT4}
    assert dequantized_at_each_run(exported) == []
    assert exported.difference.max() < exported.step / 100
    shapes = {tensor.name: tuple(tensor.dims)[:-1] for tensor in exported.proto.graph.initializer}
    casts = {node.output[0]: node.input[0] for node in exported.proto.graph.node if node.op_type == "Cast"}
    products = [node.input for node in exported.proto.graph.node if node.op_type == "Mul"]
    of_weights = [(shapes[casts[first]], shapes[second]) for first, second in products if first in casts]
    assert of_weights[0] == (codes, scales)


@pytest.mark.sweep(5)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.ReLU6])
def test_transposed_convolutions_keep_the_scales_of_their_channels(
    activation: type[nn.Module], bias: bool, tmp_path: Path
) -> None:
    """ONNX Runtime would quantize their weights again, with one scale, where integers come in and go out."""
    transposed = nn.ConvTranspose2d(16, 16, 2, 2, bias=bias)
    model = built(nn.Conv2d(4, 16, 3), nn.ReLU(), transposed, activation(), nn.Conv2d(16, 16, 1))
    with torch.no_grad():
        model[2].weight *= torch.logspace(-2, 0, 16).reshape(1, -1, 1, 1)
    exported = Exported(model, images(2, 4, 8, 8), tmp_path)
    exported.assert_same()
    assert exported.kernels["ConvTranspose"] == 1
    (node,) = (n for n in exported.optimized.graph.node if n.op_type == "ConvTranspose")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in exported.optimized.graph.initializer}
    weight = torch.from_numpy(constants[node.input[1]].copy())
    torch.testing.assert_close(weight, model[2].weight_quantizer(model[2].weight), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_that_is_left_float_runs_on_floats_between_quantized_ones(
    bias: bool, tmp_path: Path
) -> None:
    """ONNX Runtime would quantize its weight, with one scale for all channels."""
    model = built(
        nn.Conv2d(4, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=bias), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )
    with torch.no_grad():
        model[2].weight *= torch.logspace(-2, 0, 16).reshape(-1, 1, 1, 1)
    qp.configure(model, {"2": None})
    exported = Exported(model, images(2, 4, 8, 8), tmp_path)
    exported.assert_same()
    assert exported.kernels["QLinearConv"] == 2
    (node,) = (n for n in exported.optimized.graph.node if n.op_type in ("Conv", "FusedConv"))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in exported.optimized.graph.initializer}
    torch.testing.assert_close(torch.from_numpy(constants[node.input[1]].copy()), model[2].weight.detach())


@pytest.mark.sweep(2)
@pytest.mark.parametrize("opset", [19, 20])
def test_opsets_before_21_are_for_runtimes_that_want_integer_biases_and_cast_no_four_bits(
    opset: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )
    qp.convert(model.eval(), recipe="w4a8")
    exported = Exported(model, images(2, 4, 8, 8), tmp_path, opset=opset)
    assert exported.proto.ir_version == 9
    assert exported.kernels["QLinearConv"] == 3
    constants = {tensor.name: tensor for tensor in exported.proto.graph.initializer}
    made = {name: node for node in exported.proto.graph.node for name in node.output}
    for convolution in [n for n in exported.proto.graph.node if n.op_type == "Conv"][:2]:
        scales = [constants[made[name].input[1]] for name in convolution.input]
        x, weight, bias = (torch.from_numpy(onnx.numpy_helper.to_array(scale).copy()) for scale in scales)
        assert constants[made[convolution.input[2]].input[0]].data_type == onnx.TensorProto.INT32
        torch.testing.assert_close(bias, x * weight, rtol=1e-6, atol=0)
    compared = exported.report.comparison
    assert compared is not None
    assert compared.mismatching == 0
    assert compared.kernels_within_step == 1.0


def test_the_format_of_a_file_is_that_of_its_opset(tmp_path: Path) -> None:
    exported = Exported(built(nn.Linear(4, 4)), images(2, 4), tmp_path)
    assert exported.report.opset == 21
    assert exported.proto.ir_version == 10


def test_convolutions_of_volumes_are_padded_as_those_of_images(tmp_path: Path) -> None:
    model = built(nn.Conv3d(18, 24, 2), nn.ReLU(), nn.Conv3d(24, 16, 1), nn.ReLU(), nn.Conv3d(16, 20, 1))
    exported = Exported(model, images(1, 18, 3, 4, 5), tmp_path)
    exported.assert_same()
    assert exported.weights() == [(24, 20, 2, 2, 2), (16, 24, 1, 1, 1), (20, 16, 1, 1, 1)]
    assert exported.kernels["QLinearConv"] == 3
