"""Integer kernels, each by itself, agree within a step with what the file says of their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.export import export_onnx
from quantpatch.export.onnx.kernel_check import KernelCheck, check_kernels
from quantpatch.export.onnx.sessions import session, session_options

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Images(nn.Module):
    """What the convolutional networks of the benchmarks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU())
        self.pool, self.narrow = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1)
        self.widen, self.gate = nn.Conv2d(4, 16, 1), nn.Hardsigmoid()
        self.project = nn.Conv2d(16, 16, 1)
        self.up, self.last = nn.ConvTranspose2d(16, 16, 2, 2), nn.Conv2d(19, 8, 3)
        self.head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 49, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = self.depthwise(y)
        z = z * self.gate(self.widen(torch.relu(self.narrow(self.pool(z)))))
        y = torch.relu(y + self.project(z))
        return self.head(self.last(torch.cat([self.up(y), x], 1)))


class Text(nn.Module):
    """An embedding, a recurrent layer, a causal layer of attention, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(50, 32), nn.LSTM(32, 32, batch_first=True)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(32, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.rnn(self.table(ids))[0]
        for layer in self.layers:
            y = layer(y)
        return self.head(y)


class Sum(nn.Module):
    """Two convolutions with batch norm, added."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.right = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(self.left(x), self.right(x))


class QuantSum(qp.QuantizedLayer, Sum):
    operations = {torch.add: ("left_sum", "right_sum")}


def batches(kind: type[nn.Module]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    if kind is Text:
        return [torch.randint(50, (2, 16), generator=generator) for _ in range(8)]
    return [torch.randn(2, 3, 16, 16, generator=generator) for _ in range(8)]


def exported(kind: type[nn.Module], folder: Path) -> tuple[Path, list[torch.Tensor]]:
    torch.manual_seed(0)
    model, data = kind().eval(), batches(kind)
    qp.convert(model)
    qp.prepare(model, data[0])
    qp.calibrate(model, data[:3], method="mse", progress=False, strict=False)
    qp.fit_zero_points(model, data[:3])
    export_onnx(model, data[0], folder / "m.onnx", check=False, input_names=["x"])
    return folder / "m.onnx", data


def optimized(path: Path) -> Path:
    options = session_options(optimized=True)
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    session(path, options)
    return path.with_name("optimized.onnx")


def checked(path: Path, graph: Path, data: list[torch.Tensor]) -> KernelCheck:
    return check_kernels(path, graph, [{"x": x.numpy()} for x in data])


@pytest.mark.parametrize(("kind", "kernels"), [(Images, 9), (Text, 10)])
def test_every_kernel_agrees_on_many_inputs(kind: type[nn.Module], kernels: int, tmp_path: Path) -> None:
    path, data = exported(kind, tmp_path)
    check = checked(path, optimized(path), data)
    assert check.skipped == ()
    assert len(check.compared) >= kernels
    assert check.share is not None
    assert check.share >= 0.999


def change(graph: Path, kind: str, position: int, by: float) -> None:
    """Multiplies a constant of a kernel."""
    proto = onnx.load(str(graph))
    node = next(node for node in proto.graph.node if node.op_type == kind)
    (tensor,) = (t for t in proto.graph.initializer if t.name == node.input[position])
    name = f"{tensor.name}.changed"
    array = onnx.numpy_helper.to_array(tensor)
    changed = (array * by).astype(array.dtype)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(changed, name))
    node.input[position] = name
    onnx.save(proto, str(graph))


@pytest.mark.parametrize(
    ("kind", "operator", "position"),
    [(Images, "QLinearConv", 1), (Images, "ConvTranspose", 1), (Text, "MatMulIntegerToFloat", 3)],
)
def test_a_kernel_that_computes_otherwise_is_found(
    kind: type[nn.Module], operator: str, position: int, tmp_path: Path
) -> None:
    path, data = exported(kind, tmp_path)
    graph = optimized(path)
    before = checked(path, graph, data[:2])
    change(graph, operator, position, 1.1)  # one scale of one kernel, or all its weights
    after = checked(path, graph, data[:2])
    assert before.values == after.values
    assert 0.5 < (after.share or 0.0) < (before.share or 0.0) - 0.001


