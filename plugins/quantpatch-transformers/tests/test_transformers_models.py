"""GPT-2 and BERT built inside a block: all that multiplies weights is quantized, nothing else changes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import quantpatch as qp
from quantpatch import registry
from quantpatch_transformers.conv1d import QuantConv1D

VOCABULARY = 61


def gpt2_config(attention="eager", **options):
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=24,
        n_layer=2,
        n_head=2,
        attn_implementation=attention,
        **options,
    )


def bert_config(attention="eager", **options):
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        num_labels=3,
        attn_implementation=attention,
        **options,
    )


MODELS = {"gpt2": (GPT2LMHeadModel, gpt2_config), "bert": (BertForSequenceClassification, bert_config)}

# What multiplies weights, by class and number: two blocks each, and what is around them.
QUANTIZED = {"gpt2": {"QuantConv1D": 8, "QuantLinear": 1}, "bert": {"QuantLinear": 14}}
# What has parameters and stays float: tables are looked up, and norms do not multiply matrices.
FLOAT = {"gpt2": {"Embedding": 2, "LayerNorm": 5}, "bert": {"Embedding": 3, "LayerNorm": 5}}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def build(name, attention="eager", **options):
    cls, config = MODELS[name]
    torch.manual_seed(0)
    return cls(config(attention, **options)).eval()


def build_quantized(name, attention="eager", **options):
    with qp.quantize_modules():
        return build(name, attention, **options)


def tokens(seed=1):
    return torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(seed))


def quantizers(model):
    return [m for m in model.modules() if isinstance(m, qp.TensorQuantizer)]


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def calibrated(name, attention="eager"):
    model = build_quantized(name, attention)
    qp.calibrate(model, [tokens(seed) for seed in range(3)], progress=False)
    return model


# --- what comes out of the block -------------------------------------------------------------------


def test_every_layer_with_a_weight_matrix_is_quantized(name):
    model = build_quantized(name)
    found = Counter(type(m).__name__ for m in model.modules() if isinstance(m, qp.QuantizedLayer))
    assert found == QUANTIZED[name]
    assert not [n for n, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]


def test_what_stays_float_is_known(name):
    left = Counter(kind for _, kind in qp.summary(build_quantized(name)).float_layers)
    assert left == FLOAT[name]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_all_products_with_weights_run_quantized_and_only_attention_itself_does_not(name, attention):
    report = qp.audit(build_quantized(name, attention), tokens())
    left = {row.layer for row in report.rows if not row.quantized}
    assert left == {{"gpt2": "GPT2Attention", "bert": "BertSelfAttention"}[name]}
    assert report.share > 0.85


def test_the_same_seed_gives_the_same_weights_inside_and_outside(name):
    theirs, ours = build(name).state_dict(), qp.float_state_dict(build_quantized(name))
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_a_float_checkpoint_loads_strictly(name):
    model = build(name)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    ours = build_quantized(name)
    ours.load_state_dict(model.state_dict())
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_with_quantizers_disabled_the_output_is_the_same_bit_for_bit(name, attention):
    ours = build_quantized(name, attention)
    for quantizer in quantizers(ours):
        quantizer.disable()
    assert torch.equal(logits(ours), logits(build(name, attention)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_calibrated_to_8_bits_the_output_is_near_and_not_the_same(name, attention):
    theirs, ours = logits(build(name, attention)), logits(calibrated(name, attention))
    assert not torch.equal(theirs, ours)
    assert (theirs - ours).norm() < 0.05 * theirs.norm()


def test_a_training_step_moves_every_weight(name):
    model = calibrated(name).train()
    before = {key: value.clone() for key, value in model.named_parameters()}
    labels = tokens() if name == "gpt2" else torch.tensor([0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens(), labels=labels).loss.backward()
    optimizer.step()
    weights = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, qp.QuantizedLayer)}
    weights &= set(before)  # a tied weight goes by the name of the table it is tied to
    assert weights
    assert [
        key for key, value in model.named_parameters() if key in weights and before[key].equal(value)
    ] == []


def test_deepcopy_and_pickle_keep_ranges_and_output(name):
    model = calibrated(name)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        assert twin is not model


# --- transformers' own saving and loading ----------------------------------------------------------


def test_from_pretrained_inside_a_block_fills_quantized_layers(name, tmp_path):
    """It builds on the meta device and fills what the checkpoint has: nothing else may be left to fill."""
    cls, _ = MODELS[name]
    model = build(name)
    model.save_pretrained(tmp_path)
    with qp.quantize_modules():
        ours, info = cls.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = dict(model.named_buffers())
    buffers = {key: buffer for key, buffer in ours.named_buffers() if not key.endswith("_amax")}
    assert buffers.keys() == theirs.keys()
    assert all(torch.equal(buffer, theirs[key]) for key, buffer in buffers.items())
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in model.state_dict().items())
    assert (
        Counter(type(m).__name__ for m in ours.modules() if isinstance(m, qp.QuantizedLayer))
        == QUANTIZED[name]
    )
    for quantizer in quantizers(ours):
        quantizer.disable()
    assert torch.equal(logits(ours.eval()), logits(model))


def test_a_float_checkpoint_of_a_calibrated_model_is_reached_by_revert(name, tmp_path):
    model = calibrated(name)
    qp.revert(model)
    model.save_pretrained(tmp_path)
    theirs = MODELS[name][0].from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(theirs.eval()), logits(build(name)))


# --- GPT-2 -----------------------------------------------------------------------------------------


def test_the_head_stays_tied_to_the_table():
    model = build_quantized("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert copy.deepcopy(model).lm_head.weight is not model.lm_head.weight
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.transformer.wte.weight


def test_generating_with_a_cache_and_without_gives_the_same_tokens():
    model = calibrated("gpt2")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens())
    cached = model.generate(tokens(), attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens(), attention_mask=mask, use_cache=False, **options))


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        model = calibrated("gpt2").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    pairs = zip(gradients(False), gradients(True), strict=True)
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in pairs)


# --- Conv1D ----------------------------------------------------------------------------------------


def quantized_conv1d(out_features=5, in_features=3):
    with qp.quantize_modules():
        return Conv1D(out_features, in_features)


def test_conv1d_becomes_its_subclass():
    layer = quantized_conv1d()
    assert type(layer) is QuantConv1D
    assert isinstance(layer, Conv1D)
    assert type(Conv1D(5, 3)) is Conv1D


def test_conv1d_has_a_range_for_each_output_channel():
    layer = quantized_conv1d()
    qp.calibrate(layer, [torch.randn(4, 3)], progress=False)
    assert torch.equal(layer.weight_quantizer.amax.flatten(), layer.weight.abs().amax(dim=0))


def test_conv1d_equals_the_linear_layer_with_the_weight_turned_round():
    conv, x = quantized_conv1d(), torch.randn(2, 4, 3)
    with qp.quantize_modules():
        linear = nn.Linear(3, 5)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    torch.testing.assert_close(conv(x), linear(x))


@pytest.mark.parametrize("recipe", ["int8", "int4", "fp8", "mxfp8", "nvfp4", "int4-weight-only"])
def test_conv1d_takes_every_kind_of_recipe(recipe):
    with qp.quantize_modules(recipe=recipe):
        conv, linear = Conv1D(6, 64), nn.Linear(64, 6)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    x = torch.randn(2, 4, 64)
    torch.testing.assert_close(conv(x), linear(x))


def test_conv1d_quantizes_its_input_by_keyword_too():
    layer, x = quantized_conv1d(), torch.randn(4, 3)
    assert torch.equal(layer(x=x), layer(x))
    layer.weight_quantizer.disable()
    assert not torch.equal(layer(x=x), Conv1D.forward(layer, x))


def test_conv1d_shows_its_sizes_and_quantizers():
    assert "QuantConv1D(\n  nf=5, nx=3\n  (input_quantizer)" in repr(quantized_conv1d())


# --- the plugin ------------------------------------------------------------------------------------


def test_the_plugin_is_found_and_named():
    (info,) = (plugin for plugin in registry.plugins() if plugin.name == "transformers")
    assert (info.distribution, info.state, info.hooks) == (
        "quantpatch-transformers",
        "active",
        ("quantpatch_entries", "quantpatch_examples"),
    )


def test_without_the_plugin_conv1d_stays_float():
    with qp.quantize_modules(plugins=[]):
        assert type(Conv1D(5, 3)) is Conv1D


def test_a_block_imports_no_transformers_but_takes_effect_when_it_is_imported_inside():
    code = """
import sys, quantpatch as qp
from quantpatch import registry
assert [p.state for p in registry.plugins() if p.name == "transformers"] == ["active"]
with qp.quantize_modules() as scope:
    assert not [name for name in sys.modules if name.split(".")[0] == "transformers"]
    from transformers.pytorch_utils import Conv1D
    layer = Conv1D(5, 3)
(row,) = scope.replaced
assert (row.target, row.plugin) == ("transformers.pytorch_utils.Conv1D", "transformers")
assert type(Conv1D(5, 3)) is Conv1D
print(type(layer).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "QuantConv1D"
