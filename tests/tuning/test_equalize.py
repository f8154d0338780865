"""Equalization gives neighbours equal ranges for each channel and leaves float outputs as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ArgumentError

PER_TENSOR = qp.Recipe(name="w8 per tensor", input=None, weight=qp.QuantDescriptor(num_bits=8))


def network() -> nn.Sequential:
    """Of weights that differ much from channel to channel."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    with torch.no_grad():
        for index in (0, 2, 5):
            count = model[index].weight.shape[0]
            model[index].weight.mul_(torch.logspace(-2, 1, count).reshape(-1, 1, 1, 1))
    return model


def test_ranges_of_each_channel_are_equal_on_both_sides() -> None:
    model = network()
    x = torch.randn(4, 3, 10, 10)
    wanted = model(x).detach()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qp.convert(model, PER_TENSOR)
    plain = (model(x) - wanted).norm()
    report = qp.tune(model, [x], method="equalize")
    assert set(report.tuned) == {"2.weight", "5.weight", "9.weight"}
    assert all(tuned.after < tuned.before for tuned in report.tuned.values())
    made, used = model[0].weight.abs().amax((1, 2, 3)), model[2].weight.abs().amax((1, 2, 3))
    torch.testing.assert_close(made, used, rtol=0.02, atol=0)
    assert (model(x) - wanted).norm() < plain
    qp.configure(model, {"*": None})
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    qp.revert(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_has_no_neighbour_is_named() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    qp.convert(model, PER_TENSOR)
    report = qp.tune(model, [torch.randn(3, 4)], method="equalize")
    assert report.tuned == {}
    assert "made by a norm" in str(report.skipped["1.weight"])
    assert "gelu" in str(report.skipped["3.weight"])


def test_channels_that_are_zero_stay() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[3] = 0
        model[5].weight[:, 2] = 0
    x = torch.randn(4, 3, 10, 10)
    wanted = model(x).detach()
    qp.convert(model, PER_TENSOR.replace(weight=qp.QuantDescriptor(num_bits=8)))
    qp.tune(model, [x], method="equalize")
    assert not model[0].weight[3].any()
    assert torch.isfinite(model(x)).all()
    assert (model(x) - wanted).norm() < 0.1 * wanted.norm()
    with pytest.raises(ArgumentError, match="rounds=0"):
        qp.tune(model, [x], method="equalize", rounds=0)
