"""TensorRT's rules for where quantizers stand, on an exported residual network.

Source: the documentation of TensorRT, "Working with Quantized Types", section "Explicit Quantization",
"Q/DQ Layer-Placement Recommendations". Each test names the rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.export import export_onnx, prepare

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Block(nn.Module):
    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip = nn.Conv2d(width, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.skip(x) + self.body(x))


class Graph:
    """The exported file, to ask where values come from."""

    def __init__(self, path: Path) -> None:
        proto = onnx.load(str(path))
        self.nodes = list(proto.graph.node)
        self.constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}

    def maker(self, value: str) -> str:
        return self.makers[value].op_type if value in self.makers else ""

    def of(self, *kinds: str) -> list[Any]:
        return [node for node in self.nodes if node.op_type in kinds]

    def users(self, value: str) -> list[str]:
        return [node.op_type for node in self.nodes if value in node.input]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    torch.manual_seed(0)
    with qp.quantize_modules():
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), Block(4), Block(4, 2), nn.Flatten(), nn.Linear(64, 5)
        ).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # so that it does not vanish
            nn.init.normal_(module.running_mean)
    x = torch.randn(2, 3, 8, 8)
    prepare(model, x, runtime="tensorrt")
    qp.calibrate(model, [x], progress=False)
    path = tmp_path_factory.mktemp("tensorrt") / "m.onnx"
    report = export_onnx(model, x, path, runtime="tensorrt")
    assert report.comparison is not None
    assert report.comparison.mismatching == 0
    return Graph(path)


def test_all_inputs_of_weighted_operations_are_quantized(graph: Graph) -> None:
    """Rule: quantize all inputs of weighted operations (convolution, transposed convolution, GEMM)."""
    weighted = graph.of("Conv", "ConvTranspose", "Gemm", "MatMul")
    assert len(weighted) == 7
    for node in weighted:
        weight = graph.maker(node.input[1])
        if weight == "Transpose":  # what of a linear layer TensorRT turns by itself
            weight = graph.maker(graph.makers[node.input[1]].input[0])
        assert (graph.maker(node.input[0]), weight) == ("DequantizeLinear", "DequantizeLinear")


def test_outputs_of_weighted_operations_are_not_quantized(graph: Graph) -> None:
    """Rule: by default, do not quantize the outputs of weighted operations; but for the skip's."""
    followed = [node for node in graph.of("Conv") if "QuantizeLinear" in graph.users(node.output[0])]
    assert len(followed) == 1
    (pair,) = (n for n in graph.of("QuantizeLinear") if n.input[0] == followed[0].output[0])
    (dequantized,) = (n for n in graph.of("DequantizeLinear") if n.input[0] == pair.output[0])
    assert graph.users(dequantized.output[0]) == ["Add"]


def test_batch_norm_and_relu_are_left_to_tensorrt(graph: Graph) -> None:
    """Rule: do not simulate batch-normalization and ReLU fusions in the training framework."""
    assert len(graph.of("BatchNormalization")) == 4
    assert len(graph.of("Relu")) == 5


def test_the_residual_input_of_an_addition_is_quantized(graph: Graph) -> None:
    """Rule: quantize the residual input in skip connections, and not the branch that is fused with it."""
    additions = graph.of("Add")
    assert len(additions) == 2
    for node in additions:
        assert sorted(map(graph.maker, node.input)) == ["BatchNormalization", "DequantizeLinear"]


def test_activations_have_one_scale_and_weights_one_for_each_channel(graph: Graph) -> None:
    """Rule: use per-tensor quantization for activations, and per-channel quantization for weights."""
    for node in graph.of("QuantizeLinear"):
        scale = graph.constants[node.input[1]]
        if node.input[0] in graph.constants:
            weight = graph.constants[node.input[0]]
            assert scale.shape == (weight.shape[0],)
        else:
            assert scale.shape == ()


@pytest.mark.parametrize("calibrated", [False, True])
def test_weights_of_transposed_convolutions_get_their_scales_on_axis_0(
    tmp_path: Path, calibrated: bool
) -> None:
    """pytorch-quantization's tensor_quant.py: per-channel scales of ConvTranspose weights are on axis 0."""
    with qp.quantize_modules():
        model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU()).eval()
    x = torch.randn(2, 3, 5, 5)
    if calibrated:
        qp.calibrate(model, [x], progress=False)
    report = prepare(model, x, runtime="tensorrt")
    assert report.turned == ("0.weight_quantizer",)
    assert ("calibrate again" in report.skipped.get("0.weight_quantizer", "")) is calibrated
    assert prepare(model, x, runtime="tensorrt").turned == ()
    qp.calibrate(model, [x], progress=False, existing="keep")
    assert model[0].weight_quantizer.amax.shape == (3, 1, 1, 1)
    model.train()(x).sum().backward()
    exported = export_onnx(model.eval(), x, tmp_path / "m.onnx", runtime="tensorrt")
    assert exported.comparison is not None
    assert exported.comparison.mismatching == 0
