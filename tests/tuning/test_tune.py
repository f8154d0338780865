"""``tune`` changes a model as a whole or not at all, says what it did and did not, and can be reverted."""

from __future__ import annotations

import copy
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import quantpatch as qp
from quantpatch.errors import ArgumentError, ArgumentTypeError, PluginError, TuningError, UnknownNameError
from quantpatch.tuning import GPTQ, Tuned, Tuner, Tuning
from quantpatch.tuning.reasons import AlreadyRounded, NoData, NotQuantized, Parametrized, Tied

W4 = qp.recipe("int4-weight-only").replace(
    name="w4", weight=qp.QuantDescriptor(num_bits=4, axis="channel", narrow_range=True)
)


def batches(count: int = 4, features: int = 16) -> list[Tensor]:
    mix = torch.randn(features, features)
    return [torch.randn(32, features) @ mix for _ in range(count)]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))


def state(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(now[name], tensor, rtol=0, atol=0, equal_nan=True)


@attrs.frozen
class Halved(Tuner):
    """Halves every weight."""

    fail: bool = False

    def tune(self, tuning: Tuning) -> None:
        for name, weight in tuning.weights().items():
            tuning.write(weight.owner, weight.attribute, weight.tensor / 2)
            tuning.tuned[name] = Tuned(1.0, 0.5)
        if self.fail:
            raise KeyboardInterrupt


def test_reverting_gives_the_float_weights_from_before() -> None:
    model = network()
    before = state(model)
    qp.convert(model, W4)
    qp.tune(model, batches(), method=["gptq", "bias_correction"])
    assert not torch.equal(model[0].weight, before["0.weight"])
    report = qp.revert(model)
    assert_same(model, before)
    assert report.changed["0.weight"] == report.changed["2.bias"] == "what it was before it was tuned"


def test_copies_can_be_reverted_too() -> None:
    model = network()
    before = state(model)
    qp.convert(model, W4)
    qp.tune(model, batches(), method="gptq")
    twin = copy.deepcopy(model)
    qp.revert(twin)
    assert_same(twin, before)
    assert type(model[0]).__name__ == "QuantLinear"


def test_reverting_keeps_what_has_been_trained_since() -> None:
    model = network()
    qp.convert(model, W4)
    qp.tune(model, batches(), method="gptq")
    with torch.no_grad():
        model[0].weight.add_(0.5)
    trained = model[0].weight.detach().clone()
    report = qp.revert(model)
    assert torch.equal(model[0].weight, trained)
    assert "0.weight" in report.skipped
    assert "2.weight" in report.changed


def test_what_comes_out_is_an_ordinary_quantized_model(tmp_path: Any) -> None:
    model = network()
    qp.convert(model, W4)
    keys = list(model.state_dict())
    qp.tune(model, batches(), method="gptq")
    assert list(model.state_dict()) == keys
    qp.save(model, tmp_path / "tuned.safetensors")
    loaded = network()
    qp.load(loaded, tmp_path / "tuned.safetensors")
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("wrong", ["a batch that does not fit", "an interrupt", "a method that fails"])
def test_if_anything_fails_the_model_is_as_it_was(wrong: str) -> None:
    model = network().train()
    qp.convert(model, "int8")
    before, hooks = state(model), len(model[0]._forward_hooks)
    data: Any = batches()
    method: Any = ["gptq", "bias_correction"]
    if wrong == "a batch that does not fit":
        data = [*data, torch.randn(3, 5)]
    elif wrong == "an interrupt":
        calls: list[int] = []

        def data(model: nn.Module) -> None:
            calls.append(1)
            if len(calls) > 5:
                raise KeyboardInterrupt
            model(torch.randn(64, 16))

    else:
        method = ["gptq", Halved(fail=True)]
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        qp.tune(model, data, method=method, progress=False)
    assert_same(model, before)
    assert model[0].training
    assert len(model[0]._forward_hooks) == hooks
    assert not model[0].weight_quantizer.disabled
    qp.revert(model)  # nothing to put back
    assert "_before_tuning" not in vars(model[0])


def test_modes_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 4)).train()
    model[0].eval()
    qp.convert(model, W4)
    qp.tune(model, batches(), method="gptq")
    assert [module.training for module in model] == [False, True, True]


