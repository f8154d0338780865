"""folded_weights: the same outputs from weights that are quantized already, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ExportError
from quantpatch.export.prepare.folded_weights import folded_weights
from quantpatch.layers.quantizer import named_quantizers


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
    with folded_weights(model) as folded:
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
    folded = folded_weights(model)
    folded.undo()
    model.a.weight_quantizer.disable()
    folded.undo()
    assert model.a.weight_quantizer.disabled


def prune_a_row(model: nn.Module) -> None:
    model.a.weight.data[2] = 0.0


def step(model: nn.Module) -> None:
    with torch.no_grad():
        model.a.weight.add_(1.0)


def resize(model: nn.Module) -> None:
    model.a.weight.data = torch.ones(3, 6)


@pytest.mark.parametrize("change", [prune_a_row, step, resize])
def test_changed_weights_are_named_and_keep_their_new_values_and_the_others_come_back(change) -> None:
    model = calibrated()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = folded_weights(model)
    change(model)
    new = model.a.weight.detach().clone()
    with pytest.raises(ExportError, match=r"changed since they were folded: a\.weight\. They keep"):
        folded.undo()
    assert torch.equal(model.a.weight, new)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "rnn" in key)
    assert not any(q.disabled for q in named_quantizers(model).values())
    folded.undo()  # nothing is left to do


def test_what_ended_the_block_is_not_hidden_by_weights_that_changed() -> None:
    model = calibrated()

    def evaluate() -> None:
        with folded_weights(model):
            step(model)
            raise KeyError("of the body")

    with pytest.warns(qp.QuantPatchWarning, match=r"a\.weight"), pytest.raises(KeyError):
        evaluate()
    assert not model.a.weight_quantizer.disabled


def test_a_model_that_was_cast_inside_gets_its_old_weights_in_the_new_dtype() -> None:
    model = calibrated()
    before = model.a.weight.detach().clone()
    with folded_weights(model):
        model.double()
    assert torch.equal(model.a.weight, before.double())


def test_an_error_half_way_leaves_nothing_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calibrated()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def out_of_memory() -> None:
        raise MemoryError

    monkeypatch.setattr(model.rnn.weight_hh_l0_quantizer, "disable", out_of_memory)
    with pytest.raises(MemoryError):
        folded_weights(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(q.disabled for q in named_quantizers(model).values())


def test_a_table_that_its_layer_renormalizes_in_place_is_left() -> None:
    with qp.quantize_modules(include=["Embedding"]):
        table = nn.Embedding(5, 4, max_norm=0.5).eval()
    qp.calibrate(table, [torch.arange(5)], progress=False)
    with folded_weights(table) as folded:
        assert folded.folded == ()
        assert "max_norm" in folded.skipped["weight"]
        table(torch.arange(5))


def test_a_weight_that_a_float_layer_uses_is_left() -> None:
    model = calibrated()
    model.b.weight_quantizer.disable()
    with folded_weights(model) as folded:
        assert "tied" in folded.skipped["a.weight"]
        assert "a.weight" not in folded.folded


def test_a_weight_that_is_quantized_in_two_ways_is_left() -> None:
    model = calibrated()
    model.b.weight_quantizer.amax = model.b.weight_quantizer.amax * 2
    x = torch.randn(5, 2, 6)
    expected = model(x)
    with folded_weights(model) as folded:
        assert set(folded.skipped) == {"a.weight", "b.weight"}
        assert torch.equal(model(x), expected)


def test_a_parametrized_weight_is_left() -> None:
    class Normed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))

    model = Normed()
    qp.convert(model)
    qp.calibrate(model.eval(), [torch.randn(3, 6)], progress=False)
    with folded_weights(model) as folded:
        assert "parametrization" in folded.skipped["0.weight"]


def test_training_mode_is_refused() -> None:
    with pytest.raises(ExportError, match=r"model\.eval\(\)"):
        folded_weights(calibrated().train())
