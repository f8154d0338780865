"""What a block makes of layers that no hook has replaced, what it counts, and how its hooks look."""

from __future__ import annotations

import cProfile
import functools
import importlib
import inspect
import pydoc
import sys

import pytest
import torch
from torch import nn
from torch.nn import Conv1d

import quantpatch as qp
from quantpatch.errors import ArgumentTypeError, UnknownNameError
from quantpatch.layers.linear import QuantLinear

linear_init, conv_init = nn.Linear.__init__, nn.Conv1d.__init__
seen: list[type] = []


class Looks(nn.Linear):
    """Looks at its own class before, in and after its base's __init__."""

    def __init__(self, width):
        seen.append(type(self))
        super().__init__(width, width)
        seen.append(type(self))
        nn.init.constant_(self.weight, 3.0)

    def reset_parameters(self):
        seen.append(type(self))
        super().reset_parameters()


class Saved(nn.Conv1d):
    __init__ = nn.Conv1d.__init__


class ByReference(nn.Linear):
    def __init__(self, *args):
        linear_init(self, *args)


class Partial(nn.Linear):
    __init__ = functools.partialmethod(linear_init, bias=False)


class Decorated(nn.Linear):
    def _wrapped(function):
        @functools.wraps(function)
        def __init__(*args, **kwargs):
            function(*args, **kwargs)
            seen.append(type(args[0]))

        return __init__

    @_wrapped
    def __init__(self, *args):
        super().__init__(*args)


class Fails(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        raise KeyError("after its base")


class Below(Looks):
    pass


WAYS = [
    (Looks, (2,)),
    (Below, (2,)),
    (Saved, (1, 1, 1)),
    (ByReference, (2, 2)),
    (Partial, (2, 2)),
    (Decorated, (2, 2)),
]


@pytest.mark.parametrize(("cls", "arguments"), WAYS)
def test_a_subclass_changes_class_when_it_is_constructed(cls, arguments):
    seen.clear()
    with qp.quantize_modules(subclasses=True) as scope:
        layer = cls(*arguments)
        assert isinstance(layer, qp.QuantizedLayer)
        assert isinstance(layer, cls)
    assert set(seen) <= {cls}
    assert [(row.target, row.count) for row in scope.replaced] == [(f"{__name__}.{cls.__name__}", 1)]


@pytest.mark.parametrize(("cls", "arguments"), WAYS)
def test_however_it_is_constructed_it_is_reported_where_it_stays_float(cls, arguments):
    with qp.quantize_modules() as scope:
        assert type(cls(*arguments)) is cls
    assert [row.target for row in scope.skipped] == [f"{__name__}.{cls.__name__}"]


def test_under_a_profiler_it_changes_class_with_the_next_module_or_at_the_end():
    profile = cProfile.Profile()
    with qp.quantize_modules(subclasses=True):
        profile.enable()
        first = Looks(2)
        nn.Identity()
        second = Looks(2)
        profile.disable()
    assert isinstance(first, qp.QuantizedLayer)
    assert isinstance(second, qp.QuantizedLayer)


def test_a_layer_of_a_target_itself_is_quantized_whatever_runs_its_init(monkeypatch):
    real = nn.Linear.__init__
    with qp.quantize_modules() as scope:
        made = nn.Linear.__new__(nn.Linear)
        nn.Linear.__init__(made, 2, 2)
        monkeypatch.setattr(nn.Linear, "__init__", lambda self, *args: real(self, *args))
        wrapped = nn.Linear(2, 2)
        monkeypatch.undo()
    assert (type(made), type(wrapped)) == (QuantLinear, QuantLinear)
    assert [row.count for row in scope.replaced] == [2]


def test_what_fails_is_not_counted():
    with qp.quantize_modules(subclasses=True, skip=["Conv2d"]) as scope:
        for build in (Fails, lambda: nn.Linear(2, "x"), lambda: nn.Conv2d(1, 1, 1, groups=3)):
            with pytest.raises((KeyError, TypeError, ValueError)):
                build()
        nn.Linear(2, 2)
    assert [(row.target, row.count) for row in scope.replaced] == [("torch.nn.Linear", 1)]
    assert scope.skipped == ()


@pytest.mark.parametrize("skip", [[Looks], "Looks", f"{__name__}.Looks", "Loo*"])
def test_skip_takes_subclasses_and_what_is_below_them(skip):
    with qp.quantize_modules(subclasses=True, skip=skip) as scope:
        with qp.quantize_modules():
            layers = Looks(2), Below(2), Saved(1, 1, 1)
        assert [isinstance(layer, qp.QuantizedLayer) for layer in layers] == [False, False, True]
        assert type(Looks(2)) is Looks
    assert scope.skipped[0].target == f"{__name__}.Looks"
    assert scope.skipped[0].reason.startswith("skip=")
    model = nn.Sequential(Looks(2), nn.Linear(2, 2))
    done = qp.convert(model, subclasses=True, skip=skip)
    assert [type(layer) for layer in model] == [Looks, QuantLinear]
    assert done.skipped[0].reason.startswith("skip=")


def test_skip_may_name_a_subclass_in_a_module_that_is_not_imported(package):
    name = package(layers="from torch import nn\nclass Thing(nn.Linear): ...\n")
    with qp.quantize_modules(subclasses=True, skip=[f"{name}.layers.Thing"]):
        module = __import__(f"{name}.layers").layers
        assert type(module.Thing(1, 1)) is module.Thing


@pytest.mark.parametrize("cls", [nn.LazyLinear, nn.LazyConv2d, nn.LazyConvTranspose1d])
def test_a_skipped_class_stays_out_through_its_lazy_form(cls):
    becomes = cls.cls_to_become
    arguments = (4,) if cls is nn.LazyLinear else (4, 1)
    with qp.quantize_modules(skip=[becomes.__name__]) as scope:
        lazy = cls(*arguments)
        with qp.quantize_modules(include=[becomes.__name__]):
            again = cls(*arguments)
    x = torch.randn(1, 3, *([5] * (int(cls.__name__[-2]) if cls is not nn.LazyLinear else 0)))
    lazy(x)
    again(x)
    assert type(lazy) is becomes
    assert isinstance(again, qp.QuantizedLayer)
    assert scope.skipped[0].reason == f"skip={becomes.__name__!r}, which it becomes"


@pytest.mark.parametrize("cls", [nn.Linear, nn.AdaptiveAvgPool2d, nn.LSTM, nn.MaxPool1d, Conv1d])
def test_a_hook_looks_like_the_init_that_it_stands_for(cls):
    def look():
        init = cls.__init__
        code = init.__code__
        return (
            inspect.signature(cls), inspect.signature(init), inspect.getfullargspec(init),
            pydoc.render_doc(init).splitlines()[:3],
            code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], code.co_argcount,
            code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS), init.__defaults__,
            init.__kwdefaults__, init.__doc__,
            init.__name__, init.__qualname__, inspect.isfunction(init), inspect.getsource(init),
        )  # fmt: skip

    outside = look()
    with qp.quantize_modules(include=["MaxPool1d"]):
        assert look() == outside


