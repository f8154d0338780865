"""``export_program``: torch's operators for quantized values, and the model's integers in them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.errors import ArgumentTypeError, ExportError, QuantPatchWarning
from quantpatch.numerics.formats import Blocked, Integer

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def built(build: Callable[[], nn.Module], *args: Any, recipe: Any = "int8", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        model = build().eval()
    qp.calibrate(model, [args], progress=False, **options)
    return model


UNEVEN = qp.Recipe(name="u", input=None, weight=qp.QuantDescriptor(format=Blocked(Integer(4), 3)))
DYNAMIC = qp.Recipe(name="dynamic", input=qp.QuantDescriptor(dynamic=True))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 6, 2, 2, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.up(x + self.body(x))
        return result


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 4, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        result: Tensor = self.recurrent(x)[0]
        return result


TOKENS = torch.arange(12).reshape(2, 6)
MODELS = [(cnn, X), (Residual, X), (Attention, TOKENS), (lambda: nn.Conv1d(3, 4, 3), X[:, :, 0])]


def kinds(program: torch.export.ExportedProgram) -> Counter[str]:
    return Counter(
        str(node.target).rpartition("quantized_decomposed.")[2]
        for node in program.graph.nodes
        if "quantized_decomposed" in str(node.target)
    )


@pytest.mark.parametrize(("build", "x"), MODELS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_program_gives_what_the_model_gives(build: Callable[[], nn.Module], x: Tensor) -> None:
    model = built(build, x)
    with torch.no_grad():
        expected = model(x)
        result = qp.export_program(model, x).module()(x)
    step = expected.abs().max().item() / 127
    assert (result - expected).abs().max().item() < step
    assert ((result - expected).abs() < 1e-5).float().mean().item() > 0.98


def test_activations_and_weights_are_of_torchs_operators_and_the_float_weights_are_gone() -> None:
    model = built(cnn, X)
    program = qp.export_program(model, X)
    assert kinds(program) == {
        "quantize_per_tensor.default": 3,
        "dequantize_per_tensor.default": 3,
        "dequantize_per_channel.default": 3,
    }
    names = {f"{n}.weight_quantizer.{part}" for n in "024" for part in ("codes", "scale", "zero_point")}
    assert set(program.state_dict) == names | {"0.bias", "2.bias", "4.bias"}
    assert program.constants == {}
    conv: Any = model[2]
    codes, scale = (program.state_dict[f"2.weight_quantizer.{part}"] for part in ("codes", "scale"))
    assert codes.dtype == torch.int8
    assert torch.equal(codes * scale[:, None, None, None], conv.weight_quantizer(conv.weight))


def test_signed_activations_are_int8_and_unsigned_ones_have_their_zero_point() -> None:
    model = built(cnn, X + 0.7, zero_points=True)
    every = qp.layers.named_quantizers(model)
    program = qp.export_program(model, X)
    found = [n.args[2:] for n in program.graph.nodes if "quantize_per_tensor.default" in str(n.target)][::2]
    zero = every["0.input_quantizer"].zero_point
    assert zero
    assert found[0] == (zero, 0, 255, torch.uint8)
    signed = qp.export_program(built(cnn, X), X)
    first = next(n for n in signed.graph.nodes if "quantize_per_tensor" in str(n.target))
    assert first.args[2:] == (0, -128, 127, torch.int8)


def test_few_bits_are_bounds_and_a_range_of_zero_gives_zeros() -> None:
    recipe = qp.Recipe(
        name="few",
        input=qp.QuantDescriptor(num_bits=4),
        weight=qp.QuantDescriptor(num_bits=3, axis="channel", narrow_range=True),
    )
    model: Any = built(lambda: nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), X, recipe=recipe)
    with torch.no_grad():
        model[1].weight[0] = 0.0
    qp.calibrate(model, [X], existing="overwrite", progress=False)
    program = qp.export_program(model, X)
    first = next(n for n in program.graph.nodes if "quantize_per_tensor" in str(n.target))
    assert first.args[3:5] == (-8, 7)
    assert torch.allclose(program.module()(X), model(X), atol=1e-6)
    model[0].input_quantizer.amax = 0.0
    assert torch.allclose(qp.export_program(model, X).module()(X), model(X), atol=1e-6)


def test_ranges_of_channels_and_other_types_of_floats() -> None:
    recipe = qp.Recipe(name="channels", input=qp.QuantDescriptor(axis=-1))
    model = built(lambda: nn.Linear(8, 4), X, recipe=recipe)
    program = qp.export_program(model, X)
    assert kinds(program)["quantize_per_channel.default"] == 1
    assert torch.allclose(program.module()(X), model(X), atol=1e-6)
    half = built(lambda: nn.Linear(8, 4), X).to(torch.bfloat16)
    result = qp.export_program(half, X.bfloat16()).module()(X.bfloat16())
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result, half(X.bfloat16()))


def test_weights_in_blocks_are_integers_with_a_scale_for_each() -> None:
    blocks = qp.QuantDescriptor(format=Blocked(Integer(4), 4), dynamic=True)
    recipe = qp.Recipe(name="b", input=None, weight=blocks)
    model: Any = built(lambda: nn.Linear(8, 6), X, recipe=recipe)
    with torch.no_grad():
        model.weight[1, :4] = 0.0
    program = qp.export_program(model, X)
    assert kinds(program)["dequantize_per_channel_group.default"] == 1
    assert program.state_dict["weight_quantizer.codes"].dtype == torch.int8
    assert program.state_dict["weight_quantizer.scale"].shape == (6, 2)
    assert torch.allclose(program.module()(X), model(X), atol=1e-6)


def test_shapes_may_be_dynamic_and_arguments_keywords() -> None:
    model = built(cnn, X)
    program = qp.export_program(model, X, dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.allclose(program.module()(X[:2]), model(X[:2]), atol=1e-5)
    by_name = qp.export_program(model[:1], (), kwargs={"input": X})
    assert torch.allclose(by_name.module()(input=X), model[:1](X), atol=1e-6)


def test_a_saved_program_runs_without_quantpatch(tmp_path: Path) -> None:
    model = built(cnn, X)
    program = qp.export_program(model, X)
    torch.export.save(program, tmp_path / "m.pt2")
    torch.save((X, model(X).detach()), tmp_path / "xy.pt")
    code = f"""
