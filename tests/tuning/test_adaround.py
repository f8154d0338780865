"""AdaRound rounds each weight up or down, never with a larger error than rounding to the nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.errors import ArgumentError
from quantpatch.tuning import AdaRound
from quantpatch.tuning.reasons import WrongFormat

FAST = AdaRound(steps=150, rows=128, batch=64)
W4 = qp.Recipe(
    name="w4", input=None, weight=qp.QuantDescriptor(num_bits=4, axis="channel", narrow_range=True)
)


def data_for(features: int) -> list[Tensor]:
    mix = torch.randn(features, features)
    return [torch.randn(64, features) @ mix for _ in range(3)]


@pytest.mark.parametrize("recipe", [W4, qp.recipe("int4-weight-only")], ids=["channels", "blocks"])
def test_each_weight_is_rounded_up_or_down(recipe: qp.Recipe) -> None:
    model = nn.Sequential(nn.Linear(48, 24))
    data = data_for(48)
    qp.convert(model, recipe)
    qp.calibrate(model, data)
    layer = model[0]
    own = layer.weight.detach().clone()
    nearest = layer.weight_quantizer(own, batch_axis=None)
    scale = layer.weight.detach().abs().amax(1, keepdim=True) / 7
    report = qp.tune(model, data, method=FAST)
    steps = own / scale
    rounded = layer.weight.detach() / scale
    off = torch.minimum((rounded - steps.floor()).abs(), (rounded - steps.ceil()).abs())
    assert off.max() < 1e-3
    assert (layer.weight != nearest).any()
    assert torch.equal(layer.weight_quantizer(layer.weight, batch_axis=None), layer.weight)
    tuned = report.tuned["0.weight"]
    assert tuned.after < tuned.before


def test_the_output_behind_a_relu_counts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2))
    data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qp.convert(model, W4)
    report = qp.tune(model, data, method=FAST)
    assert all(tuned.after < tuned.before for tuned in report.tuned.values())
    assert report.tuned["0.weight"].note == "by the output of its ReLU"
    assert report.tuned["2.weight"].note == ""
    qp.revert(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_formats_that_are_not_integers_are_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    qp.convert(model, "fp8")
    report = qp.tune(model, [torch.randn(4, 8)], method="adaround")
    assert report.skipped == {"0.weight": WrongFormat("fp8_e4m3", "rounds integers up or down")}


def test_options_that_cannot_be_are_errors() -> None:
    with pytest.raises(ArgumentError, match="steps=0"):
        AdaRound(steps=0)
