"""Quantized layers of classes pickled by value, as cloudpickle, joblib and Ray do with ``__main__``."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.layers.base import QuantizedLayer

cloudpickle = pytest.importorskip("cloudpickle")

SOURCE = """
import quantpatch, torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 3))
    def forward(self, x):
        return x @ self.weight

class QuantOwn(quantpatch.QuantizedLayer, Own):
    inputs = ("x",)
    weights = {"weight": 1}

class Mine(nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)

class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
    def forward(self, x):
        return self.body(x) + x

class QuantStage(quantpatch.QuantizedLayer, Stage):
    operations = {torch.add: ("left", "right")}

class Bare(nn.Module):
    pass

class QuantBare(Bare):
    pass

def helper(x):
    return "helper"

def other(x):
    return "other"

def helped(x):
    return helper(x)

def build():
    return nn.Sequential(Own(), Mine(3), Stage())
"""
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def by_value(package):
    """A module whose classes are pickled by value, as those of ``__main__`` are."""
    module = importlib.import_module(f"{package(main=SOURCE)}.main")
    cloudpickle.register_pickle_by_value(module)
    yield module
    cloudpickle.unregister_pickle_by_value(module)


def block(module):
    custom = [(module, name, getattr(module, f"Quant{name}")) for name in ("Own", "Stage", "Bare")]
    return qp.quantize_modules(custom=custom, subclasses=True)


def test_quantized_layers_are_read_where_their_classes_are_not(by_value, tmp_path):
    with block(by_value):
        model = by_value.build()
    assert all(isinstance(layer, QuantizedLayer) for layer in model)
    qp.calibrate(model, [X])
    data = cloudpickle.dumps((model, X, model(X).detach()))
    twin, x, expected = pickle.loads(data)
    assert torch.equal(twin(x), expected)
    (tmp_path / "model.pkl").write_bytes(data)
    code = f"""
import pickle, torch
model, x, expected = pickle.load(open({str(tmp_path / "model.pkl")!r}, "rb"))
assert torch.equal(model(x), expected)
import quantpatch
print([type(layer).__name__ for layer in model], str(model).count("Quant"))
quantpatch.revert(model)
print([type(layer).__name__ for layer in model])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['QuantOwn', 'QuantMine', 'Stage'] 12", "['Own', 'Mine', 'Stage']"]


def test_quantized_operations_of_a_class_without_its_source_are_an_error_not_float(by_value, tmp_path):
    model = by_value.Own()
    qp.convert(model, operations="products")
    qp.calibrate(model, [X])
    data = cloudpickle.dumps(model)  # which leaves out where the code was written
    assert torch.equal(pickle.loads(data)(X), model(X))
    (tmp_path / "model.pkl").write_bytes(data)
    code = f"import pickle; pickle.load(open({str(tmp_path / 'model.pkl')!r}, 'rb'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "had quantized operations" in done.stderr
    assert "needs the source of Own.forward, which cannot be read" in done.stderr


def test_a_replacement_that_does_not_fit_is_still_refused():
    class Own(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(qp.errors.LayerError, match="forward takes"):
        type("QuantOwn", (QuantizedLayer, Own), {})


def test_float_models_are_pickled_inside_a_block_as_outside(by_value, tmp_path):
    plain, helped = by_value.build(), by_value.helped
    custom = [(by_value, "helper", by_value.other), (by_value, "Own", by_value.QuantOwn)]
    with qp.quantize_modules(custom=custom, subclasses=True), block(by_value):
        data = cloudpickle.dumps((plain, by_value.Bare, helped, X))
        assert helped(X) == "other"
    (tmp_path / "model.pkl").write_bytes(data)
    code = f"""
import inspect, pickle, torch
model, bare, helped, x = pickle.load(open({str(tmp_path / "model.pkl")!r}, "rb"))
print([type(layer).__name__ for layer in model], [*inspect.signature(type(model[1])).parameters], helped(x))
print(type(type(model[0])()).__name__, type(bare()).__name__, tuple(model(x).shape))
import quantpatch
with quantpatch.quantize_modules():
    print(helped(x))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['Own', 'Mine', 'Stage'] ['width'] helper",
        "Own Bare (4, 3)",
        "helper",
    ]
