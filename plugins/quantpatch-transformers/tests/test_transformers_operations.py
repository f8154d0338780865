"""Whole architectures: how much of them runs quantized, without and with the operations inside forwards."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from architectures import IDS, MODELS, SMALL

import quantpatch as qp
from quantpatch_transformers import make_savable


def float_model(name):
    torch.manual_seed(0)
    return MODELS[name].build().eval()


def with_operations(name):
    model = float_model(name)
    qp.convert(model, operations="products")
    return model


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


@pytest.mark.filterwarnings("ignore:.*branches of forwards that these batches do not reach")
@pytest.mark.parametrize("name", MODELS)
def test_with_operations_all_of_it_runs_quantized_exact_when_disabled_copied_and_reverted(name):
    reference = float_model(name)
    with qp.quantize_modules(operations="products"):
        model = MODELS[name].build().eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    assert type(model.config) is type(reference.config)
    qp.calibrate(model, [MODELS[name].inputs], progress=False)
    assert qp.audit(model, kwargs=MODELS[name].inputs).share == 1.0
    quantized, expected = output(model, name), output(reference, name)
    assert (quantized - expected).norm() < 0.1 * expected.norm()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, name), quantized)
    disable_all(twin)
    assert torch.equal(output(twin, name), expected)
    qp.revert(model)
    assert [*map(type, model.modules())] == [*map(type, reference.modules())]
    assert torch.equal(output(model, name), expected)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "llama4"])
def test_it_trains(name):
    model = with_operations(name)
    qp.calibrate(model, [{"input_ids": IDS}])
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def gemma2():
    config = transformers.Gemma2Config(
        vocab_size=99,
        head_dim=8,
        num_key_value_heads=2,
        attn_logit_softcapping=2.0,
        sliding_window=4,
        **SMALL,
    )
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize(
    "build", [MODELS["gpt_oss"].build, gemma2, MODELS["llama"].build], ids=["sinks", "softcap", "groups"]
)
def test_it_generates_with_a_cache_as_without(build):
    torch.manual_seed(0)
    model = build().eval()
    model.set_attn_implementation("eager")
    reference = copy.deepcopy(model)
    qp.convert(model, operations="products")
    qp.calibrate(model, [{"input_ids": IDS}], progress=False)
    assert qp.audit(model, kwargs={"input_ids": IDS}).share == 1.0
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    disable_all(model)
    assert torch.equal(
        model.generate(IDS, use_cache=True, **options), reference.generate(IDS, use_cache=True, **options)
    )


def test_another_implementation_afterwards_is_warned_of_by_name():
    model = with_operations("llama")
    model.set_attn_implementation("eager")
    with pytest.warns(qp.errors.QuantPatchWarning, match="LlamaAttention|self_attn"):
        output(model, "llama")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_each_implementation_of_transformers_has_quantized_operands(implementation):
    torch.manual_seed(0)
    model = MODELS["bert"].build().eval()
    model.set_attn_implementation(implementation)
    expected = output(model, "bert")
    qp.convert(model, operations="products")
    assert qp.audit(model, kwargs=MODELS["bert"].inputs).share == 1.0
    disable_all(model)
    assert torch.equal(output(model, "bert"), expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_saved_it_has_the_float_classes_names_and_comes_back_inside_a_block_and_without(name, tmp_path):
    model = with_operations(name)
    qp.calibrate(model, [MODELS[name].inputs], progress=False)
    make_savable(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [type(float_model(name)).__name__]
    expected = output(model, name)
    cls = type(float_model(name))
    with qp.quantize_modules(operations="products"):
        inside = cls.from_pretrained(tmp_path)
    for again in (inside, cls.from_pretrained(tmp_path)):
        assert {row.state for row in qp.summary(again).rows} == {"calibrated"}
        assert torch.equal(output(again, name), expected)


@pytest.mark.parametrize("operations", ["products", {"*Attention": {"attention": "int8"}}])
def test_a_checkpoint_without_description_gives_its_ranges_inside_a_block_with_operations(
    operations, tmp_path
):
    with qp.quantize_modules(operations=operations):
        model = MODELS["gpt2"].build().eval()
    qp.calibrate(model, [{"input_ids": IDS}], progress=False)
    model.save_pretrained(tmp_path)
    with qp.quantize_modules(operations=operations):
        again, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert {row.state for row in qp.summary(again).rows} == {"calibrated"}
    assert torch.equal(output(again.eval(), "gpt2"), output(model, "gpt2"))


def test_a_float_checkpoint_is_quantized_inside_a_block_with_operations(tmp_path):
    reference = float_model("gpt2")
    reference.save_pretrained(tmp_path)
    with qp.quantize_modules(operations="products"):
        model, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    qp.calibrate(model, [{"input_ids": IDS}], progress=False)
    assert qp.audit(model, kwargs={"input_ids": IDS}).share == 1.0
    disable_all(model)
    assert torch.equal(output(model, "gpt2"), output(reference, "gpt2"))
