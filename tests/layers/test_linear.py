"""``nn.Linear`` and what all layers have in common: hooks, parametrizations, tying, views, subclasses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import quantpatch as qp
from quantpatch.errors import ExportError, LayerError
from quantpatch.layers import Cat, QuantBilinear, QuantConv2d, QuantizedLayer, QuantLinear
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.recipes.descriptor import QuantDescriptor, Recipe


def made(cls=QuantLinear, *args):
    torch.manual_seed(0)
    return cls(*(args or (6, 4)))


def test_bilinear_quantizes_both_inputs():
    layer = made(QuantBilinear, 3, 4, 2)
    assert sorted(layer.quantizers()) == ["input1_quantizer", "input2_quantizer", "weight_quantizer"]
    layer.input2_quantizer.amax = 0.5
    a, b = torch.randn(2, 3), torch.full((2, 4), 0.5)
    assert torch.equal(layer(a, 3 * b), layer(input1=a, input2=b))


@pytest.mark.parametrize("keyword", [False, True])
def test_inputs_by_position_and_by_keyword(keyword):
    layer = made()
    layer.input_quantizer.amax = 1.0
    x = torch.full((2, 6), 5.0)
    output = layer(input=x) if keyword else layer(x)
    assert torch.equal(output, layer(torch.ones(2, 6)))


def test_output_quantizer():
    layer = made()
    layer.add_quantizers(
        Recipe(name="out", input=None, weight=None, output=QuantDescriptor(num_bits=2, amax=0.5))
    )
    assert set(layer(torch.randn(9, 6)).unique().tolist()) <= {-1.0, -0.5, 0.0, 0.5}


@pytest.mark.parametrize("cls", [QuantLinear, QuantConv2d])
@pytest.mark.parametrize("parametrization", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations(cls, parametrization):
    args, x = ((6, 4), torch.randn(2, 6)) if cls is QuantLinear else ((3, 4, 3), torch.randn(2, 3, 5, 5))
    layer = made(cls, *args)
    twin = made(cls.float_class, *args)
    for module in (layer, twin):
        torch.manual_seed(1)
        parametrization(module)
        module.eval()
    with torch.no_grad():
        quantized_weight = layer.weight_quantizer(layer.weight)
        assert not torch.equal(quantized_weight, layer.weight)
        assert torch.equal(layer.weight, twin.weight)
        expected = made(cls.float_class, *args)
        expected.weight.copy_(quantized_weight)
        torch.testing.assert_close(layer(x), expected(layer.input_quantizer(x)))
        for quantizer in layer.quantizers().values():
            quantizer.disable()
        assert torch.equal(layer(x), twin(x))
    layer.train()(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert copy.deepcopy(layer)(x).shape == layer(x).shape


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_old_weight_norm():
    layer = made()
    nn.utils.weight_norm(layer)
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.weight_g.grad is not None
    layer.eval()
    x = torch.randn(2, 6)
    with torch.no_grad():
        before = layer(x)
        layer.weight_g.mul_(2)
        assert not torch.equal(layer(x), before)


def test_tied_weights():
    first, second = made(), made()
    second.weight = first.weight
    second.weight_quantizer.amax = torch.full((4, 1), 0.01)
    x = torch.randn(2, 6)
    assert not torch.equal(first(x), second(x))  # each has its own range
    (first(x) + second(x)).sum().backward()
    assert first.weight.grad is second.weight.grad
    twin = copy.deepcopy(nn.ModuleList([first, second]))
    assert twin[0].weight is twin[1].weight


def test_backward_hooks():
    layer = made()
    seen = []
    layer.register_full_backward_hook(lambda *args: seen.append(args))
    layer(torch.randn(2, 6, requires_grad=True)).sum().backward()
    assert len(seen) == 1


class Odd(nn.Linear):
    """Uses everything that a forward may use of its object."""

    scale = 2.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0

    @staticmethod
    def double(x):
        return 2 * x

    @classmethod
    def named(cls):
        return cls.__name__

    @property
    def transposed(self):
        return self.weight.t()

    def product(self, x):
        return x @ self.transposed

    def forward(self, input):
        self.calls += 1
        assert isinstance(self, Odd)
        assert self.named().endswith("Odd")
        assert [name for name, _ in self.named_parameters()] == ["weight", "bias"]
        return self.double(self.product(input)) + super().forward(input) * self.scale


class QuantOdd(QuantizedLayer, Odd):
    pass


def test_methods_properties_and_super_see_the_quantized_weight():
    layer = made(QuantOdd, 6, 4)
    layer.weight_quantizer.amax = torch.full((4, 1), 0.2)
    x = torch.randn(2, 6)
    weight, x_quantized = layer.weight_quantizer(layer.weight), layer.input_quantizer(x)
    expected = 2 * (x_quantized @ weight.t()) + 2 * nn.functional.linear(x_quantized, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert layer.calls == 1  # what forward assigns, it assigns to the layer
    assert "weight" not in vars(layer)
    assert layer.named() == "QuantOdd"


def test_a_layer_of_ones_own_from_the_table():
    import sys

    with qp.quantize_modules(custom=[(sys.modules[__name__], "Odd", QuantOdd)]):
        layer = Odd(6, 4)
    assert type(layer) is QuantOdd
    assert isinstance(layer.input_quantizer, TensorQuantizer)


def test_a_mixin_without_a_float_class_is_not_a_layer():
    class Mixin(QuantizedLayer):
        weights = {}

    assert not hasattr(Mixin, "float_class")
    assert type("Made", (Mixin, nn.Linear), {}).float_class is nn.Linear


def test_autocast():
    layer = made()
    x = torch.randn(2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), atol=0.05, rtol=0.05)


def test_a_misspelled_input_is_an_error_at_the_class():
    class Mine(nn.Module):
        def forward(self, features, mask=None):
            return features

    with pytest.raises(LayerError, match=r"inputs is \('x',\).*\(features, mask\).*inputs = \('features',\)"):
        type("QuantMine", (qp.QuantizedLayer, Mine), {"inputs": ("x",), "weights": {}})


def test_torch_fx_takes_layers_as_they_are():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.cat = Cat(-1)
            self.lstm = nn.LSTM(8, 4, batch_first=True)
            self.head = nn.Linear(4, 2)
            self.out = TensorQuantizer()

        def forward(self, x):
            x = self.conv(x).flatten(2).transpose(1, 2)
            x = self.cat([x, self.attention(x, x, x)[0]])
            return self.out(self.head(input=self.lstm(x)[0]))

    with qp.quantize_modules():
        model = Model().eval()
    x = torch.randn(2, 1, 5, 5)
    graph = torch.fx.symbolic_trace(model)
    leaves = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert leaves == ["conv", "attention", "cat", "lstm", "head", "out"]
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("recipe", ["int8", "int4", "fp8", "mxfp8", "mxfp4", "nvfp4"])
def test_torch_jit_trace(recipe):
    """It traces twice and compares: nothing may depend on values, nor on what was kept from before."""
    with qp.quantize_modules(recipe=recipe):
        model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.LSTM(6, 5)).eval()
    x, other = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    if recipe not in ("mxfp8", "mxfp4", "nvfp4"):
        qp.calibrate(model, [x])
    with torch.no_grad():
        expected = model(other)[0]
    with warnings.catch_warnings():
        torch.jit.TracerWarning.ignore_lib_warnings()  # torch's own
        if "x" in recipe or recipe == "nvfp4":  # the number of blocks is that of the shapes traced
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, x)
    assert torch.equal(traced(other)[0], expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_torch_jit_script_is_refused_with_what_to_write_instead():
    with pytest.raises(ExportError, match=r"torch\.export\.export"):
        torch.jit.script(nn.Sequential(made()))
