"""What an entry's target is when other code has been at its name, and what cannot take a target's place."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import EntryError
from quantpatch.layers.conv import QuantConv2d
from quantpatch.layers.pooling import QuantAvgPool2d

HERE = __name__
Conv2d, AvgPool2d = nn.Conv2d, nn.AvgPool2d


class Doubling(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Unrelated(nn.Module):
    def __init__(self, *arguments):
        super().__init__()


class Counting(type):
    calls = 0

    def __call__(cls, *args, **kwargs):
        Counting.calls += 1
        return super().__call__(*args, **kwargs)


class Own(nn.Module, metaclass=Counting):
    def __new__(cls, *args):
        made = super().__new__(cls)
        made.__dict__["made"] = True
        return made


class QuantOwn(Own):
    """Takes __new__ and the metaclass from its target."""


class WithNew(nn.Linear):
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)


class WithMeta(nn.Linear, metaclass=Counting):
    pass


@pytest.mark.parametrize("stranger", [Doubling, Unrelated])
def test_a_stranger_under_a_name_stays_float_and_torchs_own_class_is_replaced(monkeypatch, stranger):
    monkeypatch.setattr(nn, "Conv2d", stranger)
    with qp.quantize_modules() as scope:
        under_the_name, own = nn.Conv2d(1, 1, 1), Conv2d(1, 1, 1)
    assert (type(under_the_name), type(own)) == (stranger, QuantConv2d)
    assert [row.target for row in scope.skipped] == [f"{HERE}.{stranger.__name__}"]
    assert [(row.target, row.count) for row in scope.replaced] == [("torch.nn.Conv2d", 1)]


def test_convert_skip_and_explain_mean_torchs_own_class_too(monkeypatch):
    monkeypatch.setattr(nn, "Conv2d", Doubling)
    model = nn.Sequential(Doubling(1, 1, 1), Conv2d(1, 1, 1))
    qp.convert(model)
    assert [type(layer) for layer in model] == [Doubling, QuantConv2d]
    with qp.quantize_modules(skip=["Conv2d"]):
        assert type(Conv2d(1, 1, 1)) is Conv2d
    assert qp.explain("torch.nn.Conv2d").state == "replaced"
    assert qp.explain(Doubling).state == "float"


def test_a_block_inside_knows_the_stranger_as_well(monkeypatch):
    monkeypatch.setattr(nn, "AvgPool2d", Unrelated)
    with qp.quantize_modules(), qp.quantize_modules(include=["AvgPool2d"]) as scope:
        assert (type(nn.AvgPool2d(2)), type(AvgPool2d(2))) == (Unrelated, QuantAvgPool2d)
    assert "has taken the name torch.nn.AvgPool2d" in scope.skipped[0].reason


def test_a_class_that_another_package_exports_is_a_target_under_that_name(package):
    name = package(__init__="from torch.nn import Conv2d, Linear as Dense")
    module = __import__(name)
    for exported in ("Conv2d", "Dense"):
        target = getattr(module, exported)
        quantized = type("Quant", (qp.QuantizedLayer, target), {})
        with qp.quantize_modules(custom=[(name, exported, quantized)]):
            assert type(target(1, 1, 1)) is quantized


def test_a_target_that_is_imported_later_is_the_class_of_its_own_package(package):
    layers = "from torch import nn\nclass Thing(nn.Linear): pass\nclass QuantThing(Thing): pass\n"
    layers += "Real = Thing\nclass Thing(Thing): __qualname__ = 'Elsewhere'\n"
    target = f"{package(layers=layers)}.layers"
    with qp.quantize_modules(custom=[(target, "Thing", f"{target}:QuantThing")]):
        __import__(target)
        module = sys.modules[target]
        assert type(module.Real(1, 1)) is module.QuantThing
        assert type(module.Thing(1, 1)) is module.Thing


def test_what_a_replacement_inherits_from_its_target_is_honoured():
    before = Counting.calls
    with qp.quantize_modules(custom=[(sys.modules[HERE], "Own", QuantOwn)]):
        layer = Own()
    assert (type(layer), layer.made, Counting.calls) == (QuantOwn, True, before + 1)


@pytest.mark.parametrize(
    ("replacement", "reason"),
    [
        (WithNew, "the __new__ of WithNew would not run"),
        (WithMeta, "__call__ of its metaclass Counting would"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_whose_it_is(plugin, replacement, reason):
    name = plugin(entries=[("torch.nn", "Linear", replacement)])
    with pytest.raises(EntryError, match=f"plugin {name!r}: entry torch.nn.Linear.*{reason}"):
        qp.quantize_modules().__enter__()
    assert type(nn.Linear(1, 1)) is nn.Linear


# --- notebooks: modules that are edited and reloaded ---------------------------------------------

LAYERS = """
import torch
from torch import nn

