"""The recipes that come with quantpatch: what each makes of a layer, and how well."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import ArgumentError, UnknownNameError
from quantpatch.layers import QuantizedLayer, QuantLinear
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS
from quantpatch.recipes.builtin import BUILTIN_RECIPES, DEFAULT_RECIPE, active_recipe

# name: (input format, weight format, largest relative error of a linear layer's output)
EXPECTED = {
    "int8": ("int8", "int8_narrow", 0.02),
    "int8-weight-only": (None, "int8_narrow", 0.01),
    "int4": ("int4", "int4_narrow", 0.3),
    "int4-weight-only": (None, "int4_g128", 0.15),
    "w4a8": ("int8", "int4_narrow", 0.15),
    "fp8": ("fp8_e4m3", "fp8_e4m3", 0.06),
    "mxfp8": ("mxfp8_e4m3", "mxfp8_e4m3", 0.06),
    "mxfp4": ("mxfp4", "mxfp4", 0.25),
    "nvfp4": ("nvfp4", "nvfp4", 0.2),
}


def test_all_are_listed():
    assert set(BUILTIN_RECIPES) == set(EXPECTED)
    assert all(recipe.name == name for name, recipe in BUILTIN_RECIPES.items())
    import quantpatch.recipes.builtin as module

    assert all(name in module.__doc__ for name in EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_linear_layer(name):
    input_format, weight_format, error = EXPECTED[name]
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=name):
        layer = nn.Linear(256, 64)
    assert type(layer) is QuantLinear
    inputs = layer.quantizer("input")
    assert (None if inputs is None else inputs.format.name) == input_format
    assert layer.weight_quantizer.format.name == weight_format
    twin = nn.Linear(256, 64)
    twin.load_state_dict(qp.float_state_dict(layer))
    x = torch.randn(16, 256)
    theirs = twin(x)
    relative = ((layer(x) - theirs).norm() / theirs.norm()).item()
    assert error / 20 < relative < error
    if weight_format in ("int4_g128", "mxfp4", "nvfp4", "mxfp8_e4m3"):
        format = BUILTIN_FORMATS[weight_format]
        by_hand = fake_quantize(twin.weight, None, format, axis=-1)
        assert torch.equal(layer.weight_quantizer(layer.weight), by_hand)
        assert layer.weight_quantizer.state == "dynamic"


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_every_layer_takes_every_recipe(name):
    everything = [
        "Embedding",
        "EmbeddingBag",
        *(f"{k}MaxPool{n}d" for k in ("", "Adaptive") for n in (1, 2, 3)),
    ]
    with qp.quantize_modules(recipe=name, include=everything):
        layers = [
            (nn.Linear(40, 8), (3, 40)),
            (nn.Bilinear(40, 40, 8), (3, 40), (3, 40)),
            (nn.Conv1d(40, 8, 3), (2, 40, 6)),
            (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 6)),
            (nn.Conv3d(4, 8, 3), (2, 4, 5, 5, 5)),
            (nn.ConvTranspose1d(40, 8, 3), (2, 40, 6)),
            (nn.ConvTranspose2d(8, 8, 3, groups=2), (2, 8, 6, 6)),
            (nn.LSTM(40, 36, 2, bidirectional=True), (5, 2, 40)),
            (nn.GRUCell(40, 36), (2, 40), (2, 36)),
            (nn.MultiheadAttention(40, 2), (5, 2, 40), (6, 2, 40), (6, 2, 40)),
            (nn.AvgPool2d(2), (2, 40, 6, 6)),
            (nn.AdaptiveAvgPool1d(2), (40, 6)),
            (nn.MaxPool3d(2), (2, 3, 4, 4, 4)),
            (nn.InstanceNorm2d(40), (2, 40, 6, 6)),
            (nn.Embedding(10, 40), None),
        ]
    for layer, *shapes in layers:
        assert isinstance(layer, QuantizedLayer)
        data = [
            torch.arange(5) if shape is None else torch.randn(shape, requires_grad=True) for shape in shapes
        ]
        output = layer(*data)
        output = output[0] if isinstance(output, tuple) else output
        assert output.isfinite().all()
        output.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", ["int8", "fp8", "w4a8"])
def test_those_with_static_ranges_calibrate(name):
    with qp.quantize_modules(recipe=name):
        model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    qp.calibrate(model, [torch.randn(8, 16)])
    assert all(q.state == "calibrated" for layer in (model[0], model[2]) for q in layer.quantizers().values())


def test_blocks_of_attention_run_along_what_its_products_sum_over():
    with qp.quantize_modules(recipe="mxfp4"):
        layer = nn.MultiheadAttention(64, 2)
    axes = {name: q.descriptor.axis for name, q in layer.quantizers().items()}
    assert axes.pop("v_quantizer") == -2
    assert axes.pop("in_proj_weight_quantizer") == axes.pop("out_proj_weight_quantizer") == 1
    assert set(axes.values()) == {-1}


def test_the_active_recipe():
    assert active_recipe() is DEFAULT_RECIPE
    with qp.quantize_modules(recipe="int4"):
        assert active_recipe().name == "int4"
        with qp.quantize_modules(recipe="fp8"):
            assert active_recipe().name == "fp8"
        assert active_recipe().name == "int4"
    assert active_recipe() is DEFAULT_RECIPE


def test_a_recipe_is_made_of_another_by_its_name():
    made = qp.recipe("fp8").replace(name="mine", rules={":last": None})
    assert made.input == qp.recipe("fp8").input
    assert (made.name, made.rules) == ("mine", ((":last", None),))
    assert qp.recipe(made) is made
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'int9'. Did you mean 'int8'"):
        qp.recipe("int9")


@pytest.mark.parametrize(
    "value", [qp.recipe("int8"), qp.QuantDescriptor(num_bits=4)], ids=["recipe", "descriptor"]
)
def test_replace_checks_as_the_class_does_and_names_what_comes_near(value):
    with pytest.raises(UnknownNameError, match="unknown field of .*Did you mean"):
        value.replace(nam="x", axes=3, num_bit=3)
    wrong = {"input": 3} if isinstance(value, qp.Recipe) else {"num_bits": 99}
    with pytest.raises(ArgumentError):
        value.replace(**wrong)
