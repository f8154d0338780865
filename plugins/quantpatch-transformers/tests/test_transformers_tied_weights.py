"""Models that tie weights by patterns on names: their ranges stay their own."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from architectures import IDS, SMALL
from torch import nn

import quantpatch as qp
from quantpatch_transformers import make_savable

TIED = {
    "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
    "predictions.decoder.bias": "predictions.bias",
}


def albert():
    config = transformers.AlbertConfig(
        vocab_size=99,
        embedding_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{**SMALL, "num_hidden_layers": 1},
    )
    return transformers.AlbertForMaskedLM(config).eval()


def in_a_block():
    with qp.quantize_modules():
        return albert()


def converted():
    model = albert()
    qp.convert(model)
    model.tie_weights()
    return model


@pytest.mark.parametrize("build", [in_a_block, converted])
def test_a_range_is_not_tied_to_the_table_that_its_weight_is(build):
    torch.manual_seed(0)
    model = build()
    assert model.all_tied_weights_keys == TIED
    assert model.get_expanded_tied_weights_keys(all_submodels=True) == TIED
    decoder = model.predictions.decoder
    assert decoder.weight is model.albert.embeddings.word_embeddings.weight
    qp.calibrate(model, [{"input_ids": IDS}], progress=False)
    expected = decoder.weight.detach().abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(decoder.weight_quantizer.amax.reshape(-1, 1), expected)
    model.resize_token_embeddings(99)
    assert model(input_ids=IDS).logits.isfinite().all()


def test_such_a_model_is_saved_and_loaded_with_its_ranges(tmp_path):
    torch.manual_seed(0)
    model = in_a_block()
    qp.calibrate(model, [{"input_ids": IDS}], progress=False)
    make_savable(model)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


class Heads(transformers.PreTrainedModel):
    """Two heads of which one takes over all that the other has."""

    config_class = transformers.BertConfig
    _tied_weights_keys = {r"heads\.(?!0)\d+": "heads.0"}

    def __init__(self, config):
        super().__init__(config)
        self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.post_init()

    def forward(self, x):
        return self.heads[1](10 * self.heads[0](x))


def test_heads_of_the_same_weights_have_inputs_of_different_ranges():
    config = transformers.BertConfig(tie_word_embeddings=True)
    torch.manual_seed(0)
    with qp.quantize_modules():
        model = Heads(config)
    assert model.all_tied_weights_keys == {
        "heads.1.weight": "heads.0.weight",
        "heads.1.bias": "heads.0.bias",
    }
    x = torch.randn(8, 4)
    expected = 10 * nn.functional.linear(x, model.heads[0].weight, model.heads[0].bias).abs().max()
    qp.calibrate(model, [(x,)], progress=False)
    amax = [head.input_quantizer.amax.item() for head in model.heads]
    assert amax[0] == pytest.approx(x.abs().max().item())
    assert amax[1] == pytest.approx(expected.item(), rel=0.05)
    copy.deepcopy(model).tie_weights()