def test_the_word_for_a_model_that_is_there_already_is_convert():
    with pytest.raises(ArgumentTypeError, match=r"not a model \(Sequential\).*qp.convert\(model\)") as caught:
        qp.quantize_modules(nn.Sequential(nn.Linear(1, 1)))
    assert len(str(caught.value)) < 250


def test_the_recipe_comes_first_and_the_error_for_anything_else_says_where_it_goes():
    with qp.quantize_modules("int4", skip=["Conv2d"]):
        layer = nn.Linear(2, 2)
    assert layer.weight_quantizer.format.name == "int4_narrow"
    for given in (["Linear"], ("Linear",), nn.Linear):
        with pytest.raises(
            ArgumentTypeError, match=r"recipe takes a recipe or its name, not .*skip=\[\.\.\.\]"
        ):
            qp.quantize_modules(given)
    with pytest.raises(ArgumentTypeError, match="such as recipe='int8'"):
        qp.quantize_modules(8)
    with pytest.raises(UnknownNameError, match=r"A layer to leave float is given as skip=\['Linear'\]"):
        qp.quantize_modules("Linear").start()


def test_a_replacement_whose_import_brings_other_targets_is_counted(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_layers.py").write_text("from torch import nn\nclass First(nn.Linear):\n    pass\n")
    (tmp_path / "late_others.py").write_text("from torch import nn\nclass Second(nn.Linear):\n    pass\n")
    (tmp_path / "late_quant.py").write_text(
        "import late_layers, late_others\nfrom quantpatch import QuantizedLayer\n"
        "class QuantFirst(QuantizedLayer, late_layers.First):\n    pass\n"
        "class QuantSecond(QuantizedLayer, late_others.Second):\n    pass\n"
    )
    custom = [
        ("late_layers", "First", "late_quant:QuantFirst"),
        ("late_others", "Second", "late_quant:QuantSecond"),
    ]
    try:
        with qp.quantize_modules(custom=custom) as scope:
            module = importlib.import_module("late_layers")
            built = [module.First(2, 2) for _ in range(2)]
            other = importlib.import_module("late_others").Second(2, 2)
        assert [type(layer).__name__ for layer in (*built, other)] == ["QuantFirst"] * 2 + ["QuantSecond"]
        assert [(row.replacement, row.count) for row in scope.replaced] == [
            ("late_quant.QuantFirst", 2),
            ("late_quant.QuantSecond", 1),
        ]
    finally:
        for name in ("late_layers", "late_others", "late_quant"):
            sys.modules.pop(name, None)