class Scale(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width, width))

    def forward(self, x):
        return x @ self.weight

class Bare(nn.Module):
    def forward(self, x):
        return x
"""
EDITED = LAYERS.replace("self.width = width", "self.width = width + 10")
EDITED = EDITED.replace("x @ self.weight", "3 * (x @ self.weight)").replace(
    "class Bare(nn.Module):\n",
    "class Bare(nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.edited = True\n",
)
QUANT = """
import quantpatch
from LAYERS import Bare, Scale

class QuantScale(quantpatch.QuantizedLayer, Scale):
    inputs = ("x",)

class QuantBare(quantpatch.QuantizedLayer, Bare):
    inputs = ("x",)
    weights = {}
"""


def update(old, new):
    """What IPython's autoreload does to the classes and functions of before a module was reloaded."""
    if isinstance(old, type) and isinstance(new, type):
        for key in list(vars(old)):
            before = getattr(old, key)
            if not hasattr(new, key):
                delattr(old, key)
            elif before is not getattr(new, key) and not update(before, getattr(new, key)):
                with contextlib.suppress(AttributeError, TypeError):
                    setattr(old, key, getattr(new, key))
        for key in set(vars(new)) - set(vars(old)):
            setattr(old, key, getattr(new, key))
        return True
    if type(old) is type(new) is type(update):
        old.__code__, old.__defaults__ = new.__code__, new.__defaults__
        return True
    return False


def reloaded(name, path, source, *, updating):
    import importlib
    import os

    module = sys.modules[name]
    old = dict(vars(module))
    path.write_text(source)
    os.utime(path, (2e9, 2e9))
    importlib.reload(module)
    if updating:
        for key, value in old.items():
            if isinstance(value, type) and value.__module__ == name:
                update(value, vars(module)[key])
    return old


@pytest.mark.parametrize("how", ["start", "block"])
def test_autoreload_loses_neither_the_edit_nor_the_hook(package, tmp_path, how):
    name = package(layers=LAYERS)
    layers = f"{name}.layers"
    (tmp_path / name / "quantized.py").write_text(QUANT.replace("LAYERS", layers))
    __import__(f"{name}.quantized")
    quantized = sys.modules[f"{name}.quantized"]
    scope = qp.quantize_modules(
        custom=[(layers, "Scale", quantized.QuantScale), (layers, "Bare", quantized.QuantBare)]
    )
    module_init = vars(nn.Module)["__init__"]
    scope.start() if how == "start" else scope.__enter__()
    try:
        old = reloaded(layers, tmp_path / name / "layers.py", EDITED, updating=True)
        module = sys.modules[layers]
        for cls in (module.Scale, old["Scale"]):
            layer = cls(4)
            assert isinstance(layer, qp.QuantizedLayer), cls
            assert layer.width == 14
            for quantizer in layer.quantizers().values():
                quantizer.disable()
            assert torch.equal(layer(torch.eye(4)), 3 * torch.ones(4, 4))
        for cls in (module.Bare, old["Bare"]):
            assert isinstance(cls(), qp.QuantizedLayer)
            assert cls().edited
    finally:
        scope.stop() if how == "start" else scope.__exit__(None, None, None)
    for cls in (module.Scale, old["Scale"], module.Bare, old["Bare"]):
        assert type(cls()) is cls
        assert type(vars(cls)["__init__"]).__name__ == "function"
    assert vars(nn.Module)["__init__"] is module_init


def test_a_reloaded_target_whose_replacement_is_of_before_is_an_error(package, tmp_path):
    name = package(layers=LAYERS)
    layers = f"{name}.layers"
    (tmp_path / name / "quantized.py").write_text(QUANT.replace("LAYERS", layers))
    __import__(f"{name}.quantized")
    quantized = sys.modules[f"{name}.quantized"]
    with qp.quantize_modules(custom=[(layers, "Scale", quantized.QuantScale)]):
        reloaded(layers, tmp_path / name / "layers.py", EDITED, updating=False)
        with pytest.raises(
            EntryError, match=f"from before {layers} was reloaded.*Import {name}.quantized again"
        ):
            sys.modules[layers].Scale()
