"""State-space mixers, which read the weights of their layers and multiply in scans: operations reach it."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import IDS, MODELS

import quantpatch as qp

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


def float_model(name):
    torch.manual_seed(0)
    return BUILD[name]().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", BUILD)
def test_with_operations_all_of_it_is_quantized_and_gradients_reach_every_parameter(name):
    reference = float_model(name)
    with qp.quantize_modules(operations="products"):
        model = float_model(name)
    with pytest.warns(qp.QuantPatchWarning, match="branches of forwards that these batches do not reach"):
        # The first state of a scan in chunks, as in Mamba 2, is all zeros; all else would be an error.
        qp.calibrate(model, [{"input_ids": IDS}], progress=False, strict=name != "mamba2")
    assert qp.audit(model, kwargs={"input_ids": IDS}).share == 1.0
    theirs, ours = logits(reference), logits(model)
    assert 0 < (theirs - ours).norm() < 0.05 * theirs.norm()
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    model.eval()
    for module in model.modules():
        if isinstance(module, qp.TensorQuantizer):
            module.disable()
    assert torch.equal(logits(model), theirs)


@pytest.mark.filterwarnings("ignore:.*branches of forwards that these batches do not reach")
def test_a_step_with_a_cache_is_quantized_like_the_whole_sequence():
    model = float_model("mamba")
    qp.convert(model, operations="products")
    step = next(v for k, v in model(IDS, use_cache=True).items() if "cache" in k)
    batches = [{"input_ids": IDS}, {"input_ids": IDS[:, :1], "cache": step, "use_cache": True}]
    qp.calibrate(model, batches, progress=False)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    cached = model.generate(IDS, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(IDS, attention_mask=mask, use_cache=False, **options))
