"""Whole architectures: how much of them runs quantized, without and with quantized attention."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from architectures import IDS, MODELS
from torch import nn

import quantpatch as qp
from quantpatch.errors import ConversionError
from quantpatch_transformers.attention import (
    IMPLEMENTATION,
    attention_forward,
    quantize_attention,
    revert_attention,
)

# The share that runs quantized with quantized attention; less than all where a router is left float.
WITH_ATTENTION = {
    "bert": 1.0,
    "gpt2": 1.0,
    "llama": 1.0,
    "vit": 1.0,
    "whisper": 1.0,
    "t5": 1.0,
    "qwen3": 1.0,
    "mixtral": 0.99,
    "gpt_oss": 0.99,
    "deepseek_v3": 0.99,
    "llama4": 0.99,
}


def float_model(name):
    torch.manual_seed(0)
    return MODELS[name].build().eval()


def disable_all(model):
    for module in model.modules():
        if isinstance(module, qp.TensorQuantizer):
            module.disable()


def output(model, name):
    with torch.no_grad():
        return model(**MODELS[name].inputs)[0]


@pytest.mark.parametrize("name", MODELS)
def test_built_in_a_block_or_converted_it_runs_quantized_and_exact_when_disabled(name):
    reference = float_model(name)
    with qp.quantize_modules():
        built = MODELS[name].build().eval()
    built.load_state_dict(reference.state_dict())
    converted = copy.deepcopy(reference)
    qp.convert(converted)
    report = qp.audit(built, kwargs=MODELS[name].inputs)
    assert report.share >= MODELS[name].share
    assert qp.audit(converted, kwargs=MODELS[name].inputs).share == report.share
    left = {row.layer: row.reason for row in report.rows if not row.quantized}
    assert set(left) == MODELS[name].float_layers
    for model in (built, converted):
        assert not torch.equal(output(model, name), output(reference, name))
        disable_all(model)
        assert torch.equal(output(model, name), output(reference, name))


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_it_copies_and_pickles(name):
    model = float_model(name)
    qp.convert(model)
    if name in WITH_ATTENTION:
        quantize_attention(model)
    qp.calibrate(model, [MODELS[name].inputs], progress=False)
    assert qp.audit(model, kwargs=MODELS[name].inputs).share >= WITH_ATTENTION.get(name, MODELS[name].share)
    expected = output(model, name)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, name), expected)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_disabled_attention_equals_transformers_own_bit_for_bit(name):
    reference, model = float_model(name), float_model(name)
    reference.set_attn_implementation("eager")
    quantize_attention(model)
    assert not torch.equal(output(model, name), output(reference, name))
    disable_all(model)
    assert torch.equal(output(model, name), output(reference, name))


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_reverted_attention_leaves_nothing_behind(name):
    reference, model = float_model(name), float_model(name)
    quantize_attention(model)
    assert model.config._attn_implementation == IMPLEMENTATION
    revert_attention(model)
    assert model.config._attn_implementation == reference.config._attn_implementation
    assert list(vars(model)) == list(vars(reference))
    assert [n for n, _ in model.named_modules()] == [n for n, _ in reference.named_modules()]
    assert torch.equal(output(model, name), output(reference, name))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "llama4"])
def test_it_trains(name):
    model = float_model(name)
    qp.convert(model)
    quantize_attention(model)
    qp.calibrate(model, [{"input_ids": IDS}])
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_names_of_the_attention_modules_are_returned():
    assert quantize_attention(float_model("gpt2")) == [f"transformer.h.{i}.attn" for i in (0, 1)]


@pytest.mark.parametrize("name", ["llama", "whisper", "vit"])
def test_models_of_the_same_config_keep_their_own_attention(name):
    before = float_model(name)
    expected = output(before, name)
    config = before.config
    model = type(before)(config).eval()
    quantize_attention(model)
    assert torch.equal(output(before, name), expected)
    assert config._attn_implementation != IMPLEMENTATION
    later = type(before)(config).eval()
    later.load_state_dict(before.state_dict())
    assert torch.equal(output(later, name), expected)
    quantize_attention(later)  # is not said to be done already


def test_a_model_without_such_attention_is_an_error():
    with pytest.raises(ConversionError, match="Mamba.*registry"):
        quantize_attention(float_model("mamba"))


def test_twice_or_undone_without_being_done_is_an_error():
    model = float_model("bert")
    with pytest.raises(ConversionError, match="not quantized"):
        revert_attention(model)
    quantize_attention(model)
    with pytest.raises(ConversionError, match="already"):
        quantize_attention(model)


def test_a_recipe_without_activations_is_an_error_and_changes_nothing():
    model = float_model("bert")
    with pytest.raises(ConversionError, match="int8-weight-only"):
        quantize_attention(model, "int8-weight-only")
    assert not any(isinstance(m, qp.TensorQuantizer) for m in model.modules())


@pytest.mark.parametrize("name", ["cache", "sinks", "indices", "block_indices"])
def test_arguments_it_does_not_know_are_refused_rather_than_dropped(name):
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ConversionError, match=f"{name!r}, which Module needs"):
        attention_forward(nn.Module(), q, q, q, None, **{name: torch.zeros(1)})
