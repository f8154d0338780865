"""A float checkpoint, quantized as ``from_pretrained`` loads it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from architectures import MODELS
from checkpoints import assert_same, loaded, quantizers, states
from torch import nn

import quantpatch as qp
from quantpatch.errors import ArgumentError, ConversionError, UnknownNameError
from quantpatch_transformers import QuantPatchConfig, make_savable
from quantpatch_transformers.pretrained import METHOD


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_quantized_inside_a_block_and_nothing_is_made_up(name, tmp_path, caplog):
    """It is built on the meta device and filled: what a checkpoint does not have may not be left to fill."""
    torch.manual_seed(0)
    reference = MODELS[name].build().eval()
    reference.save_pretrained(tmp_path)
    caplog.clear()
    with qp.quantize_modules():
        model = loaded(type(reference), tmp_path, dtype=torch.bfloat16)
    # Of kernels that are not installed and of the dtype nobody needs to be told here.
    told = [r.getMessage() for r in caplog.records if "installed" not in r.getMessage()]
    assert [
        message
        for message in told
        if any(word in message for word in ("REPORT", "checkpoint", "initialized"))
    ] == []
    assert set(states(model).values()) == {"dynamic (not calibrated)"}
    buffers = {key: tensor for key, tensor in model.named_buffers() if not key.endswith("_amax")}
    assert buffers.keys() == dict(reference.named_buffers()).keys()
    assert all(quantizer.state_dict()["_amax"].isnan().all() for quantizer in quantizers(model).values())
    theirs = loaded(type(reference), tmp_path, dtype=torch.bfloat16).state_dict()
    mine = qp.float_state_dict(model)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())


@pytest.fixture
def float_path(tmp_path):
    torch.manual_seed(0)
    model = MODELS["gpt2"].build().eval()
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_configuration_quantizes_a_float_checkpoint(float_path):
    config = QuantPatchConfig("w4a8", include=["Embedding"], rules={"lm_head": None}, operations="products")
    model = loaded(transformers.GPT2LMHeadModel, float_path, quantization_config=config)
    by_hand = loaded(transformers.GPT2LMHeadModel, float_path)
    qp.convert(by_hand, recipe="w4a8", include=["Embedding"], operations="products")
    qp.configure(by_hand, {"lm_head": None})
    assert_same(model, by_hand)
    assert isinstance(model.transformer.wte, qp.QuantizedLayer)
    assert model.lm_head.weight_quantizer.disabled


def test_it_is_written_into_the_configuration_and_names_what_was_asked_for(float_path, tmp_path):
    recipe = qp.Recipe(name="mine", input=None)
    config = QuantPatchConfig(recipe, skip=nn.Embedding, rules={"lm_head": None})
    model = loaded(transformers.GPT2LMHeadModel, float_path, quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert written.pop("quantpatch_version")
    assert written == {
        "quant_method": METHOD,
        "recipe": "mine",
        "skip": ["torch.nn.modules.sparse.Embedding"],
        "include": [],
        "plugins": None,
        "rules": {"lm_head": None},
        "operations": None,
    }
    assert "mine" in repr(config)
    assert_same(loaded(transformers.GPT2LMHeadModel, tmp_path / "out"), model)


def test_what_is_wrong_with_a_configuration_is_said_in_its_own_words(float_path):
    def load(**options):
        transformers.GPT2LMHeadModel.from_pretrained(
            float_path, quantization_config=QuantPatchConfig(**options)
        )

    with pytest.raises(TypeError, match="has no 'bits'; it takes recipe, skip"):
        load(bits=8)
    with pytest.raises(UnknownNameError, match="'int9'.*int8"):
        load(recipe="int9")
    with pytest.raises(ArgumentError, match="'lm_haed' matches no layer.*lm_head"):
        load(rules={"lm_haed": None})
    with pytest.raises(UnknownNameError, match="Linaer"):
        load(skip="Linaer")
    with (
        qp.quantize_modules(),
        pytest.raises(ConversionError, match="was built inside a block, which has quantized it already"),
    ):
        load()


def test_other_methods_are_left_to_transformers_inside_a_block(float_path):
    with qp.quantize_modules(), pytest.raises(ImportError, match="bitsandbytes"):
        transformers.GPT2LMHeadModel.from_pretrained(
            float_path, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True)
        )


def test_a_model_of_another_method_is_not_made_savable():
    model = MODELS["gpt2"].build()
    model.hf_quantizer = type("Other", (), {"quantization_config": transformers.BitsAndBytesConfig()})()
    with pytest.raises(ConversionError, match="quantized by 'bitsandbytes' and saved its way"):
        make_savable(model)
