"""How files for ONNX Runtime are written: the same values, in the form that its integer kernels take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.export import export_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from exported_files import Exported, built, images  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.sweep(2)
@pytest.mark.parametrize("channels", [2, 6])
def test_input_channels_are_padded_to_a_multiple_of_four(channels: int, tmp_path: Path) -> None:
    model = built(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3))
    exported = Exported(model, images(2, channels, 8, 8), tmp_path)
    exported.assert_same()
    assert exported.weights() == [(16, -(-channels // 4) * 4, 3, 3), (16, 16, 3, 3)]
    assert exported.report.nodes["Pad"] == 1


def test_who_takes_a_convolutions_output_needs_no_padding(tmp_path: Path) -> None:
    model = built(nn.Conv2d(4, 18, 1), nn.ReLU(), nn.Conv2d(18, 16, 3))
    exported = Exported(model, images(2, 4, 8, 8), tmp_path)
    exported.assert_same()
    assert exported.weights() == [(20, 4, 1, 1), (16, 20, 3, 3)]
    assert "Pad" not in exported.report.nodes


def test_groups_and_four_channels_are_not_padded(tmp_path: Path) -> None:
    model = built(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 2, 1))
    exported = Exported(model, images(2, 4, 8, 8), tmp_path)
    exported.assert_same()
    assert "Pad" not in exported.report.nodes


def test_few_output_channels_are_widened_as_far_as_nobody_sees_it(tmp_path: Path) -> None:
    model = built(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),  # its output is the model's: 8 channels
    )
    exported = Exported(model, images(2, 4, 16, 16), tmp_path)
    exported.assert_same()
    assert exported.weights() == [(16, 4, 3, 3), (16, 1, 2, 2), (16, 1, 3, 3), (8, 16, 3, 3)]
    assert exported.kernels["QLinearConv"] == 4


def test_what_is_flattened_is_not_widened(tmp_path: Path) -> None:
    model = built(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    exported = Exported(model, images(2, 4, 8, 8), tmp_path)
    exported.assert_same()
    assert exported.weights()[0] == (8, 4, 3, 3)


class Gated(nn.Module):
    """Squeeze and excite: each channel times what a small branch says of it."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, narrow, 1),
            nn.ReLU(),
            nn.Conv2d(narrow, width, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.branch(x)


def test_depthwise_convolutions_get_a_multiple_of_sixteen_channels_with_all_that_they_go_with(
    tmp_path: Path,
) -> None:
    model = built(
        nn.Conv2d(4, 24, 1),
        nn.Hardswish(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.Hardswish(),
        Gated(24, 6),
        nn.Conv2d(24, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 3, 1),
    )
    exported = Exported(model, images(2, 4, 5, 5), tmp_path, dynamic_shapes=({0: "batch"},))
    exported.assert_same()
    widened = [(32, 4, 1, 1), (32, 1, 3, 3), (8, 32, 1, 1), (32, 8, 1, 1), (16, 32, 1, 1), (3, 16, 1, 1)]
    assert exported.weights() == widened
    assert "Pad" not in exported.report.nodes
    assert exported.kernels["QLinearConv"] == 6


@pytest.mark.parametrize("seen", ["by a mean over channels", "by another operand", "by the model's caller"])
def test_channels_are_not_widened_where_that_would_be_seen(seen: str, tmp_path: Path) -> None:
    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.relu = nn.Conv2d(4, 24, 1), nn.ReLU()
            self.middle = nn.Conv2d(24, 24, 3, padding=1, groups=24)
            self.last = nn.Conv2d(24, 16, 1)
            self.factor = nn.Parameter(torch.rand(1, 24, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.relu(self.first(x))
            if seen == "by a mean over channels":
                return self.last(self.middle(y * y.mean(1, keepdim=True)))
            if seen == "by another operand":
                return self.last(self.middle(y) * self.factor)
            return self.last(self.middle(y)).mean() + self.middle(y)

    exported = Exported(built(Depthwise()), images(1, 4, 5, 5), tmp_path)
    exported.assert_same()
    assert exported.weights()[:2] == [(24, 4, 1, 1), (24, 1, 3, 3)]


def between_convolutions(*pools: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(4, 16, 3, padding=1), nn.ReLU()]
    for pool in pools:
        layers += [pool, nn.Conv2d(16, 16, 1)]
    return built(*layers)


def test_average_pools_are_convolutions_of_ones(tmp_path: Path) -> None:
    model = between_convolutions(nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d((2, 3), 2))
    exported = Exported(model, images(2, 4, 24, 24), tmp_path)
    exported.assert_same()
    assert "AveragePool" not in exported.report.nodes
    assert exported.report.nodes["Conv"] == 4 + 3


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AvgPool2d(3, 2, ceil_mode=True)]
)
def test_average_pools_that_divide_otherwise_at_the_edge_stay(pool: nn.Module, tmp_path: Path) -> None:
    exported = Exported(between_convolutions(pool), images(2, 4, 12, 12), tmp_path)
    exported.assert_same()
    assert exported.report.nodes["AveragePool"] == 1
    assert exported.report.nodes["Conv"] == 2
    assert "QLinearAveragePool" not in exported.kernels or not pool.ceil_mode


def test_a_global_pool_runs_on_integers(tmp_path: Path) -> None:
    model = built(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    exported = Exported(model, images(2, 4, 12, 12), tmp_path)
    exported.assert_same()
    assert exported.kernels["QLinearGlobalAveragePool"] == 1
    assert "ReduceMean" not in exported.kernels


def test_a_convolution_of_images_with_hard_swish_runs_on_floats_up_to_its_one_quantizer(
    tmp_path: Path,
) -> None:
    model = built(
        nn.Conv2d(3, 16, 3, 2),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 3, 1),
    )
    exported = Exported(model, images(2, 3, 16, 16), tmp_path)
    exported.assert_same()
    assert exported.report.nodes["QuantizeLinear"] == 3
    assert exported.report.quantizers == (
        *(f"{i}.{q}_quantizer" for i in (3, 5) for q in ("input", "weight")),
        "5.output_quantizer",
    )
    assert exported.kernels["QLinearConv"] == 2
    assert "Pad" not in exported.kernels


@pytest.mark.parametrize("tiny", ["a channel's weights", "what comes in"])
def test_a_bias_that_no_int32_holds_is_added_to_floats(tiny: str, tmp_path: Path) -> None:
    """ONNX Runtime's kernel would take the largest that it can have, and say nothing."""
    model = built(
        nn.Conv2d(4, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        nn.Conv2d(16, 4, 1),
    )
    norm, x = model[1], images(2, 4, 8, 8)
    assert norm.running_var is not None
    with torch.no_grad():
        norm.bias.uniform_(0.5, 1.0)
        if tiny == "what comes in":
            x *= 1e-9
        else:
            norm.weight[5] = 1e-9
    exported = Exported(model, x, tmp_path)
    exported.assert_same()
    assert exported.kernels["QLinearConv"] == 2  # the second and the last one


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + x)


def test_residual_networks_run_on_integers_from_end_to_end(tmp_path: Path) -> None:
    model = built(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), Residual(), Residual(), nn.Flatten(), nn.Linear(16 * 64, 3)
    )
    exported = Exported(model, images(2, 4, 8, 8), tmp_path, dynamic_shapes=({0: "batch"},))
    exported.assert_same()
    assert exported.kernels["QLinearConv"] == 5
    assert exported.kernels["QLinearAdd"] == 2
    assert exported.kernels["QuantizeLinear"] == 1  # of the input
    assert not {"Conv", "Add", "Relu", "DequantizeLinear"} & exported.kernels.keys()


def test_concatenations_run_on_integers(tmp_path: Path) -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU())
            self.second = nn.Conv2d(16, 16, 3, padding=1)
            self.last = nn.Conv2d(32, 16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.last(torch.cat([y, self.second(y)], 1))

    exported = Exported(built(Forked()), images(2, 4, 8, 8), tmp_path)
    exported.assert_same()
    assert exported.kernels["QLinearConcat"] == 1


def test_quantizers_that_are_shared_give_one_pair(tmp_path: Path) -> None:
    shared = qp.TensorQuantizer(qp.QuantDescriptor(amax=2.0))

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = shared, shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    x = images(50, 50)
    report = export_onnx(Again(), x, tmp_path / "m.onnx")
    assert report.nodes == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    assert report.comparison is not None
    assert (report.comparison.differing, report.comparison.mismatching) == (0, 0)


@pytest.mark.parametrize("kind", ["lstm", "gru", "transposed"])
def test_weights_without_an_integer_kernel_are_floats_once_loaded(kind: str, tmp_path: Path) -> None:
    class First(nn.Module):
        def __init__(self, rnn: nn.Module) -> None:
            super().__init__()
            self.rnn = rnn

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]

    if kind == "transposed":
        model, x = built(nn.ConvTranspose2d(4, 6, 3, 2)), images(2, 4, 5, 5)
    else:
        model = built(First(nn.LSTM(8, 8) if kind == "lstm" else nn.GRU(8, 8)))
        x = images(4, 2, 8)
    exported = Exported(model, x, tmp_path)
    exported.assert_same()
    assert {t.data_type for t in exported.proto.graph.initializer if len(t.dims) > 1 and max(t.dims) > 1} >= {
        onnx.TensorProto.INT8
    }
    assert exported.report.nodes["DequantizeLinear"] == exported.report.nodes["QuantizeLinear"]
    assert not {"Cast", "Mul", "Slice", "Concat"} & exported.kernels.keys()
    assert exported.kernels["DequantizeLinear"] == exported.report.nodes["QuantizeLinear"]