def test_the_same_seed_gives_the_same_model_and_leaves_random_numbers_alone() -> None:
    data, model = batches(), network()
    qp.convert(model, W4)
    other = copy.deepcopy(model)
    random = torch.get_rng_state()
    for one in (model, other):
        qp.tune(one, data, method="gptq", seed=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[0].weight, other[0].weight)


def test_data_that_can_be_gone_over_once_is_gone_over_as_often_as_needed() -> None:
    data, model = batches(), network()
    qp.convert(model, W4)
    other = copy.deepcopy(model)
    qp.tune(model, data, method="gptq")
    qp.tune(other, iter(data), method="gptq")
    assert torch.equal(model[2].weight, other[2].weight)


def test_no_batch_is_an_error() -> None:
    model = network()
    qp.convert(model, "int4-weight-only")
    with pytest.raises(TuningError, match="no batch"):
        qp.tune(model, [], method="gptq")


class Unreached(nn.Module):
    """Runs nothing of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_data_that_reaches_no_layer_is_an_error() -> None:
    model = Unreached()
    qp.convert(model, "int4-weight-only")
    with pytest.raises(TuningError, match="reaches none of the 1 weights") as error:
        qp.tune(model, batches(), method="gptq")
    assert error.value.layers == ("fc",)
    assert error.value.method == "gptq"


def test_what_cannot_be_tuned_is_named_with_the_reason() -> None:
    model = nn.ModuleDict(
        {name: nn.Linear(16, 16) for name in ("plain", "off", "one", "two", "normed", "idle")}
    )
    parametrizations.weight_norm(model["normed"])
    model["two"].weight = model["one"].weight

    class Runs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            for name in ("plain", "off", "one", "two", "normed"):
                x = self.layers[name](x)
            return x

    whole = Runs()
    qp.convert(whole, W4)
    qp.configure(whole, {"layers.off": None})
    with pytest.warns(qp.QuantPatchWarning, match=r"saw no data.*layers\.idle"):
        report = qp.tune(whole, batches(), method="gptq")
    assert list(report.tuned) == ["layers.plain.weight"]
    assert report.skipped == {
        "layers.off.weight": NotQuantized(),
        "layers.one.weight": Tied(("layers.two.weight",)),
        "layers.two.weight": Tied(("layers.one.weight",)),
        "layers.normed.weight": Parametrized(),
        "layers.idle.weight": NoData(),
    }
    assert "no product of it with data was seen" in str(report)
    rows = {row["name"]: row for row in report.to_dicts()}
    assert rows["layers.plain.weight"]["outcome"] == "tuned"
    assert rows["layers.off.weight"]["detail"] == "it is not quantized"
    assert "NaN" not in report.to_json()


def test_a_weight_is_rounded_once() -> None:
    model = network()
    qp.convert(model, W4)
    qp.tune(model, batches(), method="gptq")
    weight = model[0].weight.detach().clone()
    report = qp.tune(model, batches(), method="gptq")
    assert report.tuned == {}
    assert report.skipped["0.weight"] == AlreadyRounded("gptq")
    assert torch.equal(model[0].weight, weight)


def test_a_recipe_can_be_a_whole_method(plugin: Any) -> None:
    plugin(recipes={"w4-gptq": W4.replace(name="w4-gptq", tune=["gptq", "bias_correction"])})
    model = network()
    qp.convert(model, "w4-gptq")
    report = qp.tune(model, batches(), recipe="w4-gptq")
    assert [step.method for step in report.steps] == ["gptq", "bias_correction"]
    assert qp.Recipe(name="x", tune="gptq").tune == ("gptq",)
    assert qp.Recipe(name="x", tune=GPTQ(damping=0.1)).tune == (GPTQ(damping=0.1),)
    with pytest.raises(ArgumentError, match="has no methods"):
        qp.tune(model, batches(), recipe="int8")


def test_a_plugin_brings_methods_by_name(plugin: Any) -> None:
    plugin(tuners={"halved": Halved, "elsewhere": "quantpatch.tuning.gptq:GPTQ"})
    model = network()
    weight = model[0].weight.detach().clone()
    qp.convert(model, W4)
    report = qp.tune(model, batches(), method="halved")
    assert torch.equal(model[0].weight, weight / 2)
    assert report.tuned["0.weight"] == Tuned(1.0, 0.5)
    assert "elsewhere" in str(qp.tune(model, batches(), method="elsewhere"))


@pytest.mark.parametrize(
    "wrong", ["quantpatch.tuning.gptq:Missing", "quantpatch.nowhere:A", "quantpatch:Entry"]
)
def test_a_method_that_a_plugin_does_not_have_names_the_plugin(plugin: Any, wrong: str) -> None:
    name = plugin(tuners={"absent": wrong})
    model = network()
    qp.convert(model, W4)
    with pytest.raises(PluginError) as error:
        qp.tune(model, batches(), method="absent")
    assert error.value.plugin == name
    assert error.value.hook == "quantpatch_tuners"


def test_arguments_that_cannot_be_are_errors() -> None:
    model = network()
    data = batches()
    with pytest.raises(ArgumentError, match="holds no quantizer"):
        qp.tune(model, data, method="gptq")
    qp.convert(model, "int8")
    with pytest.raises(UnknownNameError, match="'gptq'"):
        qp.tune(model, data, method="gpqt")
    with pytest.raises(UnknownNameError, match="damping"):
        qp.tune(model, data, method="gptq", dampening=0.1)
    with pytest.raises(ArgumentError, match="either method= .* or recipe="):
        qp.tune(model, data)
    with pytest.raises(ArgumentError, match="beside 2 methods"):
        qp.tune(model, data, method=["gptq", "bias_correction"], damping=0.1)
    with pytest.raises(ArgumentTypeError, match="a Tuner"):
        qp.tune(model, data, method=[3])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="damping=-1"):
        GPTQ(damping=-1)
    model[0].input_quantizer.enable_calib()
    with pytest.raises(TuningError, match="being calibrated"):
        qp.tune(model, data, method="gptq")


@pytest.mark.parametrize("method", ["smoothquant", "awq", "equalize", "rotate", "gptq"])
def test_every_weight_is_tuned_or_named(method: str) -> None:
    """Also where torch would take a fast path for the whole of attention."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    qp.convert(model, "int8")
    report = qp.tune(model, [torch.randn(3, 5, 16)], method=method)
    names = {name for name, p in model.named_parameters() if p.dim() == 2}
    said = {name.replace("out_proj_weight", "out_proj.weight") for name in {**report.tuned, **report.skipped}}
    assert said == names


