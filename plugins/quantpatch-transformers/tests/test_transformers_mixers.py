"""State-space mixers, which read the weights of their layers, and the products that make that possible."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from architectures import IDS, MODELS
from torch import nn
from torch.nn import functional as F

import quantpatch as qp
from quantpatch_transformers.products import QuantizedProducts

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}


def falcon_mamba():
    return transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(state_size=8, **SMALL))


def jamba():
    config = transformers.JambaConfig(
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=4,
        mamba_d_state=8,
        use_mamba_kernels=False,
        **SMALL,
    )
    return transformers.JambaForCausalLM(config)


def mamba2():
    config = transformers.Mamba2Config(state_size=8, num_heads=8, head_dim=8, n_groups=1, **SMALL)
    return transformers.Mamba2ForCausalLM(config)


BUILD = {"mamba": MODELS["mamba"].build, "falcon_mamba": falcon_mamba, "jamba": jamba, "mamba2": mamba2}
# What is left float in each, beside jamba's attention and router.
LEFT = {
    "mamba": set(),
    "falcon_mamba": set(),
    "jamba": {"JambaAttention", "JambaTopKRouter"},
    "mamba2": {"QuantMamba2Mixer"},  # its scan in chunks
}


def float_model(name):
    torch.manual_seed(0)
    return BUILD[name]().eval()


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


@pytest.mark.parametrize("name", BUILD)
def test_every_quantizer_is_reached_and_disabled_it_is_exact(name):
    reference = float_model(name)
    with qp.quantize_modules():
        model = float_model(name)
    qp.calibrate(model, [{"input_ids": IDS}], progress=False)  # strict: a layer that saw no data is an error
    report = qp.audit(model, kwargs={"input_ids": IDS})
    assert {row.layer for row in report.rows if not row.quantized} == LEFT[name]
    theirs, ours = logits(reference), logits(model)
    assert 0 < (theirs - ours).norm() < 0.05 * theirs.norm()
    for module in model.modules():
        if isinstance(module, qp.TensorQuantizer):
            module.disable()
    assert torch.equal(logits(model), theirs)


@pytest.mark.parametrize("name", BUILD)
def test_in_training_as_well_and_gradients_reach_every_parameter(name):
    model = float_model(name).train()
    qp.convert(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_step_with_a_cache_is_quantized_like_the_whole_sequence():
    model = float_model("mamba")
    qp.convert(model)
    qp.calibrate(model, [{"input_ids": IDS}], progress=False)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    cached = model.generate(IDS, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(IDS, attention_mask=mask, use_cache=False, **options))


def test_its_layers_hold_the_quantizers_of_the_weights_it_reads():
    model = float_model("mamba")
    qp.convert(model)
    qp.calibrate(model, [{"input_ids": IDS}], progress=False)
    mixer = model.backbone.layers[0].mixer
    assert torch.equal(mixer.dt_proj.weight_quantizer.amax.flatten(), mixer.dt_proj.weight.abs().amax(1))
    assert set(mixer.quantizers()) == {"ssm_state_quantizer", "C_quantizer"}
    before = logits(model)
    mixer.conv1d.weight_quantizer.amax = mixer.conv1d.weight_quantizer.amax / 4
    assert not torch.equal(logits(model), before)


def test_a_mixer_copies_and_pickles():
    model = float_model("mamba")
    qp.convert(model)
    qp.calibrate(model, [{"input_ids": IDS}], progress=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))


# --- products ----------------------------------------------------------------------------------------


def halved(x):
    return x / 2


def test_what_a_weight_is_multiplied_with_is_quantized_on_either_side():
    weight, x = nn.Parameter(torch.randn(4, 3, 3)), torch.randn(3, 3)
    products = QuantizedProducts()
    products.partner(weight, halved)
    expected = [
        F.linear(x, weight[1]),
        x @ weight[2].T,
        weight[0].t() @ x,
        torch.matmul(x, weight[3]),
        torch.bmm(x.expand(4, 3, 3), weight.transpose(1, 2)),
    ]
    with products:
        computed = [
            F.linear(x, weight[1]),
            x @ weight[2].T,
            weight[0].t() @ x,
            torch.matmul(x, weight[3]),
            torch.bmm(x.expand(4, 3, 3), weight.transpose(1, 2)),
        ]
    for halved_product, product in zip(computed, expected, strict=True):
        torch.testing.assert_close(halved_product * 2, product)


def test_other_weights_and_what_is_not_asked_for_stay_as_they_are():
    weight, other, x = (torch.randn(3, 3) for _ in range(3))
    products = QuantizedProducts()
    products.partner(weight, None)
    with products:
        assert torch.equal(F.linear(x, weight), x @ weight.T)
        assert torch.equal(F.linear(x, other), x @ other.T)
    both = QuantizedProducts((halved, None))
    with both:
        halves, whole = x @ other, F.linear(x, other)
    assert torch.equal(halves, halved(x) @ other)
    assert torch.equal(whole, x @ other.T)
