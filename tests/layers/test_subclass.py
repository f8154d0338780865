"""Subclasses of float layers: quantized on request, as long as they compute as their base class does."""

from __future__ import annotations

import abc
import copy
import gc
import importlib
import inspect
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

import quantpatch as qp
from quantpatch.errors import ConversionError, LayerError
from quantpatch.layers import QuantConv2d, QuantizedLayer, QuantLinear
from quantpatch.layers.base import make_replacement
from quantpatch.layers.builtin_examples import EXAMPLES
from quantpatch.layers.subclass import combine


class MyLinear(nn.Linear):
    """With an __init__ of its own, and work after the base's."""

    def __init__(self, width, *, factor=2):
        super().__init__(width, width)
        self.factor = factor
        with torch.no_grad():
            self.weight.mul_(factor)
        self.norm = nn.LayerNorm(width)

    def doubled(self):
        return self.weight * 2

    def extra_repr(self):
        return "mine"


class Plain(nn.Linear):
    pass


class Grandchild(MyLinear):
    def reset_parameters(self):
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class WithForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


class WithHelper(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


class WithProperty(nn.Conv2d):
    padding = property(lambda self: (1, 1), lambda self, value: None)


class WithCall(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class WithClash(nn.Linear):
    def quantizer(self, name):
        return name


class WithLinearMethod(nn.Linear):
    def linear(self):  # a name that the base's forward uses too, of another object
        return self.weight


class Mixin:
    def half(self):
        return self.weight / 2


class WithMixin(Mixin, nn.Linear):
    pass


BUILT = {
    Plain: lambda: Plain(3, 3),
    MyLinear: lambda: MyLinear(3),
    Grandchild: lambda: Grandchild(3, factor=5),
    WithLinearMethod: lambda: WithLinearMethod(3, 3),
    WithMixin: lambda: WithMixin(3, 3),
}
each = pytest.mark.parametrize("cls", BUILT)
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def made(cls, *, built):
    """A quantized one, built in a block or converted; the same weights each time."""
    torch.manual_seed(0)
    if built:
        with qp.quantize_modules(subclasses=True):
            return BUILT[cls]()
    layer = BUILT[cls]()
    qp.convert(layer, subclasses=True)
    return layer


both = pytest.mark.parametrize("built", [True, False], ids=["built", "converted"])


@both
@each
def test_it_is_an_object_of_its_class_with_quantizers(cls, built):
    layer = made(cls, built=built)
    assert isinstance(layer, cls)
    assert isinstance(layer, QuantLinear)
    assert list(layer.quantizers()) == ["input_quantizer", "weight_quantizer"]
    assert type(layer) is combine(QuantLinear, cls)
    assert type(layer).float_class is cls
    assert inspect.signature(type(layer)) == inspect.signature(cls)
    assert type(layer).__qualname__ == layer._get_name() == f"Quant{cls.__name__}"
    assert type(layer).__module__ == cls.__module__


@both
@each
def test_it_computes_with_quantized_operands_and_what_the_float_one_does_without(cls, built):
    torch.manual_seed(0)
    reference = BUILT[cls]()
    layer = made(cls, built=built)
    assert list(qp.float_state_dict(layer)) == list(reference.state_dict())
    layer.load_state_dict(reference.state_dict(), strict=True)
    q, w = layer.input_quantizer, layer.weight_quantizer
    assert torch.equal(layer(X), nn.functional.linear(q(X), w(layer.weight), layer.bias))
    assert not torch.equal(layer(X), reference(X))
    assert qp.audit(layer, X).share == 1.0
    for quantizer in layer.quantizers().values():
        quantizer.disable()
    assert torch.equal(layer(X), reference(X))


def test_its_own_init_runs_to_its_end():
    layer = made(MyLinear, built=True)
    torch.manual_seed(0)
    reference = MyLinear(3)
    assert (layer.factor, type(layer.norm)) == (2, nn.LayerNorm)
    assert torch.equal(layer.weight, reference.weight)
    assert torch.equal(layer.doubled(), reference.weight * 2)
    assert "mine" in repr(layer)


def test_one_class_for_each_pair_which_goes_when_nobody_uses_it():
    class Local(nn.Linear):
        pass

    first = combine(QuantLinear, Local)
    assert combine(QuantLinear, Local) is first
    reference = weakref.ref(first)
    del first, Local
    gc.collect()
    assert reference() is None


@both
@each
def test_copies_and_pickles(cls, built):
    layer = made(cls, built=built)
    qp.calibrate(layer, [X])
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twins = [pickle.loads(pickle.dumps(layer, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for twin in (*twins, copy.deepcopy(layer), copy.copy(layer), torch.load(file, weights_only=False)):
        assert type(twin) is type(layer)
        assert torch.equal(twin(X), layer(X))


def test_a_pickle_is_read_in_another_process(package, tmp_path):
    name = package(layers="from torch import nn\nclass Mine(nn.Linear):\n    tag = 'mine'\n")
    module = __import__(f"{name}.layers").layers
    with qp.quantize_modules(subclasses=True):
        layer = module.Mine(3, 3)
    qp.calibrate(layer, [X])
    (tmp_path / "layer.pkl").write_bytes(pickle.dumps((layer, X, layer(X).detach())))
    code = f"""
import pickle, sys
sys.path.insert(0, {str(tmp_path)!r})
layer, x, expected = pickle.load(open({str(tmp_path / "layer.pkl")!r}, "rb"))
bases = [c.__name__ for c in type(layer).__bases__]
print(type(layer).__name__, bases, layer.tag, bool((layer(x) == expected).all()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "QuantMine ['QuantLinear', 'Mine'] mine True"


def test_a_subclass_with_a_way_of_its_own_to_pickle_keeps_it():
    class Own(nn.Linear):
        def __reduce_ex__(self, protocol):
            return nn.Identity, ()

    layer = Own(3, 3)
    qp.convert(layer, subclasses=True)
    assert type(copy.deepcopy(layer)) is nn.Identity


@both
def test_revert_gives_back_the_subclass(built):
    layer = made(MyLinear, built=built)
    reference = MyLinear(3)
    qp.revert(layer)
    assert type(layer) is MyLinear
    assert list(vars(layer)) == list(vars(reference))
    assert list(layer._modules) == list(reference._modules)


def test_a_parametrized_subclass_goes_there_and_back():
    layer = parametrizations.weight_norm(MyLinear(3))
    cls, expected = type(layer), layer(X)
    qp.convert(layer, subclasses=True)
    assert isinstance(layer, QuantLinear)
    assert isinstance(layer, MyLinear)
    assert not torch.equal(layer(X), expected)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(X), layer(X))
    qp.revert(layer)
    assert type(layer) is cls
    assert torch.equal(layer(X), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated. Methods on autograd:DeprecationWarning")
def test_it_compiles_without_a_graph_break():
    torch._dynamo.reset()
    layer = made(MyLinear, built=True)
    qp.calibrate(layer, [X])
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(X), layer(X))
    torch._dynamo.reset()


def test_a_checkpoint_names_the_two_classes(tmp_path):
    pytest.importorskip("safetensors")
    model = nn.Sequential(MyLinear(3), nn.Linear(3, 2))
    qp.convert(model, subclasses=True)
    qp.calibrate(model, [X])
    qp.save(model, tmp_path / "model.safetensors")
    with qp.quantize_modules(subclasses=True):
        built = nn.Sequential(MyLinear(3), nn.Linear(3, 2))
    for fresh in (nn.Sequential(MyLinear(3), nn.Linear(3, 2)), built):
        qp.load(fresh, tmp_path / "model.safetensors")
        assert type(fresh[0]) is combine(QuantLinear, MyLinear)
        assert torch.equal(fresh(X), model(X))


OF_TORCH = [e for e in EXAMPLES if e.target.startswith("torch.nn.") and "Lazy" not in e.target]


@pytest.mark.parametrize("example", OF_TORCH, ids=lambda example: example.target)
def test_every_layer_has_subclasses(example, monkeypatch):
    name = example.target.rpartition(".")[2]
    target = getattr(nn, name)
    mine = type(f"My{name}", (target,), {"__module__": __name__})
    torch.manual_seed(0)
    reference = example.build().eval()
    replacement = registry_entry(example.target).load_replacement()

    def build():
        with monkeypatch.context() as patch:
            patch.setattr(nn, name, mine)  # so that the example builds one
            return example.build().eval()

    with qp.quantize_modules(subclasses=True, include=["*"]):
        built = build()
    converted = build()
    qp.convert(converted, subclasses=True, include=["*"])
    results = []
    for layer in (built, converted):
        assert type(layer) is combine(replacement, mine)
        layer.load_state_dict(reference.state_dict(), strict=True)
        torch.manual_seed(1)
        given = example.inputs()
        results.append(tree_leaves(layer(*given, **example.keywords)))
    assert built.quantizers().keys() == converted.quantizers().keys()
    assert all(map(torch.equal, *results))


def registry_entry(target):
    return next(entry for entry in qp.registry.entries([]) if entry.dotted == target)


def test_a_lazy_subclass_becomes_what_its_base_becomes():
    class MyLazy(nn.LazyLinear):
        pass

    with qp.quantize_modules(subclasses=True):
        layer = MyLazy(2)
    assert isinstance(layer, MyLazy)
    layer(X)
    assert type(layer) is QuantLinear


# --- what cannot be ------------------------------------------------------------------------------------

UNFIT = [
    (lambda: WithForward(3, 3), "a forward"),
    (lambda: WithHelper(3, 3, 1), "a _conv_forward"),
    (lambda: WithProperty(3, 3, 1), "a padding"),
    (lambda: WithCall(3, 3), "a __call__"),
    (lambda: WithClash(3, 3), "a quantizer"),
]


@pytest.mark.parametrize(("build", "what"), UNFIT, ids=[what for _, what in UNFIT])
def test_a_subclass_with_ways_of_its_own_stays_float_and_is_reported(build, what):
    with qp.quantize_modules(subclasses=True) as scope:
        layer = build()
        nn.Linear(1, 1)
    assert not isinstance(layer, QuantizedLayer)
    (row,) = scope.skipped
    assert row.target == f"{__name__}.{type(layer).__name__}"
    assert f"with {what} of its own" in row.reason
    model = nn.Sequential(build(), nn.Linear(3, 3))
    report = qp.convert(model, subclasses=True)
    assert [s.reason for s in report.skipped] == [row.reason]
    assert type(model[0]) is type(layer)


def test_a_class_that_cannot_be_combined_stays_float_and_says_why():
    class Ordered(type):
        def mro(cls):
            if QuantizedLayer in (order := super().mro()):
                raise TypeError("sealed")
            return order

    class Sealed(nn.Linear, metaclass=Ordered):
        pass

    with qp.quantize_modules(subclasses=True) as scope:
        assert type(Sealed(2, 2)) is Sealed
    assert "sealed" in scope.skipped[0].reason
    with pytest.raises(LayerError, match="sealed"):
        combine(QuantLinear, Sealed)


# --- unseen by what watches for new classes --------------------------------------------------------------


def watched(seen):
    """A class of layers that notes every class below it, in each way that Python has."""

    class Watching(type):
        def __new__(cls, name, bases, namespace, **options):
            seen.append(name)
            return super().__new__(cls, name, bases, namespace, **options)

        def __init__(cls, name, bases, namespace, **options):
            seen.append(name)
            super().__init__(name, bases, namespace)

        def __call__(cls, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class Registered(nn.Linear, metaclass=Watching):
        def __init_subclass__(cls, *, kind="none"):
            super().__init_subclass__()
            seen.append(kind)

    class Dense(Registered, kind="dense"):
        pass

    return Dense


def test_registries_of_subclasses_do_not_hear_of_combined_classes():
    seen = []
    cls = watched(seen)
    before = list(seen)
    with qp.quantize_modules(subclasses=True):
        built = cls(3, 3)
    converted = cls(3, 3)
    qp.convert(converted, subclasses=True)
    copy.deepcopy(built)
    pickled = parametrizations.orthogonal(cls(3, 3))
    seen_by_torch = list(seen)
    qp.convert(pickled, subclasses=True)
    assert before == seen[: len(before)] == ["Registered", "Registered", "Dense", "dense", "Dense"]
    assert seen == seen_by_torch
    assert type(built) is type(converted) is combine(QuantLinear, cls)
    assert type(type(built)) is type(cls)
    assert type(built).__bases__ == (QuantLinear, cls)


def test_a_mixin_of_replacements_hears_of_the_classes_made_with_it():
    heard = []

    class Mixin(QuantizedLayer):
        def __init_subclass__(cls, **kwargs):
            super().__init_subclass__(**kwargs)
            heard.append((cls.__name__, cls.float_class.__name__))

    made = make_replacement("QuantMine", (Mixin, Plain), {"__module__": __name__})
    assert heard == [("QuantMine", "Plain")]
    assert made.__module__ == __name__


def test_an_abstract_base_class_distinguishes_the_combined_class_from_its_base():
    class Base(nn.Linear, abc.ABC):
        pass

    class Virtual(nn.Module):
        pass

    Base.register(Virtual)
    layer = Base(3, 3)
    assert isinstance(layer, Base)
    qp.convert(combined := Base(3, 3), subclasses=True)
    assert isinstance(combined, Base)
    assert not isinstance(layer, type(combined))
    assert not isinstance(Virtual(), type(combined))


def test_a_class_whose_objects_python_cannot_turn_into_others_stays_float_and_says_why():
    class Abstract(abc.ABC, nn.Linear):
        pass

    with qp.quantize_modules(subclasses=True) as scope:
        assert type(Abstract(2, 2)) is Abstract
    assert "layout differs" in scope.skipped[0].reason


def test_a_replacement_with_an_init_of_its_own_does_not_take_over():
    class Quant(QuantizedLayer, nn.Linear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = 3

    entry = (nn, "Linear", Quant)
    with qp.quantize_modules(subclasses=True, custom=[entry]) as scope:
        assert type(Plain(2, 2)) is Plain
    assert "__init__ of its own" in scope.skipped[0].reason
    with pytest.raises(ConversionError, match="nothing to quantize"):
        qp.convert(Plain(2, 2), subclasses=True, custom=[entry])


# --- where it holds ---------------------------------------------------------------------------------------


def test_it_is_off_by_default_and_the_reason_says_how_to_turn_it_on():
    with qp.quantize_modules() as scope:
        assert type(Plain(2, 2)) is Plain
    assert (
        scope.skipped[0].reason
        == "a subclass of torch.nn.Linear, for which there is no entry; write subclasses=True"
    )


def test_an_inner_block_inherits_it_unless_it_says_otherwise():
    def kinds():
        return isinstance(Plain(2, 2), QuantizedLayer)

    with qp.quantize_modules(subclasses=True):
        with qp.quantize_modules(recipe="int4"):
            assert kinds()
        with qp.quantize_modules(subclasses=False):
            assert not kinds()
        with qp.keep_float():
            assert not kinds()
            with qp.quantize_modules():
                assert kinds()
        assert kinds()
    with qp.quantize_modules(), qp.quantize_modules(subclasses=True):
        assert kinds()
    assert not kinds()


def test_skip_leaves_subclasses_float_as_well():
    with qp.quantize_modules(subclasses=True, skip=["Linear"]) as scope:
        assert type(Plain(2, 2)) is Plain
    reason = "a subclass of torch.nn.Linear, which stays float: skip='Linear'"
    assert [(s.target, s.reason) for s in scope.skipped] == [(f"{__name__}.Plain", reason)]


def test_a_target_that_is_imported_inside_the_block_has_subclasses_too(package):
    name = package(
        layers="from torch import nn\nclass Base(nn.Linear):\n    pass\n",
        quant="from quantpatch import QuantizedLayer\nfrom .layers import Base\n"
        "class QuantBase(QuantizedLayer, Base):\n    pass\n",
    )
    entry = (f"{name}.layers", "Base", f"{name}.quant:QuantBase")
    with qp.quantize_modules(subclasses=True, custom=[entry]) as scope:
        base = importlib.import_module(f"{name}.layers").Base

        class Mine(base):
            pass

        layer = Mine(2, 2)
    assert type(layer).__bases__[0].__name__ == "QuantBase"
    assert isinstance(layer, Mine)
    assert [row.target.rpartition(".")[2] for row in scope.replaced] == ["Mine"]


def test_the_recipe_of_the_block_holds():
    with qp.quantize_modules(subclasses=True, recipe="int4"):
        assert Plain(2, 2).weight_quantizer.format.bits == 4


def test_what_came_out_is_reported_by_the_subclass():
    with qp.quantize_modules(subclasses=True) as scope:
        Plain(2, 2), Plain(2, 2), nn.Linear(2, 2)
    rows = [(row.target, row.replacement, row.count) for row in scope.replaced]
    assert rows == [
        (f"{__name__}.Plain", f"{__name__}.QuantPlain", 2),
        ("torch.nn.Linear", "quantpatch.layers.linear.QuantLinear", 1),
    ]
    model = nn.Sequential(Plain(2, 2), Plain(2, 2), nn.Linear(2, 2))
    assert [(r.target, r.replacement, r.count) for r in qp.convert(model, subclasses=True).replaced] == rows


def test_an_entry_for_the_subclass_comes_first():
    class QuantPlain(QuantizedLayer, Plain):
        pass

    with qp.quantize_modules(subclasses=True, custom=[(sys.modules[__name__], "Plain", QuantPlain)]):
        assert type(Plain(2, 2)) is QuantPlain


def test_a_combined_class_builds_layers_itself():
    layer = combine(QuantLinear, MyLinear)(3, factor=7)
    assert layer.factor == 7
    assert list(layer.quantizers()) == ["input_quantizer", "weight_quantizer"]


def test_an_init_that_fails_leaves_nothing_behind():
    class Fails(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            raise ValueError("late")

    with qp.quantize_modules(subclasses=True):
        with pytest.raises(ValueError, match="late"):
            Fails()
        assert type(nn.Linear(2, 2)) is QuantLinear


def test_a_part_of_attention_is_neither_quantized_nor_reported():
    """Its weight is quantized by the attention layer, which never calls it."""
    for settings in ({}, {"subclasses": True}, {"skip": ["MultiheadAttention"], "subclasses": True}):
        with qp.quantize_modules(**settings) as scope:
            layer = nn.MultiheadAttention(4, 2)
            nn.Linear(2, 2)
        assert not isinstance(layer.out_proj, QuantizedLayer)
        assert not any("NonDynamically" in row.target for row in scope.skipped)
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(2, 2))
    assert qp.convert(model, subclasses=True).skipped == ()
    assert not isinstance(model[0].out_proj, QuantizedLayer)


def test_convolutions_of_users_in_a_network_reach_a_share_of_one():
    class Same(nn.Conv2d):
        def __init__(self, inside, outside):
            super().__init__(inside, outside, 3, padding="same")

    def build():
        return nn.Sequential(Same(3, 4), nn.ReLU(), Same(4, 4), nn.Flatten(), nn.Linear(4 * 16, 2))

    with qp.quantize_modules(subclasses=True):
        model = build()
    assert type(model[0]).__bases__ == (QuantConv2d, Same)
    assert qp.audit(model, torch.randn(1, 3, 4, 4)).share == 1.0