def test_it_works_in_inference_mode() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    before = state(model)
    with torch.inference_mode():
        qp.convert(model, W4)
        x = torch.randn(3, 5, 16)
        gptq = qp.tune(model, [x], method="gptq")
        assert len(gptq.tuned) == 4
        qp.revert(model)
        qp.convert(model, W4)
        assert qp.tune(model, [x], method="adaround", steps=20).steps
        qp.revert(model)
    assert_same(model, before)


@pytest.mark.parametrize("method", ["gptq", "adaround", "smoothquant", "bias_correction"])
def test_forwards_grow_with_the_layers_and_not_with_their_square(method: str) -> None:
    counts = []
    for layers in (3, 6, 9):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
        qp.convert(model, "w4a8")
        calls: list[None] = []
        for layer in model:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        options = {"steps": 1} if method == "adaround" else {}
        qp.tune(model, batches(2, 8), method=method, **options)
        counts.append(len(calls))
    assert counts[2] - counts[1] == counts[1] - counts[0]


def test_what_blocks_are_given_can_lie_in_a_folder(tmp_path: Any) -> None:
    data = batches()
    tuned = []
    for offload in (None, tmp_path):
        torch.manual_seed(1)
        model = network()
        qp.convert(model, W4)
        qp.tune(model, data, method="gptq", offload=offload)
        tuned.append(state(model))
    assert_same_states(*tuned)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ArgumentError, match="no such folder"):
        qp.tune(model, data, method="gptq", offload=tmp_path / "none")


def assert_same_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_weights_that_a_forward_reads_by_itself_are_named_by_tune_and_by_a_packed_file(tmp_path):
    class Own(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    model = nn.Sequential(Own(8, 8), nn.ReLU(), nn.Linear(8, 4))
    qp.convert(model, operations="products")
    x = torch.randn(64, 8)
    qp.calibrate(model, [x], progress=False)
    report = qp.tune(model, [x], method="gptq", progress=False)
    assert "reads it by itself" in str(report.skipped["0.linear_0_weight_quantizer"])
    assert list(qp.save(model, tmp_path / "m.safetensors", packed=True).skipped) == [
        "0.linear_0_weight_quantizer"
    ]
