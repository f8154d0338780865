"""AWQ: scales that leave float outputs as they are, and clipped ranges, by the error of quantized weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.errors import ArgumentError


def network() -> nn.Sequential:
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 16)).eval()
    with torch.no_grad():
        model[0].weight[::7] *= 20
        model[1].weight[:, 1] *= 6
    return model


def error(model: nn.Module, data: list[Tensor], wanted: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - y).square().sum()) for x, y in zip(data, wanted, strict=True))


@pytest.mark.parametrize("recipe", ["int4-weight-only", "w4", "mxfp4"])
def test_outputs_with_quantized_weights_are_nearer(recipe: str) -> None:
    weight = qp.QuantDescriptor(num_bits=4, axis="channel", narrow_range=True)
    chosen = qp.recipe(recipe) if recipe != "w4" else qp.Recipe(name="w4", weight=weight, input=None)
    model = network()
    data = [torch.randn(32, 64) for _ in range(3)]
    wanted = [model(x).detach() for x in data]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qp.convert(model, chosen.replace(input=None))
    if recipe == "w4":
        qp.calibrate(model, data)
    plain = error(model, data, wanted)
    report = qp.tune(model, data, method="awq")
    assert error(model, data, wanted) < plain
    assert report.tuned["1.weight"].after < report.tuned["1.weight"].before
    qp.revert(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_clipping_float_outputs_stay() -> None:
    model = network()
    x = torch.randn(32, 64)
    wanted = model(x).detach()
    qp.convert(model, "int4-weight-only")
    report = qp.tune(model, [x], method="awq", clip=False)
    assert list(report.tuned) == ["1.weight"]
    assert "gelu" in str(report.skipped["3.weight"])
    for layer in (model[1], model[3]):
        layer.weight_quantizer.disable()
    torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)


def test_each_range_is_clipped_on_its_own() -> None:
    model = nn.Sequential(nn.Linear(32, 4, bias=False))
    with torch.no_grad():
        model[0].weight[0, 0] = 3.0  # which nothing is multiplied by
    x = torch.randn(64, 32)
    x[:, 0] = 0
    qp.convert(model, qp.recipe("w4a8").replace(input=None))
    row = model[0].weight[2].detach().clone()
    qp.tune(model, [x], method="awq")
    assert model[0].weight[0, 0] < 2.9
    assert (model[0].weight[2] - row).abs().max() < 0.1


def test_gptq_can_come_after_it() -> None:
    model = network()
    data = [torch.randn(64, 64) for _ in range(3)]
    qp.convert(model, "int4-weight-only")
    report = qp.tune(model, data, method=["awq", "gptq"])
    assert {"1.weight", "3.weight"} == set(report.steps[1].tuned)
    with pytest.raises(ArgumentError, match="steps=-1"):
        qp.tune(model, data, method="awq", steps=-1)