def test_projections_of_attention_run_on_integers_and_have_float_biases(tmp_path: Path) -> None:
    """They are parts of one weight and one bias, which ONNX Runtime would cut up as floats."""

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
            nn.init.normal_(self.attention.in_proj_bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x[:, :3], x[:, :3], need_weights=False)[0]

    exported = Exported(built(Crossed()), images(2, 5, 32), tmp_path)
    exported.assert_same()
    assert exported.difference.max() <= exported.step / 1000
    assert exported.kernels["MatMulIntegerToFloat"] == 4
    assert not {"QGemm", "Gemm", "Split"} & exported.kernels.keys()


def test_residual_branches_and_norms_stay_apart(tmp_path: Path) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x + self.inner(x))

    exported = Exported(built(Layer(), Layer()), images(2, 5, 32), tmp_path)
    exported.assert_same()
    assert exported.kernels["LayerNormalization"] == 2
    assert exported.kernels["MatMulIntegerToFloat"] == 2
    assert "SkipLayerNormalization" not in exported.kernels


class Turned(nn.Module):
    """A linear layer whose weight is (in, out), as in GPT-2: it flattens, multiplies, and unflattens."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, outside))
        self.bias = nn.Parameter(torch.randn(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class QuantTurned(qp.QuantizedLayer, Turned):
    inputs = ("x",)
    weights = {"weight": 1}


def test_linear_layers_of_the_other_layout_run_on_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Turned(16, 32), nn.GELU(), Turned(32, 8)).eval()
    qp.convert(model, custom=[(Turned.__module__, "Turned", QuantTurned)])
    exported = Exported(model, images(2, 5, 16), tmp_path)
    exported.assert_same()
    assert exported.kernels["MatMulIntegerToFloat"] == 2
    assert not {"Gemm", "MatMul"} & exported.kernels.keys()