def test_a_graph_without_quantized_products_has_nothing_to_compare(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    model: Any = nn.Sequential(qp.TensorQuantizer(qp.QuantDescriptor(amax=2.0)), nn.ReLU()).eval()
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert report.comparison is not None
    assert (report.comparison.kernels, report.comparison.kernels_within_step) == (0, None)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_summands_with_batch_norm_are_compared_before_the_sum(tmp_path: Path) -> None:
    """The float sum behind them ONNX Runtime names, with channels last, as the file names the node."""
    torch.manual_seed(0)
    with qp.quantize_modules(custom=[(__name__, "Sum", QuantSum)]):
        first = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU())
        model = nn.Sequential(first, Sum(), nn.ReLU(), Sum(), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    qp.calibrate(model, [x], progress=False)
    compared = export_onnx(model, x, tmp_path / "m.onnx").comparison
    assert compared is not None
    assert compared.kernels > 4
    assert compared.kernels_within_step == 1.0


def test_a_float_product_of_integers_is_compared_with_what_the_file_says_of_its_weights(
    tmp_path: Path,
) -> None:
    """Weights that are float once loaded, between integers, ONNX Runtime (1.32) quantizes again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(64, 16, 2, 2), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.normal_()[0, 0] = 10.0  # what makes that one scale coarse
    qp.convert(model)
    x = torch.randn(2, 64, 12, 12)
    qp.prepare(model, x)
    qp.calibrate(model, [x], progress=False)
    path = tmp_path / "m.onnx"
    compared = export_onnx(model, x, path, input_names=["x"]).comparison
    assert compared is not None
    assert compared.kernels_within_step == 1.0
    proto = onnx.load(str(path))
    (node,) = (n for n in proto.graph.node if n.op_type == "ConvTranspose")
    (signs,) = (n for n in proto.graph.node if node.input[2] in n.output)  # what keeps it from doing so
    proto.graph.node.remove(signs)
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(model[0].bias.detach().numpy(), node.input[2])
    )
    onnx.save(proto, str(path))
    check = checked(path, optimized(path), [x])
    assert check.skipped == ()
    assert check.share is not None
    assert check.share < 0.999


def test_integers_that_onnxruntime_turns_later_are_compared_as_the_file_has_them(tmp_path: Path) -> None:
    """It moves a transpose behind a QuantizeLinear, whose integers then have the name of the file's node."""
    graph = onnx.parser.parse_model(
        """
        <ir_version: 10, opset_import: ["" : 21]>
        heads (float[2,16,32] x) => (float[2,2,1,16,8] y, float[2,16,16] z)
        <float s = {0.02}, uint8 u = {128}, int8 o = {0}, int64[4] split = {2,16,2,8},
         int64[3] joined = {2,16,16}, int64[1] at = {2}>
        {
            codes = QuantizeLinear(x, s, u)
            values = DequantizeLinear(codes, s, u)
            weights = DequantizeLinear(w, s, o)
            product = MatMul(values, weights)
            parted = Reshape(product, split)
            by_head = Transpose<perm = [0,2,1,3]>(parted)
            [node_of_integers] integers = QuantizeLinear(by_head, s, u)
            wider = Unsqueeze(integers, at)
            y = DequantizeLinear(wider, s, u)
            back = Transpose<perm = [0,2,1,3]>(integers)
            together = Reshape(back, joined)
            z = DequantizeLinear(together, s, u)
        }
        """
    )
    weights = torch.randint(-127, 128, (32, 16), generator=torch.Generator().manual_seed(0))
    graph.graph.initializer.append(onnx.numpy_helper.from_array(weights.to(torch.int8).numpy(), "w"))
    path = tmp_path / "m.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(graph, data_prop=True), str(path))
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    check = checked(path, optimized(path), [x])
    assert check.share == 1.0
    assert check.skipped == ()
