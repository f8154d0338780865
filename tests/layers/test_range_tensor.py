"""A range has its tensor from construction on, NaN until it is known, so that what lists tensors lists it."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils import clip_grad_norm_, parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import quantpatch as qp
from quantpatch.layers.quantizer import named_quantizers
from quantpatch.numerics.fake_quant import fake_quantize

LEARNED = qp.Recipe(
    name="learned",
    input=qp.QuantDescriptor(learn_amax=True),
    weight=qp.QuantDescriptor(axis="channel", narrow_range=True, learn_amax=True),
)
BY_FEATURE = qp.Recipe(name="by feature", input=qp.QuantDescriptor(axis=-1, learn_amax=True))
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))


def build(recipe="int8", **options):
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe, **options):
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def calibrated(recipe="int8"):
    model = build(recipe)
    qp.calibrate(model, [X])
    return model


def ranges(model):
    return {name: q.amax for name, q in named_quantizers(model).items()}


def held(model):
    return {name: q.held for name, q in named_quantizers(model).items()}


def step(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


# --- Which there are --------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["int8", LEARNED], ids=["fixed", "learned"])
def test_calibration_fills_the_tensors_that_were_there(recipe):
    model = build(recipe)
    before = held(model)
    assert {name: tuple(tensor.shape) for name, tensor in before.items()} == {
        "0.input_quantizer": (1,) if recipe is LEARNED else (),
        "0.weight_quantizer": (8, 1),
        "2.input_quantizer": (1,) if recipe is LEARNED else (),
        "2.weight_quantizer": (4, 1),
    }
    assert all(tensor.isnan().all() for tensor in before.values())
    assert set(ranges(model).values()) == {None}
    qp.calibrate(model, [X])
    assert all(tensor is before[name] for name, tensor in ranges(model).items())
    for quantizer in named_quantizers(model).values():
        quantizer.amax = None
    assert set(ranges(model).values()) == {None}
    qp.calibrate(model, [X], method="percentile", percentile=90.0)
    assert all(tensor is before[name] for name, tensor in ranges(model).items())


def test_every_kind_of_layer_has_them():
    recipe = qp.Recipe(
        name="all",
        input=qp.QuantDescriptor(unsigned=True),
        output=qp.QuantDescriptor(),
        hidden=qp.QuantDescriptor(),
    )
    with qp.quantize_modules(recipe=recipe, include=["Embedding", "EmbeddingBag"]):
        model = nn.ModuleList(
            [
                nn.Conv2d(4, 6, 3, groups=2),
                nn.ConvTranspose1d(4, 6, 3),
                nn.LSTM(4, 5, 2, bidirectional=True),
                nn.GRUCell(4, 5),
                nn.MultiheadAttention(8, 2, kdim=6),
                nn.EmbeddingBag(9, 4),
                nn.AvgPool2d(2),
                nn.Bilinear(3, 4, 5),
            ]
        )
    for name, quantizer in named_quantizers(model).items():
        assert quantizer.held is not None, name
        assert quantizer.state_dict().keys() == (
            {"_amax", "_zero_point"} if quantizer.format.unsigned else {"_amax"}
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in held(model).items()}
    assert shapes["0.weight_quantizer"] == (6, 1, 1, 1)
    assert shapes["1.weight_quantizer"] == (1, 6, 1)
    assert shapes["2.weight_hh_l1_reverse_quantizer"] == (20, 1)
    assert shapes["4.k_proj_weight_quantizer"] == (8, 1)
    assert shapes["4.out_proj_weight_quantizer"] == (8, 1)
    assert shapes["5.weight_quantizer"] == (9, 1)


def test_a_lazy_layer_has_that_of_its_weight_with_its_first_input():
    with qp.quantize_modules(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        layer = nn.LazyLinear(4)
    assert layer.weight_quantizer.held is None
    layer(X)
    assert layer.weight_quantizer.held.shape == (4, 1)


def test_converting_a_parametrized_layer_leaves_its_parametrization_as_it_is():
    layer = parametrizations.spectral_norm(nn.Linear(6, 4)).train()
    before = copy.deepcopy(layer.state_dict())
    qp.convert(layer)
    assert layer.weight_quantizer.held.shape == (4, 1)
    assert all(torch.equal(value, before[key]) for key, value in qp.float_state_dict(layer).items())
    assert all(module.training for module in layer.modules())


def test_dynamic_ranges_and_reverted_layers_have_none():
    dynamic = qp.Recipe(name="dynamic", input=qp.QuantDescriptor(dynamic=True))
    assert not [key for key in build(dynamic).state_dict() if key.endswith("input_quantizer._amax")]
    model = build(LEARNED)
    qp.revert(model)
    assert len([*model.parameters()]) == 4


def test_a_range_of_the_descriptor_is_known_at_once():
    model = build(qp.Recipe(name="given", input=qp.QuantDescriptor(amax=2.0)))
    assert model[0].input_quantizer.amax == 2.0
    model[0].input_quantizer.amax = None  # back to it
    assert model[0].input_quantizer.amax == 2.0


@pytest.mark.parametrize("given", [None, 3.0], ids=["unknown", "known"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed"])
def test_a_parameter_that_is_assigned_sets_the_value_and_no_parameter(learned, given):
    quantizer = qp.TensorQuantizer(qp.QuantDescriptor(learn_amax=learned, amax=given))
    tensor = quantizer.held
    other = nn.Parameter(torch.tensor([2.0]))
    quantizer.amax = other
    assert quantizer.amax == 2.0
    assert quantizer.held is tensor
    assert list(quantizer.state_dict()) == ["_amax"]
    assert isinstance(quantizer.amax, nn.Parameter) == learned
    with torch.no_grad():
        other.fill_(5.0)
    assert quantizer.amax == 2.0  # a copy
    with pytest.raises(qp.errors.RangeError, match="not negative"):
        quantizer.amax = nn.Parameter(torch.tensor([-1.0]))


def test_a_learned_range_for_each_channel_is_assigned_from_another_layers():
    model = calibrated(LEARNED)
    model[0].weight_quantizer.amax = nn.Parameter(torch.full((8, 1), 0.5))
    assert model[0].weight_quantizer.amax.tolist() == [[0.5]] * 8
    with pytest.raises(qp.errors.RangeError, match="cannot become one of shape"):
        model[0].weight_quantizer.amax = model[2].weight_quantizer.amax


# --- What is computed until then --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "recipe", ["int8", "fp8", LEARNED, BY_FEATURE], ids=["int8", "fp8", "learned", "axis"]
)
def test_an_unknown_range_is_that_of_each_tensor_whatever_looks_on(recipe):
    model = build(recipe)
    first = model[0]
    q, w = first.input_quantizer, first.weight_quantizer
    x = fake_quantize(X, None, q.format, axis=q.descriptor.kept_axes)
    weight = fake_quantize(first.weight, None, w.format, axis=w.descriptor.kept_axes)
    expected = nn.functional.linear(x, weight, first.bias).detach()
    state = {name: tensor.detach() for name, tensor in first.state_dict().items()}
    assert torch.equal(first(X).detach(), expected)
    with torch.no_grad():
        assert torch.equal(first(X), expected)
        assert torch.equal(functional_call(first, state, (X,)), expected)
        one_by_one = torch.stack([functional_call(first, state, (row,)) for row in X])
        if recipe is not BY_FEATURE:
            together = vmap(lambda row: functional_call(first, state, (row,)))(X)
            torch.testing.assert_close(together, one_by_one)


def test_a_range_that_is_handed_in_is_taken_though_the_own_one_is_unknown():
    first, known = build()[0], calibrated()[0]
    with torch.no_grad():
        assert torch.equal(functional_call(first, dict(known.state_dict()), (X,)), known(X))
    assert first.input_quantizer.amax is None


@pytest.mark.parametrize("recipe", ["int8", LEARNED], ids=["fixed", "learned"])
def test_compiled_it_takes_a_range_that_becomes_known(recipe):
    torch._dynamo.reset()
    model, known = build(recipe), calibrated(recipe)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
        for mine, theirs in zip(held(model).values(), ranges(known).values(), strict=True):
            mine.copy_(theirs)  # unseen by quantpatch
        torch.testing.assert_close(compiled(X), known(X))
        assert all(amax is not None for amax in ranges(model).values())
        torch.testing.assert_close(compiled(X), known(X))


# --- Who fills them in ------------------------------------------------------------------------------------


def by_copy(mine, theirs):
    with torch.no_grad():
        mine.copy_(theirs)


def by_data(mine, theirs):
    mine.data.copy_(theirs)


def by_new_data(mine, theirs):
    mine.data = theirs.detach().clone()


def by_lerp(mine, theirs):
    mine.data.zero_().lerp_(theirs.detach(), 1.0)


@pytest.mark.parametrize("fill", [by_copy, by_data, by_new_data, by_lerp])
@pytest.mark.parametrize("recipe", ["int8", LEARNED], ids=["fixed", "learned"])
def test_it_is_known_whatever_filled_it_in(recipe, fill):
    model, known = build(recipe), calibrated(recipe)
    model(X)
    for mine, theirs in zip(held(model).values(), ranges(known).values(), strict=True):
        fill(mine, theirs)
    assert torch.equal(model(X), known(X))
    states = {q.state for q in named_quantizers(model).values()}
    assert states == {"learned" if recipe is LEARNED else "calibrated"}


def test_code_that_initialises_every_parameter_makes_no_ranges():
    model = build(LEARNED)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    assert set(ranges(model).values()) == {None}
    qp.calibrate(model, [X])
    assert torch.equal(model[0].weight_quantizer.amax, model[0].weight.detach().abs().amax(1, keepdim=True))


def test_what_fits_is_loaded_by_name_and_shape():
    """As fine-tuning scripts do it that ask the model what it has."""
    old = calibrated().state_dict()
    with qp.quantize_modules():
        other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    mine = other.state_dict()
    other.load_state_dict(
        {k: v for k, v in old.items() if k in mine and v.shape == mine[k].shape}, strict=False
    )
    found = ranges(other)
    assert torch.equal(found["0.weight_quantizer"], old["0.weight_quantizer._amax"])
    assert torch.equal(found["2.input_quantizer"], old["2.input_quantizer._amax"])
    assert found["2.weight_quantizer"] is None


def test_a_range_of_another_weights_shape_is_a_size_mismatch():
    with qp.quantize_modules():
        other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(RuntimeError, match=r"size mismatch for 2\.weight_quantizer\._amax"):
        other.load_state_dict(calibrated().state_dict())
    whole = calibrated().state_dict() | {"0.weight_quantizer._amax": torch.tensor(2.0)}
    model = build()
    model.load_state_dict(whole)  # one for all channels is a range of this weight
    assert model[0].weight_quantizer.amax == 2.0


@pytest.mark.parametrize("assign", [False, True])
def test_a_float_checkpoint_asks_for_no_range_and_one_of_an_uncalibrated_model_makes_them_unknown(assign):
    model = calibrated()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    model.load_state_dict(plain.state_dict(), assign=assign)
    assert None not in ranges(model).values()
    model.load_state_dict(build().state_dict(), assign=assign)
    assert set(ranges(model).values()) == {None}
    assert torch.equal(model(X), build()(X))
    plain.load_state_dict(qp.float_state_dict(model))


@pytest.mark.parametrize("recipe", ["int8", LEARNED], ids=["fixed", "learned"])
def test_copies_and_pickles_know_what_the_original_knew(recipe):
    for model in (build(recipe), calibrated(recipe)):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(X), model(X))
            assert [q.state for q in named_quantizers(twin).values()] == [
                q.state for q in named_quantizers(model).values()
            ]
            twin[0].input_quantizer.amax = 9.0
            assert model[0].input_quantizer.amax != 9.0


def test_of_a_pickle_from_before_there_were_tensors_it_is_made():
    model = build(LEARNED)
    for quantizer in named_quantizers(model).values():
        quantizer._parameters.pop("_amax")
        vars(quantizer).pop("_known")
    model(X)
    assert all(tensor is not None for tensor in held(model).values())
    for quantizer in named_quantizers(model).values():
        quantizer._parameters.pop("_amax")
    assert len([key for key in model.state_dict() if key.endswith("_amax")]) == 4


# --- Who lists them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
        lambda p: torch.optim.Adam(p, 0.01, fused=True, weight_decay=0.1),
    ],
    ids=["SGD", "AdamW", "fused"],
)
def test_learned_ranges_train_when_they_are_known_only_after_a_step(optimizer):
    model, twin = build(LEARNED), build(LEARNED)
    steps = optimizer(model.parameters())
    step(model, steps)
    assert set(ranges(model).values()) == {None}
    total = clip_grad_norm_(model.parameters(), 1.0)
    assert total.isfinite()
    qp.calibrate(model, [X])
    twin.load_state_dict(model.state_dict())
    before = {name: amax.detach().clone() for name, amax in ranges(model).items()}
    step(model, steps)
    for name, amax in ranges(model).items():
        assert amax.isfinite().all(), name
        assert not torch.equal(amax, before[name]), name
    assert len(steps.param_groups[0]["params"]) == len([*model.parameters()]) == 8


def test_an_optimizer_resumes_with_the_ranges_that_it_trained():
    model = calibrated(LEARNED)
    steps = torch.optim.AdamW(model.parameters())
    step(model, steps)
    saved = copy.deepcopy((model.state_dict(), steps.state_dict()))
    other = build(LEARNED)
    again = torch.optim.AdamW(other.parameters())
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for each, own in ((model, steps), (other, again)):
        step(each, own)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("recipe", ["int8", LEARNED], ids=["fixed", "learned"])
def test_an_average_made_before_calibration_averages_the_right_tensors(recipe, use_buffers):
    model = build(recipe)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    qp.calibrate(model, [X])
    average.update_parameters(model)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(2.0)
    average.update_parameters(model)
    learns = recipe is LEARNED
    for key, value in average.module.state_dict().items():
        averaged = learns or use_buffers or not key.endswith("_amax")
        torch.testing.assert_close(value, first[key] * (1.1 if averaged else 2.0), msg=key)
    assert None not in ranges(average.module).values()


@pytest.mark.parametrize(
    ("recipe", "use_buffers", "loses"),
    [("int8", False, False), ("int8", True, True), (LEARNED, False, True)],
    ids=["copied", "buffers", "learned"],
)
def test_an_average_that_was_updated_before_calibration_is_named_if_it_averaged_ranges(
    recipe, use_buffers, loses
):
    gc.collect()
    model, other = build(recipe), build(recipe)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    unused = AveragedModel(other, use_buffers=use_buffers)  # updated only later: no harm
    average.update_parameters(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qp.calibrate(model, [X])
    assert len(caught) == loses
    if loses:
        assert "updated before the ranges of 0.input_quantizer, 0.weight" in str(caught[0].message)
    average.update_parameters(model)
    assert all((amax is None) == loses for amax in ranges(average.module).values())
    if loses:
        state = {key: value for key, value in model.state_dict().items() if "_quantizer." in key}
        average.module.load_state_dict(state, strict=False)
    average.update_parameters(model)
    assert None not in ranges(average.module).values()
    qp.calibrate(model, [X], existing="overwrite")  # known before: nothing to tell
    del unused


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "fixed"])
def test_an_average_made_before_data_showed_the_shape_of_ranges_is_named(learned):
    gc.collect()
    recipe = qp.Recipe(name="by feature", input=qp.QuantDescriptor(axis=-1, learn_amax=learned))
    model, other = build(recipe), build(recipe)
    average = AveragedModel(model)
    with pytest.warns(qp.QuantPatchWarning) as caught:
        qp.calibrate(model, [X])
    assert len(caught) == 1
    assert "before the ranges or zero points of 0.input_quantizer, 2.input_quantizer had" in str(
        caught[0].message
    )
    del average
    average = AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(average.module[2].input_quantizer.amax, model[2].input_quantizer.amax)
    qp.calibrate(model, [X], existing="overwrite")  # they have tensors now
    qp.calibrate(other, [X])  # of which there is no average


def test_freezing_a_model_freezes_its_ranges():
    model = build(LEARNED).requires_grad_(False)
    qp.calibrate(model, [X])
    assert not any(amax.requires_grad for amax in ranges(model).values())
    model.to("meta").to_empty(device="cpu")
    assert not any(tensor.requires_grad for tensor in held(model).values())


# --- Too late ---------------------------------------------------------------------------------------------


def test_an_optimizer_that_misses_ranges_whose_shape_data_shows_is_named():
    model = build(BY_FEATURE)
    late = torch.optim.SGD(model.parameters(), 0.1)
    other = torch.optim.Adam(nn.Linear(2, 2).parameters())  # of something else
    with pytest.warns(qp.QuantPatchWarning) as caught:
        qp.calibrate(model, [X])
    assert len(caught) == 1
    assert "0.input_quantizer, 2.input_quantizer became parameters after SGD was made" in str(
        caught[0].message
    )
    late.add_param_group(
        {"params": [q.amax for q in named_quantizers(model).values() if q.descriptor.learn_amax]}
    )
    qp.calibrate(model, [X], existing="overwrite")  # they are there now
    del other


@pytest.mark.sweep(2)
@pytest.mark.parametrize("way", ["load_state_dict", "inside of another model", "file"])
def test_an_optimizer_that_misses_ranges_whose_shape_a_checkpoint_shows_is_named_once(way, tmp_path):
    gc.collect()
    saved, model = calibrated(BY_FEATURE), build(BY_FEATURE)
    late = torch.optim.SGD(model.parameters(), 0.1)
    other = torch.optim.Adam(nn.Linear(2, 2).parameters())  # of something else
    qp.save(saved, tmp_path / "model.safetensors")
    whole, whole_saved = nn.ModuleDict({"net": model}), nn.ModuleDict({"net": saved})
    load = {
        "file": lambda: qp.load(model, tmp_path / "model.safetensors"),
        "load_state_dict": lambda: model.load_state_dict(saved.state_dict()),
        "inside of another model": lambda: whole.load_state_dict(whole_saved.state_dict()),
    }[way]
    with pytest.warns(qp.QuantPatchWarning) as caught:
        load()
    assert len(caught) == 1
    prefix = "net." if way == "inside of another model" else ""
    names = f"{prefix}0.input_quantizer, {prefix}2.input_quantizer"
    assert f"of {names} became parameters after SGD was made" in str(caught[0].message)
    assert torch.equal(model(X), saved(X))
    model.load_state_dict(saved.state_dict())  # they are there now
    build(BY_FEATURE).load_state_dict(saved.state_dict())  # before any optimizer is made
    del late, other


def test_an_average_that_lacks_ranges_of_a_checkpoint_is_named():
    gc.collect()
    recipe = qp.Recipe(name="by feature", input=qp.QuantDescriptor(axis=-1))
    saved, model = calibrated(recipe), build(recipe)
    average = AveragedModel(model)
    with pytest.warns(qp.QuantPatchWarning) as caught:
        model.load_state_dict(saved.state_dict())
    assert len(caught) == 1
    assert "zero points of 0.input_quantizer, 2.input_quantizer had tensors" in str(caught[0].message)
    del average


def test_a_rule_that_makes_ranges_learned_ones_names_the_optimizer_too():
    gc.collect()
    model = build()
    late = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(qp.QuantPatchWarning, match=r"0\.input_quantizer became parameters after SGD"):
        qp.configure(model, {"0.input_quantizer": qp.QuantDescriptor(learn_amax=True)})
    del late


def test_a_rule_that_changes_learned_ranges_leaves_the_parameters_that_an_optimizer_has():
    model = calibrated(LEARNED)
    late = torch.optim.SGD(model.parameters(), 0.1)
    before = held(model)
    qp.configure(model, {"*": attrs_of(LEARNED, num_bits=4)})
    assert {q.format.name for q in named_quantizers(model).values()} == {"int4", "int4_narrow"}
    assert all(tensor is before[name] for name, tensor in held(model).items())
    assert set(ranges(model).values()) == {None}
    qp.calibrate(model, [X])
    found = {name: amax.detach().clone() for name, amax in ranges(model).items()}
    step(model, late)
    assert not any(torch.equal(amax, found[name]) for name, amax in ranges(model).items())


def attrs_of(recipe, **changes):
    import attrs

    return attrs.evolve(
        recipe, input=attrs.evolve(recipe.input, **changes), weight=attrs.evolve(recipe.weight, **changes)
    )


def test_a_quantizer_that_others_share_keeps_its_range_when_one_of_them_is_changed():
    model = build(LEARNED)
    model[2]._modules["input_quantizer"] = model[0].input_quantizer
    model[0].input_quantizer.amax = 2.0
    qp.configure(model, {"2": attrs_of(LEARNED, num_bits=4)})
    assert model[0].input_quantizer.amax == 2.0
    assert model[2].input_quantizer.amax is None
    assert model[2].input_quantizer.held is not model[0].input_quantizer.held


# --- A weight's fate --------------------------------------------------------------------------------------


def test_a_range_goes_with_the_weight_that_it_was_found_for():
    model = calibrated()
    head = model[2]
    head.weight = nn.Parameter(torch.randn(7, 8))
    head.bias = nn.Parameter(torch.zeros(7))
    with pytest.warns(qp.QuantPatchWarning, match=r"^a weight has the shape \(7, 8\) now"):
        output = model(X)
    assert output.shape == (16, 7)
    assert head.weight_quantizer.held.shape == (7, 1)
    model(X)  # said once
    qp.calibrate(model, [X], existing="keep")
    assert torch.equal(head.weight_quantizer.amax, head.weight.detach().abs().amax(1, keepdim=True))


def test_a_weight_may_be_replaced_before_calibration():
    model = build()
    model[2].weight = nn.Parameter(torch.randn(7, 8))
    model[2].bias = nn.Parameter(torch.zeros(7))
    model(X)
    assert model.state_dict()["2.weight_quantizer._amax"].shape == (7, 1)
    qp.calibrate(model, [X])


# --- Devices ----------------------------------------------------------------------------------------------


def test_on_the_meta_device_nothing_is_in_the_state_that_a_float_checkpoint_has_not():
    recipe = attrs_of(LEARNED, unsigned=True, narrow_range=False)
    for each in ("int8", recipe, qp.Recipe(name="given", input=qp.QuantDescriptor(amax=2.0))):
        with torch.device("meta"):
            model = build(each)
        assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        for way in ("to_empty", "assign", "forward"):
            filled = copy.deepcopy(model)
            torch.manual_seed(0)
            plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).state_dict()
            if way == "to_empty":
                filled.to_empty(device="cpu").load_state_dict(plain)
            else:
                filled.load_state_dict(plain, assign=True)
            if way == "forward":
                filled(X)
            state = filled.state_dict(keep_vars=True)
            assert len([key for key in state if key.endswith("_amax")]) == 4, way
            assert not any(tensor.is_meta for tensor in state.values())
            assert torch.equal(filled(X), build(each)(X))
            assert filled[0].input_quantizer.amax == (2.0 if getattr(each, "name", "") == "given" else None)


def test_a_calibrated_model_that_was_emptied_knows_no_ranges():
    model = calibrated().to("meta").to_empty(device="cpu")
    assert set(ranges(model).values()) == {None}
    assert calibrated().to_empty(device="cpu")[0].input_quantizer.amax == X.abs().max()


def test_a_model_that_was_built_on_the_meta_device_casts_and_moves_there():
    with torch.device("meta"):
        model = build(LEARNED)
    model.half().to("meta").bfloat16()
    assert not [key for key in model.state_dict() if "quantizer" in key]
    model.to_empty(device="cpu")
    assert {tensor.dtype for tensor in held(model).values()} == {torch.float32}
    assert len([*model.parameters()]) == 8
