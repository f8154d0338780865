"""``convert``, ``revert`` and ``quantized``: existing models, there and back."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import quantpatch as qp
from quantpatch.errors import ArgumentTypeError, ConversionError, QuantPatchError, UnknownNameError
from quantpatch.layers.conv import QuantConv2d
from quantpatch.layers.linear import QuantLinear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect")
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.rnn = nn.LSTM(24, 8, batch_first=True)
        self.fc = nn.Linear(8, 5)
        self.tied = nn.Linear(8, 5)
        self.tied.weight = self.fc.weight

    def forward(self, x):
        y = self.pool(torch.relu(self.norm(self.conv(x)))).flatten(1)
        y, _ = self.rnn(y[:, None])
        return self.fc(y[:, 0]) + self.tied(y[:, 0])


def net():
    torch.manual_seed(0)
    return Net()


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def shape_of(model):
    """All that ``revert`` has to bring back."""
    return {
        name: (
            type(m),
            m.training,
            list(vars(m)),
            {k: list(v) for k, v in vars(m).items() if isinstance(v, dict)},
        )
        for name, m in model.named_modules()
    }


def disable_all(model):
    for module in model.modules():
        if isinstance(module, qp.TensorQuantizer):
            module.disable()


def test_a_converted_model_equals_one_built_in_a_block():
    with qp.quantize_modules():
        built = net()
    converted = net()
    qp.convert(converted)
    built.load_state_dict(converted.state_dict())
    assert [(n, type(m)) for n, m in converted.named_modules()] == [
        (n, type(m)) for n, m in built.named_modules()
    ]
    assert torch.equal(converted(IMAGES), built(IMAGES))


def test_the_same_objects_stay_where_they_are():
    model = net()
    before = dict(model.named_modules())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    qp.convert(model)
    assert all(model.get_submodule(name) is module for name, module in before.items())
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert model.tied.weight is model.fc.weight


def test_disabled_quantizers_leave_the_float_result_bit_for_bit():
    model = net().eval()
    expected = model(IMAGES)
    qp.convert(model)
    assert not torch.equal(model(IMAGES), expected)
    disable_all(model)
    assert torch.equal(model(IMAGES), expected)


def test_revert_brings_back_classes_attributes_and_weights_exactly():
    model = net()
    before, weights = shape_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    expected = copy.deepcopy(model)(IMAGES)
    qp.convert(model)
    qp.calibrate(model, [IMAGES])
    qp.revert(model)
    assert shape_of(model) == before
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(IMAGES), expected)


def test_a_model_built_in_a_block_reverts_to_the_float_one():
    with qp.quantize_modules():
        model = net()
    qp.revert(model)
    assert shape_of(model) == shape_of(net())
    assert torch.equal(model(IMAGES), net()(IMAGES))


def test_training_modes_devices_dtypes_and_requires_grad_are_kept():
    model = net().double()
    model.conv.eval()
    model.fc.weight.requires_grad_(False)
    qp.convert(model)
    assert not model.conv.training
    assert not model.conv.input_quantizer.training
    assert model.fc.input_quantizer.training
    assert not model.fc.weight.requires_grad
    assert model(IMAGES.double()).dtype == torch.float64


def test_hooks_still_run_and_an_optimizer_still_holds_the_weights():
    model = net()
    calls = []
    model.fc.register_forward_hook(lambda *_: calls.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    qp.convert(model)
    before = model.fc.weight.clone()
    model(IMAGES).sum().backward()
    optimizer.step()
    assert calls == ["hook"]
    assert not torch.equal(model.fc.weight, before)


def test_parametrized_layers_are_converted_and_reverted():
    model = net()
    parametrizations.weight_norm(model.fc)
    before = shape_of(model)
    expected = model(IMAGES)
    qp.convert(model)
    assert isinstance(model.fc, QuantLinear)
    assert parametrize.is_parametrized(model.fc)
    assert not torch.equal(model(IMAGES), expected)
    disable_all(model)
    torch.testing.assert_close(model(IMAGES), expected, rtol=0, atol=0)
    qp.revert(model)
    assert shape_of(model) == before


def test_a_layer_parametrized_after_conversion_reverts():
    model = net()
    qp.convert(model)
    parametrizations.weight_norm(model.fc)
    qp.revert(model)
    assert isinstance(model.fc, nn.Linear)
    assert not isinstance(model.fc, qp.QuantizedLayer)
    assert parametrize.is_parametrized(model.fc)
    model(IMAGES)
    parametrize.remove_parametrizations(model.fc, "weight")
    assert type(model.fc) is nn.Linear


def test_a_layer_parametrized_while_quantized_has_nothing_of_its_calls_after_reverting():
    model = net()
    qp.convert(model)
    parametrizations.weight_norm(model.fc)
    model(IMAGES)
    qp.revert(model)
    of_torch = type(parametrizations.weight_norm(nn.Linear(2, 2)))
    own = vars(type(model.fc))
    assert type(own["weight"]) is property
    assert own.keys() - {"_changed_from"} <= vars(of_torch).keys()


def test_a_second_parametrization_after_conversion_stays_when_reverting():
    model = net()
    parametrizations.weight_norm(model.fc)
    qp.convert(model)
    parametrize.register_parametrization(model.fc, "bias", nn.ReLU())
    qp.revert(model)
    assert model.fc.bias.min() >= 0
    assert "bias" not in vars(model.fc)


def test_converting_a_copy_leaves_the_parametrized_original_alone():
    model = net()
    parametrizations.weight_norm(model.fc)
    twin = copy.deepcopy(model)
    qp.convert(twin)
    assert not isinstance(model.fc, qp.QuantizedLayer)


def test_a_converted_model_pickles_and_copies():
    model = net()
    qp.convert(model)
    qp.calibrate(model, [IMAGES])
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IMAGES), model(IMAGES))
        assert twin.tied.weight is twin.fc.weight


def test_skip_custom_and_include_are_those_of_a_block():
    class QuantNorm(qp.QuantizedLayer, nn.BatchNorm2d):
        weights = {}

    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.Linear(2, 2), nn.MaxPool2d(1))
    report = qp.convert(
        model, skip=["Conv2d"], custom=[(nn, "BatchNorm2d", QuantNorm)], include=["MaxPool2d"]
    )
    assert [type(m).__name__ for m in model] == ["QuantNorm", "Conv2d", "QuantLinear", "QuantMaxPool2d"]
    assert {(s.target, s.reason) for s in report.skipped} == {("torch.nn.Conv2d", "skip='Conv2d'")}
    assert {(r.target, r.plugin, r.count) for r in report.replaced} == {
        ("torch.nn.BatchNorm2d", None, 1),
        ("torch.nn.Linear", "quantpatch.builtin", 1),
        ("torch.nn.MaxPool2d", "quantpatch.builtin", 1),
    }


def test_subclasses_are_left_float_and_reported():
    class MyLinear(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), MyLinear(2, 2))
    report = qp.convert(model)
    assert type(model[1]) is MyLinear
    assert [(s.reason, s.count) for s in report.skipped] == [
        ("a subclass of torch.nn.Linear, for which there is no entry; write subclasses=True", 1)
    ]


def test_one_item_may_stand_for_a_list_of_one():
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1), nn.Embedding(2, 2))
    qp.convert(model, skip="Linear", include="Embedding")
    assert [type(m).__name__ for m in model] == ["Linear", "QuantConv2d", "QuantEmbedding"]


def test_a_model_on_the_meta_device_stays_there_and_takes_its_weights_later():
    with torch.device("meta"):
        model = Net()
    qp.convert(model)
    assert all(tensor.is_meta for tensor in qp.float_state_dict(model).values())
    reference = net()
    model.load_state_dict(reference.state_dict(), strict=True, assign=True)
    qp.convert(reference)
    assert torch.equal(model.eval()(IMAGES), reference.eval()(IMAGES))


def test_a_bare_layer_converts_and_reverts():
    layer = nn.Conv2d(3, 4, 1)
    qp.convert(layer)
    assert type(layer) is QuantConv2d
    qp.revert(layer)
    assert type(layer) is nn.Conv2d


def test_the_block_reverts_also_after_an_exception():
    model = net()
    before = shape_of(model)
    with pytest.raises(ZeroDivisionError), qp.quantized(model, recipe="int4") as report:
        assert report.replaced
        assert isinstance(model.fc, qp.QuantizedLayer)
        raise ZeroDivisionError
    assert shape_of(model) == before


def test_a_quantized_block_in_which_the_model_is_reverted_ends_quietly_and_masks_no_exception():
    model = nn.Sequential(nn.Linear(2, 2))
    with qp.quantized(model):
        qp.revert(model)
    with pytest.raises(ZeroDivisionError), qp.quantized(model):
        qp.revert(model)
        1 / 0  # noqa: B018
    assert type(model[0]) is nn.Linear


# --- bad input -----------------------------------------------------------------------------------


def test_converting_twice_is_an_error_and_changes_nothing():
    model = net()
    qp.convert(model)
    before = shape_of(model)
    with pytest.raises(ConversionError, match=r"quantized already.*'conv'.*revert") as caught:
        qp.convert(model)
    assert "fc" in caught.value.layers
    assert shape_of(model) == before


def test_a_model_without_targets_is_an_error_that_lists_its_modules():
    with pytest.raises(ConversionError, match=r"nothing to quantize.*LayerNorm.*custom="):
        qp.convert(nn.Sequential(nn.LayerNorm(3)))


def test_reverting_a_float_model_is_an_error():
    with pytest.raises(ConversionError, match="no quantized layer"):
        qp.revert(net())


def test_a_scripted_module_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)))
    with pytest.raises(ConversionError, match="'1'.*scripted"):
        qp.convert(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("function", [qp.convert, qp.revert])
@pytest.mark.parametrize("inner", [False, True])
def test_data_parallel_is_refused(function, inner):
    model = nn.DataParallel(net())
    with pytest.raises(ConversionError, match=rf"{function.__name__.capitalize()} model\.module and wrap it"):
        function(nn.Sequential(model) if inner else model)
    assert type(model.module.fc) is nn.Linear


@pytest.mark.parametrize("function", [qp.convert, qp.revert, lambda model: qp.quantized(model).__enter__()])
@pytest.mark.parametrize(("given", "message"), [(Net, r"its class: write \w+\(Net\("), (None, "not None")])
def test_what_is_not_a_model_is_refused(function, given, message):
    with pytest.raises(ArgumentTypeError, match=message):
        function(given)


def test_a_scripted_module_is_not_reverted():
    with pytest.raises(ConversionError, match=r"cannot revert the model: it is a scripted module"):
        qp.revert(torch.jit.script(nn.Linear(2, 2)))


def test_a_quantized_part_is_enough_to_refuse_a_model():
    model = net()
    qp.convert(model.fc)
    before = shape_of(model)
    with pytest.raises(ConversionError, match=r"quantized already \(1 layers, such as 'fc'\)"):
        qp.convert(model)
    assert shape_of(model) == before


def test_settings_of_another_type_are_refused_and_change_nothing():
    model = net()
    before = shape_of(model)
    with pytest.raises(QuantPatchError, match="skip takes a list"):
        qp.convert(model, skip=3)
    with pytest.raises(QuantPatchError, match="is not an entry"):
        qp.convert(model, custom=[3])
    with pytest.raises(QuantPatchError, match="int9"):
        qp.convert(model, recipe="int9")
    assert shape_of(model) == before


def test_an_unknown_skip_is_an_error_and_changes_nothing():
    model = net()
    with pytest.raises(UnknownNameError, match="Linear"):
        qp.convert(model, skip=["Linaer"])
    assert type(model.fc) is nn.Linear


def test_a_replacement_that_only_builds_new_layers_is_an_error_and_changes_nothing():
    class Other(nn.BatchNorm2d):
        pass

    model = net()
    with pytest.raises(ConversionError, match=r"custom.*QuantBatchNorm2d\(quantpatch.QuantizedLayer"):
        qp.convert(model, custom=[(nn, "BatchNorm2d", Other)])
    assert type(model.fc) is nn.Linear


def test_failure_half_way_leaves_the_model_as_it_was():
    class Broken(qp.QuantizedLayer, nn.BatchNorm2d):
        def add_quantizers(self, recipe):
            self.input_quantizer = qp.TensorQuantizer()
            raise OSError("no")

    model = net()
    before = shape_of(model)
    with pytest.raises(OSError, match="no"):
        qp.convert(model, custom=[(nn, "BatchNorm2d", Broken)])
    assert shape_of(model) == before


def test_revert_reports_the_layers_that_are_float_again_and_the_quantizers_that_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model[1].mine = qp.TensorQuantizer()
    qp.convert(model)
    report = qp.revert(model)
    assert report.changed == dict.fromkeys(["0", "2"], "torch.nn.modules.linear.Linear")
    assert report.skipped == {"1.mine": "int8, dynamic (not calibrated)"}


def test_what_convert_did_prints_and_is_json():
    class Own(nn.Linear):
        def forward(self, x):
            return x

    report = qp.convert(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Own(2, 2)))
    text = " ".join(str(report).split())
    assert "torch.nn.Linear 2 quantpatch.layers.linear.QuantLinear" in text
    assert "Own 1 float: " in text
    assert [row["count"] for row in json.loads(report.to_json())["replaced"]] == [2]
