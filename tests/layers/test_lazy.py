"""Lazy layers stay quantized when they learn their shapes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import quantpatch as qp
import quantpatch.layers as layers

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")

KINDS = ["Linear"] + [f"Conv{t}{n}d" for t in ("", "Transpose") for n in (1, 2, 3)]


def data(name):
    return torch.randn(2, 4, *(5,) * int(name[-2])) if name != "Linear" else torch.randn(2, 4)


def made(name, cls=None):
    return (cls or getattr(layers, f"QuantLazy{name}"))(6, *([] if name == "Linear" else [3]))


@pytest.mark.parametrize("name", KINDS)
def test_they_become_quantized_layers(name):
    with qp.quantize_modules():
        layer = made(name, getattr(nn, f"Lazy{name}"))
    assert type(layer).__name__ == f"QuantLazy{name}"
    quantizers = layer.quantizers()
    layer(data(name))
    assert type(layer) is getattr(layers, f"Quant{name}")
    assert layer.quantizers() == quantizers
    assert layer.float_class is getattr(nn, name)
    assert layer.weight_quantizer.descriptor.axis == (1 if "Transpose" in name else 0)


@pytest.mark.parametrize("name", KINDS)
def test_before_the_first_input(name):
    x = data(name)
    twin = made(name, getattr(nn, f"Lazy{name}"))
    for layer in (copy.deepcopy(made(name)), pickle.loads(pickle.dumps(made(name)))):
        assert list(qp.float_state_dict(layer)) == list(twin.state_dict())
        assert layer(x).shape[1] == 6
    twin(x)
    layer = made(name)
    layer.load_state_dict(twin.state_dict(), strict=True)  # torch lets a lazy layer take shapes from it
    for quantizer in layer.quantizers().values():
        quantizer.disable()
    assert torch.equal(layer(x), twin(x))
