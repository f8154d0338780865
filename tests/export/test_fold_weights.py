"""fold_weights: the same outputs from weights that are quantized already, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.export.fold import fold_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.rnn = nn.LSTM(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(self.b(self.a(x)))[0]


def calibrated(build: type[nn.Module] = Tied, x: torch.Tensor | None = None) -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules():
        model = build().eval()
    qp.calibrate(model, [torch.randn(5, 2, 6) if x is None else x], progress=False)
    return model


def test_same_outputs_and_back_bit_for_bit() -> None:
    model = calibrated()
    x = torch.randn(5, 2, 6)
    expected = model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    with fold_weights(model) as folded:
        assert folded.folded == ("a.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0")
        assert model.a.weight_quantizer.disabled
        assert model.b.weight_quantizer.disabled
        assert not torch.equal(model.a.weight, before["a.weight"])
        assert torch.equal(model(x), expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not model.a.weight_quantizer.disabled
    assert torch.equal(model(x), expected)


def test_undo_is_done_once() -> None:
    model = calibrated()
    folded = fold_weights(model)
    folded.undo()
    model.a.weight_quantizer.disable()
    folded.undo()
    assert model.a.weight_quantizer.disabled


def test_undo_overwrites_no_new_weights() -> None:
    model = calibrated()
    folded = fold_weights(model)
    with torch.no_grad():
        model.a.weight.add_(1.0)
    with pytest.raises(ExportError, match=r"a\.weight"):
        folded.undo()


def test_a_weight_that_a_float_layer_uses_is_left() -> None:
    model = calibrated()
    model.b.weight_quantizer.disable()
    with fold_weights(model) as folded:
        assert "tied" in folded.skipped["a.weight"]
        assert "a.weight" not in folded.folded


def test_a_weight_that_is_quantized_in_two_ways_is_left() -> None:
    model = calibrated()
    model.b.weight_quantizer.amax = model.b.weight_quantizer.amax * 2
    x = torch.randn(5, 2, 6)
    expected = model(x)
    with fold_weights(model) as folded:
        assert set(folded.skipped) == {"a.weight", "b.weight"}
        assert torch.equal(model(x), expected)


def test_a_parametrized_weight_is_left() -> None:
    class Normed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))

    model = Normed()
    qp.convert(model)
    qp.calibrate(model.eval(), [torch.randn(3, 6)], progress=False)
    with fold_weights(model) as folded:
        assert "parametrization" in folded.skipped["0.weight"]


def test_training_mode_is_refused() -> None:
    with pytest.raises(ExportError, match=r"model\.eval\(\)"):
        fold_weights(calibrated().train())
