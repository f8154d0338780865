"""``compare``: signal-to-noise of each layer's output."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ArgumentError


def pair(recipe="int8"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    qp.convert(twin, recipe=recipe)
    return twin, model


DATA = list(torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1)))


def test_the_ratio_is_that_of_the_outputs_over_all_batches():
    twin, model = pair()
    with torch.no_grad():
        f, q = (torch.cat([m[0](x) for x in DATA]).double() for m in (model, twin))
    row = next(row for row in qp.compare(twin, model, DATA).rows if row.layer == "0")
    assert row.sqnr == pytest.approx(10 * math.log10(f.square().sum() / (f - q).square().sum()))
    assert row.cosine == pytest.approx(torch.cosine_similarity(f.flatten(), q.flatten(), dim=0).item())


def test_fewer_bits_have_a_lower_ratio_and_the_worst_layer_comes_first():
    rows8 = qp.compare(*pair("int8"), DATA).rows
    rows4 = qp.compare(*pair("int4"), DATA).rows
    assert max(row.sqnr for row in rows4) < min(row.sqnr for row in rows8)
    assert [row.sqnr for row in rows4] == sorted(row.sqnr for row in rows4)


def test_disabled_quantizers_make_no_difference():
    twin, model = pair()
    for module in twin.modules():
        if isinstance(module, qp.TensorQuantizer):
            module.disable()
    assert all((r.sqnr, r.cosine) == (math.inf, pytest.approx(1)) for r in qp.compare(twin, model, DATA).rows)


def test_layers_that_return_several_values_are_compared_by_the_first():
    model = nn.Sequential(nn.LSTM(6, 4))
    twin = copy.deepcopy(model)
    qp.convert(twin)
    (row,) = qp.compare(twin, model, DATA).rows
    assert 10 < row.sqnr < 80


def test_modules_with_quantizers_of_their_own_are_compared_too():
    class Halved(nn.Module):
        def __init__(self, quantizer):
            super().__init__()
            self.quantizer = quantizer

        def forward(self, x):
            return self.quantizer(x) / 2

    (row,) = qp.compare(Halved(qp.TensorQuantizer()), Halved(nn.Identity()), DATA).rows
    assert (row.layer, row.kind) == ("", "Halved")
    assert 20 < row.sqnr < 80


def test_modes_and_hooks_are_as_before():
    twin, model = pair()
    twin[0].eval()
    qp.compare(twin, model, DATA)
    assert (model.training, twin.training, twin[0].training) == (True, True, False)
    assert not any(m._forward_hooks for m in (*model.modules(), *twin.modules()))


def test_both_models_run_in_eval_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 8))
    twin = copy.deepcopy(model)
    qp.convert(twin)
    (row,) = qp.compare(twin, model, DATA).rows
    assert row.sqnr > 30  # with dropout on either side next to nothing is alike


@pytest.mark.parametrize(("bias", "sqnr", "cosine"), [(0.0, math.inf, 1.0), (0.5, -math.inf, 0.0)])
def test_of_outputs_that_are_all_zero_any_difference_is_everything(bias, sqnr, cosine):
    twin, model = pair()
    for layer in (model[0], twin[0]):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.constant_(twin[0].bias, bias)
    rows = {row.layer: row for row in qp.compare(twin, model, DATA).rows}
    assert (rows["0"].sqnr, rows["0"].cosine) == (sqnr, cosine)


def test_a_layer_that_gives_nan_is_the_worst_of_all():
    twin, model = pair()
    with torch.no_grad():
        twin[2].bias[0] = math.nan
    first, second = qp.compare(twin, model, DATA).rows
    assert (first.layer, second.layer) == ("2", "0")
    assert math.isnan(first.sqnr)


@pytest.mark.parametrize("value", ["infinite", "nan"])
def test_json_has_finite_numbers_alone(value):
    twin, model = pair()
    if value == "infinite":
        twin[0].input_quantizer.disable()
        twin[0].weight_quantizer.disable()
    else:
        nn.init.constant_(twin[0].bias, math.nan)
    text = qp.compare(twin, model, DATA).to_json()
    assert "NaN" not in text
    rows = {row["layer"]: row for row in json.loads(text)["rows"]}
    assert rows["0"]["sqnr"] is None


def test_it_prints_every_layer():
    text = str(qp.compare(*pair(), DATA))
    assert text.count("QuantLinear") == 2


@pytest.mark.parametrize(
    ("other", "data", "message"),
    [
        (nn.Linear(1, 1), DATA, "no quantized layer by a name"),
        (None, [], "no batch"),
    ],
)
def test_nothing_to_compare_is_an_error(other, data, message):
    twin, model = pair()
    with pytest.raises(ArgumentError, match=message):
        qp.compare(twin, other or model, data)


def test_a_model_beside_itself_is_an_error():
    twin, _ = pair()
    with pytest.raises(ArgumentError, match=r"the same model.*float_model = copy\.deepcopy"):
        qp.compare(twin, twin, DATA)


def test_models_of_different_shape_are_an_error_that_names_the_layer():
    twin, _ = pair()
    other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    with pytest.raises(ArgumentError, match=r"layer '0' ran 1 times.*\(5, 9\).*\(5, 8\)"):
        qp.compare(twin, other, DATA)


def test_models_the_wrong_way_round_are_refused():
    with qp.quantize_modules():
        quantized = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ArgumentError, match=r"write compare\(quantized_model, float_model, data\)"):
        qp.compare(nn.Sequential(nn.Linear(4, 4)), quantized, [torch.randn(2, 4)])


def test_padding_of_an_encoder_does_not_matter():
    def build():
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return nn.TransformerEncoder(layer, 2).eval()

    reference = build()
    with qp.quantize_modules():
        quantized = build()
    quantized.load_state_dict(reference.state_dict())
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    batch = {"src": torch.randn(2, 5, 8), "src_key_padding_mask": padding}
    qp.calibrate(quantized, [batch], progress=False)
    rows = qp.compare(quantized, reference, [batch]).rows
    assert len(rows) == 7  # the encoder, and in each layer attention and two linear layers
    assert all(row.sqnr > 20 for row in rows)
