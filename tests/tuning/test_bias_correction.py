"""Bias correction leaves no error in the mean of any channel on its data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import quantpatch as qp
from quantpatch.tuning.reasons import NoBias, NoData


def means(model: nn.Module, names: list[str], data: list[Tensor]) -> dict[str, Tensor]:
    """The mean of each channel of each layer's output."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: found[name].append(y))
        for name in names
    ]
    with torch.no_grad():
        for x in data:
            model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(ys).transpose(1, -1).flatten(0, -2).mean(0) for name, ys in found.items()}


def test_the_mean_error_of_every_layer_is_zero_on_its_data() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2), nn.ReLU(), nn.Conv2d(8, 6, 1)
    )  # fmt: skip
    data = [torch.rand(8, 3, 9, 9) for _ in range(3)]
    names = ["0", "2", "4"]
    wanted = means(model, names, data)
    qp.convert(model, "int4")
    qp.calibrate(model, data)
    before = means(model, names, data)
    report = qp.tune(model, data, method="bias_correction")
    now = means(model, names, data)
    for name in names:
        assert (before[name] - wanted[name]).abs().max() > 1e-3
        torch.testing.assert_close(now[name], wanted[name], atol=1e-5, rtol=1e-4)
        assert report.tuned[name].after == 0 < report.tuned[name].before


def test_batches_of_other_sizes_count_by_their_examples() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    data = [torch.rand(3, 8), torch.rand(50, 8) + 1]
    wanted = torch.cat([model(x).detach() for x in data]).mean(0)
    qp.convert(model, "int4")
    qp.tune(model, data, method="bias_correction")
    now = torch.cat([model(x).detach() for x in data]).mean(0)
    torch.testing.assert_close(now, wanted, atol=1e-5, rtol=1e-4)


def test_layers_without_a_bias_or_without_data_are_named() -> None:
    model = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 8)])

    class Runs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    whole = Runs()
    qp.convert(whole, "int8")
    with pytest.warns(qp.QuantPatchWarning, match="saw no data"):
        report = qp.tune(whole, [torch.randn(4, 8)], method="bias_correction")
    assert list(report.tuned) == ["layers.1"]
    assert report.skipped == {"layers.0": NoBias(), "layers.2": NoData()}
