"""``save_pretrained`` and ``from_pretrained``: what was saved comes back."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from architectures import IDS, MODELS
from checkpoints import assert_same, calibrated, loaded, output, quantizers, saved, states
from torch import nn

import quantpatch as qp
from quantpatch.errors import CheckpointError
from quantpatch_transformers import QuantPatchConfig, make_savable

# Mamba's mixers have branches for cached steps.
pytestmark = pytest.mark.filterwarnings("ignore:.*branches of forwards that these batches do not reach")


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_comes_back_without_a_block(name, tmp_path):
    model = saved(calibrated(name, operations="products"), tmp_path)
    again = loaded(type(model), tmp_path)
    branches = {"dynamic (not calibrated)"} if name == "mamba" else set()
    assert set(states(again).values()) == {"calibrated"} | branches
    assert_same(again, model, name)


@pytest.mark.parametrize("name", ["gpt2", "bert", "mixtral"])
def test_saved_as_it_is_its_ranges_come_back_inside_a_block(name, tmp_path):
    model = calibrated(name)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with qp.quantize_modules():
        again = loaded(type(model), tmp_path)
    assert_same(again, model, name)
    # From now on it is saved with its description.
    again.save_pretrained(tmp_path / "again")
    assert_same(loaded(type(model), tmp_path / "again"), model, name)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_zero_points_come_back(name, tmp_path):
    model = calibrated(name)
    assert any(qp.fit_zero_points(model, [MODELS[name].inputs], least_gain=1.01).fitted.values())
    again = loaded(type(model), saved(model, tmp_path) and tmp_path)
    assert_same(again, model, name)
    formats = [{n: q.format.name for n, q in quantizers(m).items()} for m in (model, again)]
    assert formats[0] == formats[1]


def test_zero_points_without_a_description_are_not_taken_for_symmetric_ranges(tmp_path):
    model = calibrated()
    qp.fit_zero_points(model, [MODELS["gpt2"].inputs], least_gain=1.01)
    model.save_pretrained(tmp_path)
    with (
        qp.quantize_modules(),
        pytest.raises(CheckpointError, match=r"zero points .*Write make_savable\(model\) before"),
    ):
        type(model).from_pretrained(tmp_path)


def test_inside_a_block_of_another_recipe_what_was_saved_comes_back(tmp_path):
    model = saved(calibrated(), tmp_path)
    with qp.quantize_modules(recipe="int4", include=["Embedding"]):
        again = loaded(type(model), tmp_path)
    assert_same(again, model)


def test_an_auto_class_finds_it(tmp_path):
    model = saved(calibrated(), tmp_path)
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("in_block", [True, False])
def test_ranges_are_not_cast_to_the_dtype_of_the_weights(in_block, tmp_path):
    model = calibrated()
    ranges = {name: quantizer.amax.clone() for name, quantizer in quantizers(model).items()}
    if in_block:
        model.save_pretrained(tmp_path)
        with qp.quantize_modules() as scope:
            again = loaded(type(model), tmp_path, dtype=torch.bfloat16)
        # How the ranges are found is the plugin's own affair: users look here for layers.
        assert all(row.replacement.rpartition(".")[2].startswith("Quant") for row in scope.replaced)
    else:
        again = loaded(type(model), saved(model, tmp_path) and tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for name, quantizer in quantizers(again).items():
        assert torch.equal(quantizer.amax, ranges[name])
    assert torch.equal(output(again), output(model.bfloat16()))


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_with_a_device_map(device_map, tmp_path):
    model = saved(calibrated("llama"), tmp_path)
    assert_same(loaded(type(model), tmp_path, device_map=device_map), model, "llama")


def test_the_config_that_a_float_model_was_built_from_as_well_says_nothing_of_quantization(tmp_path):
    reference = MODELS["gpt2"].build().eval()
    twin = type(reference)(reference.config).eval()
    qp.convert(twin)
    saved(twin, tmp_path / "quantized")
    assert all(getattr(module, "config", twin.config) is twin.config for module in twin.modules())
    reference.save_pretrained(tmp_path / "float")
    again = loaded(type(reference), tmp_path / "float")
    assert quantizers(again) == {}
    assert torch.equal(output(again), output(reference))


@pytest.mark.parametrize("first", ["built", "loaded"])
def test_the_config_of_a_quantized_model_can_be_given_to_load_it_again(first, tmp_path):
    model = saved(calibrated(), tmp_path)
    config = (model if first == "built" else loaded(type(model), tmp_path)).config
    assert_same(loaded(type(model), tmp_path, config=config), model)
    MODELS["gpt2"].build().save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match=r"those of a float model. Delete quantization_config from"):
        type(model).from_pretrained(tmp_path / "float", config=config)


def test_in_several_files(tmp_path):
    model = calibrated("mixtral")
    make_savable(model)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(loaded(type(model), tmp_path), model, "mixtral")


def test_learned_ranges_come_back_as_parameters_that_go_on_learning(tmp_path):
    learned = qp.QuantDescriptor(learn_amax=True)
    recipe = qp.Recipe(
        name="learned", input=learned, weight=qp.QuantDescriptor(axis="channel", learn_amax=True)
    )
    model = calibrated(recipe=recipe).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    saved(model.eval(), tmp_path)
    again = loaded(type(model), tmp_path)
    assert set(states(again).values()) == {"learned"}
    assert_same(again, model)
    again.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(quantizer.amax.grad is not None for quantizer in quantizers(again).values())


@pytest.mark.parametrize("described", [True, False], ids=["described", "in a block"])
def test_a_layer_of_another_shape_starts_anew_with_its_ranges_as_the_float_one_does(tmp_path, described):
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    kind = transformers.BertForSequenceClassification
    with qp.quantize_modules():
        model = kind(config).eval()
    ids = {"input_ids": torch.randint(0, 99, (2, 5))}
    qp.calibrate(model, [ids], progress=False)
    (saved if described else type(model).save_pretrained)(model, tmp_path)

    def load(**options):
        block = contextlib.nullcontext() if described else qp.quantize_modules()
        with block:
            return kind.from_pretrained(tmp_path, num_labels=5, **options)

    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # transformers' own
        load()
    with pytest.warns(
        qp.QuantPatchWarning,
        match=r"classifier of .* start from scratch.*classifier\.weight_quantizer.*existing=.keep",
    ):
        other = load(ignore_mismatched_sizes=True)
    anew = {name for name, state in states(other).items() if state != "calibrated"}
    assert anew == {"classifier.input_quantizer", "classifier.weight_quantizer"}
    assert other.classifier.weight_quantizer.state_dict()["_amax"].shape == (5, 1)
    assert torch.equal(
        other.bert.pooler.dense.weight_quantizer.amax, model.bert.pooler.dense.weight_quantizer.amax
    )
    qp.calibrate(other, [ids], existing="keep", progress=False)
    assert set(states(other).values()) == {"calibrated"}
    assert other(**ids).logits.isfinite().all()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("how", ["in a block", "configured"])
def test_ranges_of_a_float_checkpoint_have_their_tensors_when_it_is_loaded(tmp_path, how, learned):
    MODELS["gpt2"].build().save_pretrained(tmp_path)
    recipe = qp.Recipe(
        name="r",
        input=qp.QuantDescriptor(learn_amax=learned),
        weight=qp.QuantDescriptor(axis="channel", learn_amax=learned),
        output=qp.QuantDescriptor(amax=6.0),
    )
    if how == "in a block":
        with qp.quantize_modules(recipe=recipe):
            model = loaded(transformers.GPT2LMHeadModel, tmp_path)  # nothing is missing, or told of
    else:
        config = QuantPatchConfig(recipe=recipe)
        model = loaded(transformers.GPT2LMHeadModel, tmp_path, quantization_config=config)
    held = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if key.endswith("_amax")}
    assert held.keys() == {f"{name}._amax" for name in quantizers(model)}
    assert not any(tensor.is_meta for tensor in held.values())
    for name, quantizer in quantizers(model).items():
        if name.endswith("output_quantizer"):
            assert quantizer.amax == 6.0
        else:
            assert quantizer.amax is None
            assert held[f"{name}._amax"].isnan().all()
            assert held[f"{name}._amax"].requires_grad is learned
    model(input_ids=IDS)
    qp.calibrate(model, [MODELS["gpt2"].inputs], progress=False)
    after = model.state_dict(keep_vars=True)
    assert all(after[key] is tensor for key, tensor in held.items())


def test_an_uncalibrated_model_is_saved_and_comes_back_uncalibrated(tmp_path):
    with qp.quantize_modules(recipe=qp.Recipe(name="unsigned", input=qp.QuantDescriptor(unsigned=True))):
        model = MODELS["gpt2"].build()
    model.save_pretrained(tmp_path / "plain")
    with qp.quantize_modules(recipe=qp.Recipe(name="unsigned", input=qp.QuantDescriptor(unsigned=True))):
        plain = loaded(type(model), tmp_path / "plain")
    described = loaded(type(model), saved(model, tmp_path / "described") and tmp_path / "described")
    for again in (plain, described):
        assert set(states(again).values()) == {"dynamic (not calibrated)"}
        assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_what_was_configured_and_disabled_comes_back(tmp_path):
    model = calibrated()
    qp.configure(model, {"transformer.h.0.*": "int4", "lm_head": None})
    qp.calibrate(model, [MODELS["gpt2"].inputs], progress=False, existing="overwrite")
    again = loaded(type(model), saved(model, tmp_path) and tmp_path)
    assert_same(again, model)
    for name, quantizer in quantizers(again).items():
        assert quantizer.descriptor == quantizers(model)[name].descriptor


def test_uncalibrated_and_without_ranges_it_comes_back_so(tmp_path):
    model = MODELS["gpt2"].build().eval()
    qp.convert(model, recipe="mxfp8")
    assert_same(loaded(type(model), saved(model, tmp_path) and tmp_path), model)


def test_tied_weights_stay_tied(tmp_path):
    model = saved(calibrated(), tmp_path)
    again = loaded(type(model), tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight


def test_what_comes_back_copies_pickles_casts_and_trains(tmp_path):
    model = saved(calibrated(), tmp_path)
    again = loaded(type(model), tmp_path)
    for twin in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert_same(twin, again)
    assert copy.deepcopy(again).half().float() is not None
    again.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in again.parameters())


def test_reverted_it_is_saved_as_the_float_model_it_is(tmp_path):
    model = saved(calibrated(), tmp_path / "quantized")
    again = loaded(type(model), tmp_path / "quantized")
    qp.revert(again)
    again.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float/config.json").read_text())
    theirs = loaded(type(model), tmp_path / "float")
    assert quantizers(theirs) == {}
    qp.revert(model)
    assert torch.equal(output(theirs), output(model))


def test_the_checkpoint_of_a_model_with_a_head_is_read_by_the_one_without_and_the_other_way_round(tmp_path):
    model = saved(calibrated(), tmp_path / "head")
    body = transformers.GPT2Model.from_pretrained(tmp_path / "head")
    assert states(body) == {
        n.removeprefix("transformer."): s for n, s in states(model).items() if "head" not in n
    }
    with torch.no_grad():
        assert torch.equal(body(IDS)[0], model.transformer(IDS)[0])
    body.save_pretrained(tmp_path / "body")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "body")
    assert states(again) == {name: state for name, state in states(model).items() if "head" not in name}
    with torch.no_grad():
        assert torch.equal(again.transformer(IDS)[0], model.transformer(IDS)[0])


def test_another_head_takes_the_body(tmp_path):
    model = saved(calibrated(), tmp_path)
    other = transformers.GPT2ForTokenClassification.from_pretrained(tmp_path)
    assert states(other) == {name: state for name, state in states(model).items() if "lm_head" not in name}


def test_a_process_that_imports_the_package_reads_it_and_one_that_does_not_is_reported(tmp_path):
    model = saved(calibrated(), tmp_path)
    torch.save(output(model), tmp_path / "output.pt")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
path = {str(tmp_path)!r}
ids = torch.randint(0, 99, (2, 12), generator=torch.Generator().manual_seed(0))
expected = torch.load(path + "/output.pt", weights_only=True)
with torch.no_grad():
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(path)(ids)[0], expected)
    import quantpatch_transformers
    assert torch.equal(AutoModelForCausalLM.from_pretrained(path)(ids)[0], expected)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Unknown quantization type, got quantpatch" in done.stderr
    assert done.stderr.count("UNEXPECTED") > 0


@pytest.mark.parametrize("name", MODELS)
def test_float_weights_load_strictly_into_every_architecture_and_come_out(name):
    model = calibrated(name, operations="products")
    before = states(model)
    torch.manual_seed(1)
    reference = MODELS[name].build().eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    assert states(model) == before
    found = qp.float_state_dict(model)
    assert list(found) == list(reference.state_dict())
    assert all(torch.equal(found[key], value) for key, value in reference.state_dict().items())
    torch.manual_seed(2)
    other = MODELS[name].build().eval()
    other.load_state_dict(found, strict=True)
    assert torch.equal(output(other, name), output(reference, name))


# --- embeddings and heads ----------------------------------------------------------------------------


def test_table_and_head_that_are_tied_are_quantized_each_by_its_own_and_alike():
    with qp.quantize_modules(include=["Embedding"], recipe="int4"):
        model = MODELS["gpt2"].build().eval()
    qp.calibrate(model, [MODELS["gpt2"].inputs], progress=False)
    table, head = model.transformer.wte, model.lm_head
    assert table.weight is head.weight
    assert torch.equal(table.weight_quantizer.amax, head.weight_quantizer.amax)
    assert torch.equal(table.weight_quantizer(table.weight), head.weight_quantizer(head.weight))
    assert set(table.quantizers()) == {"weight_quantizer"}  # by weight only: its input is indices
    qp.configure(model, {"lm_head": None})
    assert not table.weight_quantizer.disabled
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.isfinite(table.weight.grad).all()


def test_a_skip_leaves_the_layers_of_a_class_float_and_a_rule_one_of_them():
    with qp.quantize_modules(skip=["Linear"]):
        model = MODELS["gpt2"].build()
    assert type(model.lm_head) is nn.Linear
