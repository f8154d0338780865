"""Whole architectures: how much of them runs quantized, without and with quantized attention."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import quantpatch as qp
from quantpatch.errors import ConversionError
from quantpatch_transformers.attention import IMPLEMENTATION, quantize_attention, revert_attention

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.randint(0, 99, (2, 12), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones(2, 12, dtype=torch.long).index_put(
    (torch.tensor(1), torch.arange(8, 12)), torch.tensor(0)
)


def bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=99, **SMALL))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, **SMALL)
    )


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
    )


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def mamba():
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8)
    )


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))

# How to build it, what to run it on, and the least share that runs quantized without quantized attention.
MODELS = {
    "bert": (bert, {"input_ids": IDS, "attention_mask": PADDED}, 0.90),
    "gpt2": (gpt2, {"input_ids": IDS}, 0.94),
    "llama": (llama, {"input_ids": IDS}, 0.92),
    "vit": (vit, {"pixel_values": IMAGES}, 0.90),
    "whisper": (whisper, {"input_features": SOUND, "decoder_input_ids": IDS[:, :6]}, 0.90),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, 0.90),
    "mamba": (mamba, {"input_ids": IDS}, 0.90),
}
WITH_ATTENTION = [name for name in MODELS if name != "mamba"]


def float_model(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def disable_all(model):
    for module in model.modules():
        if isinstance(module, qp.TensorQuantizer):
            module.disable()


def output(model, name):
    with torch.no_grad():
        return model(**MODELS[name][1])[0]


@pytest.mark.parametrize("name", MODELS)
def test_built_in_a_block_or_converted_it_runs_quantized_and_exact_when_disabled(name):
    reference = float_model(name)
    with qp.quantize_modules():
        built = MODELS[name][0]().eval()
    built.load_state_dict(reference.state_dict())
    converted = copy.deepcopy(reference)
    qp.convert(converted)
    report = qp.audit(built, **MODELS[name][1])
    assert report.share >= MODELS[name][2]
    assert qp.audit(converted, **MODELS[name][1]).share == report.share
    assert all(
        "a function called in the forward of" in row.reason for row in report.rows if not row.quantized
    )
    for model in (built, converted):
        assert not torch.equal(output(model, name), output(reference, name))
        disable_all(model)
        assert torch.equal(output(model, name), output(reference, name))


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_with_quantized_attention_everything_runs_quantized(name):
    model = float_model(name)
    qp.convert(model)
    quantize_attention(model)
    qp.calibrate(model, [MODELS[name][1]])
    assert qp.audit(model, **MODELS[name][1]).share == 1.0


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


def test_it_copies_pickles_and_trains():
    model = float_model("gpt2")
    qp.convert(model)
    quantize_attention(model)
    qp.calibrate(model, [{"input_ids": IDS}])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, "gpt2"), output(model, "gpt2"))
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_names_of_the_attention_modules_are_returned():
    assert quantize_attention(float_model("gpt2")) == [f"transformer.h.{i}.attn" for i in (0, 1)]


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


def test_arguments_it_does_not_know_are_refused_rather_than_dropped():
    from quantpatch_transformers.attention import attention_forward

    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ConversionError, match="s_aux"):
        attention_forward(nn.Module(), q, q, q, None, s_aux=torch.zeros(1))