import sys, torch
sys.modules["quantpatch"] = None
import torch.ao.quantization.fx._decomposed
x, y = torch.load({str(tmp_path / "xy.pt")!r}, weights_only=True)
assert torch.allclose(torch.export.load({str(tmp_path / "m.pt2")!r}).module()(x), y, atol=1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_model_is_afterwards_as_it_was() -> None:
    model = built(cnn, X).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = qp.export_program(model, X)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.allclose(program.module()(X), model(X), atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "calibrated", "why"),
    [
        ("int8", False, r"0\.input_quantizer: its range is not known; write qp\.calibrate"),
        (DYNAMIC, False, "takes its range from each tensor"),
        ("fp8", True, "fp8_e4m3 is not one of the integers"),
        ("mxfp8", True, "is in blocks, for which torch has an operator for weights of integers only"),
        (UNEVEN, True, "its rows of 8 are not a multiple of its blocks of 3"),
    ],
)
def test_what_has_no_operator_is_refused_by_name(recipe: Any, calibrated: bool, why: str) -> None:
    with qp.quantize_modules(recipe=recipe):
        model = nn.Sequential(nn.Linear(8, 4))
    if calibrated:
        qp.calibrate(model, [X], progress=False)
    with pytest.raises(ExportError, match=why) as error:
        qp.export_program(model, X)
    assert error.value.quantizers


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if y.sum() > 0 else -y


def test_what_torch_export_refuses_is_said_with_its_module() -> None:
    model = built(lambda: nn.Sequential(nn.ReLU(), Branching()), X)
    with pytest.raises(ExportError, match=r"torch\.export in 1 \(Branching\).*torch\.where(.|\n)*y\.sum"):
        qp.export_program(model, X)


def test_wrong_models() -> None:
    with pytest.raises(ArgumentTypeError, match="export_program takes a model"):
        qp.export_program("model", X)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="export the module inside it"):
        qp.export_program(nn.DataParallel(nn.Linear(8, 4)), X)
    with pytest.warns(QuantPatchWarning, match="holds no quantizer, so the program will be float"):
        qp.export_program(nn.Linear(8, 4), X)
    model = built(lambda: nn.Linear(8, 4), X)
    for name in ("input", "weight"):
        model.quantizer(name).disable()
    with pytest.warns(QuantPatchWarning, match=r"are off \(input_quantizer, weight_quantizer\).*prepare"):
        qp.export_program(model, X)
