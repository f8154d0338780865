"""GPTQ rounds to the grid, never with a larger error at the output than rounding to the nearest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.numerics.formats import Integer
from quantpatch.numerics.qparams import QParams
from quantpatch.tuning.gptq import GPTQ
from quantpatch.tuning.weights import Grid

W3 = qp.QuantDescriptor(num_bits=3, axis="channel", narrow_range=True)
CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    "grouped": lambda: nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same"),
    "reflecting": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1),
    "transposed, grouped": lambda: nn.ConvTranspose2d(6, 8, 3, stride=(1, 2), groups=2, dilation=(2, 1)),
}


def grid(w: Tensor, bits: int = 4) -> Grid:
    scales = w.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return Grid(QParams(Integer(bits), None), scales.expand(w.shape).contiguous())


def error(model: nn.Module, data: list[Tensor], wanted: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - y).square().sum()) for x, y in zip(data, wanted, strict=True))


def tuned(made: nn.Module, data: list[Tensor], recipe: str | qp.Recipe, **options: Any) -> nn.Module:
    model = copy.deepcopy(made)
    qp.convert(model, recipe)
    qp.tune(model, data, method="gptq", **options)
    return model


@pytest.mark.parametrize("act_order", [False, True])
def test_with_a_diagonal_hessian_it_is_rounding_to_the_nearest(act_order: bool) -> None:
    w = torch.randn(2, 5, 40)
    gram = torch.diag_embed(torch.rand(2, 40) + 0.1)
    rounded, damping = GPTQ(act_order=act_order).solve(w, gram, grid(w))
    assert torch.equal(rounded, grid(w).nearest(w))
    assert damping == 0.01


@pytest.mark.parametrize("act_order", [False, True])
def test_blocks_of_inputs_change_nothing_but_rounding_errors(act_order: bool) -> None:
    w, x = torch.randn(1, 7, 50), torch.randn(1, 200, 50) @ torch.randn(50, 50)
    gram = x.mT @ x
    whole, _ = GPTQ(act_order=act_order, block_size=50).solve(w, gram, grid(w))
    parts, _ = GPTQ(act_order=act_order, block_size=8).solve(w, gram, grid(w))
    assert (whole != parts).float().mean() < 0.02


def test_it_is_the_sequence_of_the_paper() -> None:
    """Equation 3 of the paper, with the inverse Hessian of the inputs that are left."""
    w, x = torch.randn(1, 4, 12, dtype=torch.float64), torch.randn(60, 12, dtype=torch.float64)
    x = x @ torch.randn(12, 12, dtype=torch.float64)
    gram = x.T @ x
    h = gram + 0.01 * gram.diagonal().mean() * torch.eye(12)
    scale = (w.abs().amax(-1) / 7).squeeze(0)
    left, expected = w[0].clone(), torch.empty(4, 12, dtype=torch.float64)
    for i in range(12):
        inverse = h[i:, i:].inverse()
        expected[:, i] = (left[:, i] / scale).round().clamp(-8, 7) * scale
        left[:, i:] -= ((left[:, i] - expected[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    found, _ = GPTQ(act_order=False).solve(w, gram[None], grid(w))
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("recipe", ["int4", "int4-weight-only", "w4a8", "fp8", "mxfp4", "mxfp8", "nvfp4"])
def test_every_format_gives_back_the_weights_as_they_are(recipe: str) -> None:
    model = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 24))
    mix = torch.randn(48, 48)
    data = [torch.randn(64, 48) @ mix for _ in range(3)]
    qp.convert(model, recipe)
    report = qp.tune(model, data, method="gptq")
    assert report.tuned
    for name in report.tuned:
        layer = model.get_submodule(name.rpartition(".")[0])
        assert torch.equal(layer.weight_quantizer(layer.weight, batch_axis=None), layer.weight)
    assert all(tuned.after < tuned.before for tuned in report.tuned.values())


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_have_a_smaller_error_at_their_output(kind: str) -> None:
    model = nn.Sequential(CONVOLUTIONS[kind]())
    smooth = torch.nn.functional.avg_pool2d
    data = [smooth(torch.randn(4, 6, 16, 16), 3, 1) for _ in range(2)]
    wanted = [model(x).detach() for x in data]
    recipe = qp.Recipe(
        name="w3", input=None, weight=qp.QuantDescriptor(num_bits=3, axis="channel", narrow_range=True)
    )
    qp.convert(model, recipe)
    qp.calibrate(model, data)
    nearest = error(model, data, wanted)
    report = qp.tune(model, data, method="gptq")
    tuned = report.tuned["0.weight"]
    assert error(model, data, wanted) < nearest
    # What it reports is the error at the output, which is there beside a bias.
    bias = 0 if model[0].bias is None else model[0].bias.detach()[:, None, None]
    size = sum(float((y - bias).square().sum()) for y in wanted)
    assert tuned.before == pytest.approx((nearest / size) ** 0.5, rel=1e-3)
    assert tuned.after == pytest.approx((error(model, data, wanted) / size) ** 0.5, rel=1e-3)
    qp.revert(model)


def test_attention_and_what_multiplies_in_its_own_code_is_tuned() -> None:
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    qp.convert(model, "w4a8")
    data = [torch.randn(8, 10, 32) @ torch.randn(32, 32) for _ in range(3)]
    report = qp.tune(model, data, method="gptq")
    assert set(report.tuned) == {
        "self_attn.in_proj_weight", "self_attn.out_proj_weight", "linear1.weight", "linear2.weight",
    }  # fmt: skip


def test_parts_of_a_weight_are_rounded_by_what_each_is_multiplied_by() -> None:
    """With other keys than queries the three parts of ``in_proj_weight`` have inputs of their own."""
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    qp.convert(attention, "w4a8")
    batches = [(torch.randn(2, 9, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)) for _ in range(4)]
    report = qp.tune(attention, batches, method="gptq")
    assert report.tuned["in_proj_weight"].after < report.tuned["in_proj_weight"].before


def test_weights_of_half_precision_are_tuned_in_float32() -> None:
    model = nn.Sequential(nn.Linear(32, 16)).to(torch.bfloat16)
    qp.convert(model, "int4-weight-only")
    data = [(torch.randn(64, 32) @ torch.randn(32, 32)).to(torch.bfloat16) for _ in range(2)]
    assert qp.tune(model, data, method="gptq").tuned
    layer = model[0]
    assert layer.weight.dtype is torch.bfloat16
    assert torch.equal(layer.weight_quantizer(layer.weight, batch_axis=None), layer.weight)


def test_too_few_examples_are_damped_and_reported() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    qp.convert(model, "int4-weight-only")
    report = qp.tune(model, [torch.randn(4, 32)], method="gptq")
    assert report.tuned["0.weight"].note == "damped: 4 examples for 32 inputs"
    assert report.tuned["0.weight"].after <= report.tuned["0.weight"].before


def test_more_damping_than_was_asked_for_is_reported() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    qp.convert(model, "int4-weight-only")
    report = qp.tune(model, [torch.randn(4, 32)], method="gptq", damping=0.0)
    assert "damping" in report.tuned["0.weight"].note


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    qp.convert(model, qp.recipe("w4a8").replace(input=None))
    data = torch.randn(64, 16) @ torch.randn(16, 16)
    data[:, 3] = 0
    qp.calibrate(model, data)
    nearest = model[0].weight_quantizer(model[0].weight.detach(), batch_axis=None)
    qp.tune(model, data, method="gptq")
    assert torch.equal(model[0].weight[:, 3], nearest[:, 3])


def test_ranges_that_are_known_are_kept_and_missing_ones_found() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    data = torch.randn(64, 16)
    qp.convert(model, "w4a8")
    qp.calibrate(model[0], data, method="percentile", percentile=90.0)
    known = model[0].input_quantizer.amax.clone()
    qp.tune(model, data, method="gptq")
    assert torch.equal(model[0].input_quantizer.amax, known)
    assert model[1].input_quantizer.amax is not None


def test_weights_with_their_inputs_first_are_tuned() -> None:
    """As those of GPT-2, which are multiplied as they are, without a transposition."""
    transformers = pytest.importorskip("transformers.pytorch_utils")
    pytest.importorskip("quantpatch_transformers")
    model = nn.Sequential(transformers.Conv1D(12, 20))
    with torch.no_grad():
        model[0].weight.normal_()
    data = [torch.randn(2, 40, 20) @ torch.randn(20, 20) for _ in range(2)]
    qp.convert(model, "w4a8")
    report = qp.tune(model, data, method="gptq")
    assert report.tuned["0.weight"].after < report.tuned["0.weight"].before


def test_half_of_a_model_that_is_called_twice_is_seen_as_often() -> None:
    """A shared layer has the inputs of all of its calls."""
    layer = nn.Linear(16, 16)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    qp.convert(model, "w4a8")
    report = qp.tune(model, [torch.randn(64, 16)], method=["gptq", "bias_correction"])
    assert list(report.steps[0].tuned) == ["0.weight"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_earlier_layers_lost_is_made_up_for(tmp_path: Path, on_disk: bool) -> None:
    wide, rest = torch.randn(64, 64), torch.randn(64, 64)
    made = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(5)))
    data = [(torch.randn(256, 64) @ wide).relu() + 0.1 * torch.randn(256, 64) @ rest for _ in range(3)]
    with torch.no_grad():
        wanted = [made(x) for x in data]
    errors = []
    for earlier in (0.0, 0.5):
        recipe = qp.recipe("int4-weight-only").replace(name="w4", weight=W3)
        folder = tmp_path if on_disk else None
        model = tuned(made, data[:2], recipe, earlier=earlier, offload=folder)
        errors.append(error(model, data[2:], wanted[2:]))
    assert errors[1] < 0.8 * errors[0]


def test_in_attention_what_earlier_layers_lost_is_that_of_the_same_rows() -> None:
    made = nn.Sequential(*(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(2))).eval()
    data = [torch.randn(8, 10, 32) @ torch.randn(32, 32) for _ in range(2)]
    with torch.no_grad():
        wanted = [made(x) for x in data]
    errors = [error(tuned(made, data, "int8", earlier=share), data, wanted) for share in (0.0, 0.5)]
    assert errors[1] < 1.1 * errors[0]


def test_ranges_of_blocks_are_clipped_where_that_loses_less() -> None:
    made = nn.Sequential(nn.Linear(256, 32))
    data = [torch.randn(512, 256) for _ in range(2)]
    with torch.no_grad():
        made[0].weight[:, ::64] *= 1.7
        wanted = [made(x) for x in data]
    errors = [error(tuned(made, data, "int4-weight-only", clip=clip), data, wanted) for clip in (False, True)]
    assert errors[1] < 0.97 * errors[0]


def test_the_recipe_of_weights_in_groups_has_the_method_that_serves_it() -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    qp.convert(model, "int4-weight-only")
    report = qp.tune(model, [torch.randn(64, 32)], recipe="int4-weight-only")
    assert [step.method for step in report.steps] == ["gptq"]
