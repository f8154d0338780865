"""What a quantized layer's class is called: a block goes by its float class's name, a leaf by its own."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import quantpatch as qp
from quantpatch.layers import QuantizedLayer, QuantLinear, QuantMultiheadAttention


class Residual(nn.Module):
    def __init__(self, width=3, *, empty=False):
        super().__init__()
        self.body = None if empty else nn.Linear(width, width)

    def forward(self, x):
        return x + (x if self.body is None else self.body(x))


class Deeper(Residual):
    """Computes as its base does."""


class QuantResidual(QuantizedLayer, Residual):
    operations = {torch.add: ("left", "right")}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, x):
        return x * self.weight


class QuantScale(QuantizedLayer, Scale):
    inputs = ("x",)
    weights = {"weight": None}


CUSTOM = [(__name__, "Residual", QuantResidual), (__name__, "Scale", QuantScale)]
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def model():
    return nn.Sequential(Residual(), Deeper(), Scale())


def build():
    with qp.quantize_modules(custom=CUSTOM, subclasses=True):
        return model()


def convert():
    float_model = model()
    qp.convert(float_model, custom=CUSTOM, subclasses=True)
    return float_model


def names(found):
    return [m.__class__.__name__ for m in found.modules() if isinstance(m, QuantizedLayer)]


EXPECTED = ["Residual", "QuantLinear", "Deeper", "QuantLinear", "QuantScale"]


@pytest.mark.parametrize("make", [build, convert])
def test_blocks_have_the_name_of_their_float_class_and_leaves_their_own(make):
    quantized = make()
    assert names(quantized) == EXPECTED
    assert isinstance(quantized[0], QuantResidual)
    assert isinstance(quantized[1], QuantResidual)
    assert [layer._get_name() for layer in quantized] == ["QuantResidual", "QuantDeeper", "QuantScale"]
    assert "QuantResidual(" in repr(quantized)
    for twin in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert list(map(type, twin)) == list(map(type, quantized))
        assert torch.equal(twin(X), quantized(X))
    qp.revert(quantized)
    assert [type(layer) for layer in quantized] == [Residual, Deeper, Scale]


def test_reports_say_which_replacement_it_is():
    quantized = build()
    qp.calibrate(quantized, [X])
    shown = str(qp.summary(quantized))
    assert "QuantResidual" in shown
    assert "QuantDeeper" in shown
    assert "QuantResidual" in str(qp.compare(quantized, model(), [X]))


def test_a_checkpoint_names_the_replacement_and_brings_the_blocks_back(tmp_path):
    pytest.importorskip("safetensors")
    quantized = build()
    qp.calibrate(quantized, [X])
    qp.save(quantized, tmp_path / "model.safetensors")
    fresh = build()
    qp.load(fresh, tmp_path / "model.safetensors")
    assert names(fresh) == EXPECTED
    assert torch.equal(fresh(X), quantized(X))


def test_a_pickle_of_a_block_brings_the_name_into_another_process(package, tmp_path):
    source = """
import quantpatch, torch
class Stage(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(3, 3)
    def forward(self, x):
        return self.body(x) + x
class QuantStage(quantpatch.QuantizedLayer, Stage):
    operations = {torch.add: ("left", "right")}
"""
    name = package(layers=source)
    module = __import__(f"{name}.layers").layers
    with qp.quantize_modules(custom=[(module, "Stage", module.QuantStage)]):
        stage = module.Stage()
    (tmp_path / "stage.pkl").write_bytes(pickle.dumps(stage))
    code = f"""
import pickle, sys
sys.path.insert(0, {str(tmp_path)!r})
stage = pickle.load(open({str(tmp_path / "stage.pkl")!r}, "rb"))
print(type(stage).__name__, type(stage).__qualname__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["Stage", "QuantStage"]


def test_layers_of_torch_with_modules_inside_go_by_torchs_names():
    with qp.quantize_modules():
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1, enable_nested_tensor=False)
    inside = {m.__class__.__name__ for m in encoder.modules() if not qp.layers.base.is_quantizer(m)}
    assert inside >= {"TransformerEncoder", "TransformerEncoderLayer", "MultiheadAttention", "QuantLinear"}
    assert QuantMultiheadAttention.__qualname__ == "QuantMultiheadAttention"
    assert "QuantMultiheadAttention(" in repr(encoder)


def test_what_a_user_hangs_into_a_leaf_does_not_rename_it():
    with qp.quantize_modules():
        layer = nn.Linear(3, 3)
    layer.add_module("tap", nn.Identity())
    tapped = nn.Linear(3, 3)
    tapped.add_module("tap", nn.Identity())
    weighted = parametrizations.weight_norm(nn.Linear(3, 3))
    qp.convert(nn.ModuleList([tapped, weighted]))
    copy.deepcopy(layer)
    assert QuantLinear.__name__ == type(tapped).__name__ == "QuantLinear"
    assert type(weighted).__name__ == "ParametrizedQuantLinear"
