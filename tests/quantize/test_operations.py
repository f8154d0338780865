"""Products inside forwards: found in whatever code a class has for them, and quantized where they stand."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import threading
from concurrent import futures

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import quantpatch as qp
from quantpatch.errors import (
    ArgumentError,
    ArgumentTypeError,
    CalibrationError,
    ConversionError,
    QuantPatchWarning,
    UnknownNameError,
)
from quantpatch.layers import QuantizedLayer
from quantpatch.layers.quantizer import named_quantizers

HELPERS = """
import torch

def attend(query, key, value):
    return torch.softmax(query @ key.mT, -1) @ value

def project(x, weight):
    return x @ weight
"""

# Name of the class: what its forward returns, of x of (2, 5, 8), its child fc (8 to 8) and its parameters.
FORWARDS = {
    "Matmul": "torch.matmul(self.fc(x), x.mT)",
    "At": "self.fc(x) @ x.mT",
    "Cast": "self.fc(x).float() @ x.mT.float()",
    "Method": "self.fc(x).matmul(x.mT)",
    "Bmm": "torch.bmm(self.fc(x), x.mT)",
    "Mm": "torch.mm(self.fc(x)[0], x[0].T)",
    "Mv": "torch.mv(self.fc(x)[0], x[0, 0])",
    "Dot": "torch.dot(self.fc(x)[0, 0], x[0, 0])",
    "Vdot": "torch.vdot(self.fc(x)[0, 0], x[0, 0])",
    "Inner": "torch.inner(self.fc(x), x)",
    "Tensordot": "torch.tensordot(self.fc(x), x, dims=([2], [2]))",
    "Einsum": "torch.einsum('bij,bkj->bik', self.fc(x), x)",
    "EinsumOfWeight": "torch.einsum('bij,kj->bik', self.fc(x), self.weight)",
    "Einops": "einops.einsum(self.fc(x), x, 'batch i j, batch k j -> batch i k')",
    "EinopsOfWeight": "einops.einsum(self.fc(x), self.weight, 'b i j, k j -> b i k')",
    "Addmm": "torch.addmm(x[0, :, :5], self.fc(x)[0], x[0].T)",
    "Addmv": "torch.addmv(x[0, :, 0], self.fc(x)[0], x[0, 0])",
    "Baddbmm": "torch.baddbmm(x[:, :, :5], self.fc(x), x.mT)",
    "Addbmm": "torch.addbmm(x[0, :, :5], self.fc(x), x.mT)",
    "Attention": "F.scaled_dot_product_attention(self.fc(x), x, x)",
    "Causal": "F.scaled_dot_product_attention(query=self.fc(x), key=x, value=x, is_causal=True)",
    "OwnLinear": "F.linear(self.fc(x).relu() + 1, self.weight)",
    "OwnLinearOfInput": "F.linear(x, self.weight)",
    "OwnMatmul": "(self.fc(x) + 1) @ self.weight",
    "OwnVector": "(self.fc(x) + 1) @ self.vector",
    "OwnVectorOnTheLeft": "self.vector @ (self.fc(x) + 1).mT",
    "OwnMatmulOfInput": "x @ self.weight",
    "Experts": "torch.bmm(x + 1, self.experts)",
    "ChildsLinear": "F.linear(x.sigmoid(), self.fc.weight)",
    "Normed": "F.linear(x + 1, self.weight / self.weight.norm())",
    "Bilinear": "F.bilinear(self.fc(x), x + 1, self.cube)",
    "Conv1d": "F.conv1d(x + 1, self.kernel1)",
    "Conv2d": "F.conv2d(x[:, None] + 1, self.kernel2)",
    "Conv3d": "F.conv3d(x[:, None, None] + 1, self.kernel3)",
    "ConvTranspose1d": "F.conv_transpose1d(x + 1, self.kernel1)",
    "ConvTranspose2d": "F.conv_transpose2d(x[:, None] + 1, self.kernel2)",
    "ConvOfActivations": "F.conv1d(x + 1, self.fc(x[:, :, :8])[:1, :, :3])",
    "Helper": "attend(self.fc(x), x, x)",
    "HelperOfModule": "helpers.attend(self.fc(x), x, x)",
    "HelperOfWeight": "project(x.relu() + 1, self.weight)",
    "Twice": "(self.fc(x) @ x.mT) @ (x.relu() + 1)",
    "TwoKinds": "torch.bmm(self.fc(x), x.mT) + F.linear(x - 1, self.weight[:5])",
    "InMethod": "self.scores(self.fc(x), x)",
    "Inputs": "F.conv1d(x, self.kernel1)",
}
SOURCE = """
import einops
import torch
from torch import nn
from torch.nn import functional as F
from . import helpers
from .helpers import attend, project

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.vector = nn.Parameter(torch.randn(8))
        self.experts = nn.Parameter(torch.randn(2, 8, 4))
        self.cube = nn.Parameter(torch.randn(4, 8, 8))
        self.kernel1 = nn.Parameter(torch.randn(5, 5, 3))
        self.kernel2 = nn.Parameter(torch.randn(1, 1, 3, 3))
        self.kernel3 = nn.Parameter(torch.randn(1, 1, 1, 3, 3))
    def scores(self, left, right):
        return left @ right.mT
""" + "".join(
    f"\nclass {name}(Base):\n    def forward(self, x, factor: float = 1.0):\n        return {code}\n"
    for name, code in FORWARDS.items()
)


@pytest.fixture
def layers(package):
    return importlib.import_module(f"{package(layers=SOURCE, helpers=HELPERS)}.layers")


def operands(model):
    return [name.removesuffix("_quantizer") for name in named_quantizers(model)]


@pytest.mark.filterwarnings("ignore:.*saw no data:quantpatch.errors.QuantPatchWarning")
@pytest.mark.parametrize("name", FORWARDS)
def test_every_product_of_a_class_is_quantized_and_disabled_computes_what_it_did(layers, name):
    cls, x = getattr(layers, name), torch.randn(2, 5, 8)
    float_model = cls().eval()
    with qp.quantize_modules(operations="products") as block:
        model = cls().eval()
    assert f"{layers.__name__}.{name}" in {row.target for row in block.replaced}
    known = operands(model)
    model.load_state_dict(float_model.state_dict())
    expected = float_model(x)
    report = qp.audit(model, x)
    assert (report.share, operands(model)) == (1.0, known)
    assert not torch.equal(model(x), expected)
    for quantizer in named_quantizers(model).values():
        quantizer.disable()
    assert torch.equal(model(x), expected)
    for quantizer in named_quantizers(model).values():
        quantizer.enable()
    qp.calibrate(model, [x], strict=False)  # some never call fc
    quantized = model(x)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is type(model)
        assert torch.equal(twin(x), quantized)
    qp.revert(model)
    assert type(model) is cls
    assert torch.equal(model(x), expected)
    qp.convert(model, operations="products")
    assert operands(model) == known


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("OwnLinear", {"linear_0_weight": 0}),
        ("OwnMatmul", {"matmul_0_right": -1}),
        ("OwnVector", {"matmul_0_right": None}),
        ("OwnVectorOnTheLeft", {"matmul_0_left": None}),
        ("EinsumOfWeight", {"einsum_0_right": -2}),
        ("EinopsOfWeight", {"einsum_0_right": -2}),
        ("Experts", {"matmul_0_right": -1}),
        ("Normed", {"linear_0_weight": 0}),
        ("Conv2d", {"conv2d_0_weight": 0}),
        ("ConvTranspose1d", {"conv_transpose1d_0_weight": 1}),
        ("ConvOfActivations", {}),
        ("HelperOfWeight", {"matmul_0_right": -1}),
        ("Matmul", {}),
    ],
)
def test_what_is_made_of_parameters_alone_is_a_weight_with_a_range_for_each_output(layers, name, axes):
    with qp.quantize_modules(operations="products"):
        model = getattr(layers, name)()
    found = {
        operand: model.quantizer(operand).descriptor.axis
        for operand, inner in model._inner.items()
        if inner.is_weight
    }
    assert found == axes
    assert all(model.quantizer(operand).format.name == "int8_narrow" for operand in axes)


def test_a_layer_whose_weight_another_forward_reads_has_no_quantizers_that_see_nothing(layers):
    with qp.quantize_modules(operations="products"):
        model = layers.ChildsLinear()
    assert operands(model) == ["linear_0_input", "linear_0_weight"]
    assert type(model.fc) is nn.Linear
    report = qp.calibrate(model, [torch.randn(2, 5, 8)])
    assert report.skipped == {}


# --- what a class of a user's own does -----------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, fused=True):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.fused = fused

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        scores = q @ k.mT * 8**-0.5
        return scores.softmax(-1) @ v


FUSED = [f"attention_0_{name}" for name in ("query", "key", "value", "probabilities")]
OPEN = ["matmul_0_left", "matmul_0_right", "matmul_1_left", "matmul_1_right"]


def inner(model):
    return [name for name in operands(model) if "qkv" not in name]


def test_only_the_branch_that_an_attribute_chooses_has_quantizers():
    for fused, names in ((True, FUSED), (False, OPEN)):
        with qp.quantize_modules(operations="products"):
            model = Attention(fused)
        assert inner(model) == names
        twin = pickle.loads(pickle.dumps(model))
        assert (inner(twin), type(twin)) == (names, type(model))


def test_both_ways_of_attention_compute_the_same():
    torch.manual_seed(0)
    with qp.quantize_modules(operations="products"):
        fused, in_the_open = Attention().eval(), Attention(False).eval()
    in_the_open.qkv.load_state_dict(fused.qkv.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(fused(x), in_the_open(x))


def test_a_branch_that_is_chosen_later_is_reported():
    with qp.quantize_modules(operations="products"):
        model = Attention()
    model.fused = False
    with pytest.warns(
        QuantPatchWarning, match="`self.fused` was True when it was quantized and is False now.* build or"
    ):
        model(torch.randn(2, 5, 8))
    model(torch.randn(2, 5, 8))  # once is enough


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.tensor([[True, False, True]] * 3)},
        {"attn_mask": torch.tensor([[0.5, -1, -torch.inf]] * 3)},
        {"enable_gqa": True},
    ],
    ids=["causal", "scale", "boolean-mask", "mask", "gqa"],
)
def test_attention_in_the_open_is_that_of_torch(options):
    class Call(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, **options)

    model = Call()
    qp.convert(model, operations={"Call": {"attention": qp.QuantDescriptor(num_bits=8)}})
    heads = 2 if options.get("enable_gqa") else 4
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, heads, 3, 8), torch.randn(1, heads, 3, 8)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(model(q, k, v), expected, atol=0.05, rtol=0.05)
    for name in FUSED:
        model.quantizer(name).disable() if name != FUSED[-1] else None
    # Scores are computed in the open, of what is not quantized: exact but for the probabilities' step.
    torch.testing.assert_close(model(q, k, v), expected, atol=0.02, rtol=0.02)


class Loop(nn.Module):
    """One place, many times; a comprehension, a lambda and an inner function."""

    def forward(self, xs):
        def product(x):
            return x @ x.mT

        return [product(x) for x in xs], (lambda y: y.matmul(y.mT))(xs[0])


def test_inner_functions_and_loops_have_one_quantizer_for_a_place():
    model = Loop()
    qp.convert(model, operations="products")
    assert operands(model) == OPEN
    assert qp.audit(model, ([torch.randn(2, 3), torch.randn(4, 3)],)).share == 1.0


from torch import einsum as contract  # noqa: E402


def standardized(weight):
    return (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)


class Standardized(nn.Conv2d):
    def forward(self, x):
        out = F.conv2d(input=x, weight=standardized(self.weight), bias=self.bias, padding=1)
        return contract("bchw,bcij->bhwij", out, out)


def test_a_weight_that_a_helper_standardizes_is_a_weight_and_aliases_are_known():
    with qp.quantize_modules(operations="products") as block:
        model = Standardized(2, 4, 3)
    assert operands(model) == ["conv2d_0_input", "conv2d_0_weight", "einsum_0_left", "einsum_0_right"]
    qp.calibrate(model, [torch.randn(1, 2, 5, 5)])
    assert model.quantizer("conv2d_0_weight").amax.shape == (4, 1, 1, 1)
    assert block.skipped == ()


class Holder(nn.Module):
    """Calls a method of another module, and a function that it holds."""

    def __init__(self, function):
        super().__init__()
        self.other, self.function = Other(), function

    def forward(self, x):
        return self.other.scores(x), self.function(x), Standing.scores(x)


class Other(nn.Module):
    def scores(self, x):
        return x @ x.mT

    def forward(self, x):
        raise NotImplementedError


class Standing:
    @staticmethod
    def scores(x):
        return torch.bmm(x, x.mT)


def held(x):
    return torch.matmul(x, x.mT)


def test_methods_of_other_objects_and_functions_in_attributes_are_followed():
    with qp.quantize_modules(operations="products"):
        model = Holder(held)
    assert len(operands(model)) == 6
    x = torch.randn(2, 3, 4)
    assert qp.audit(model, x).share == 1.0
    assert qp.audit(pickle.loads(pickle.dumps(model)), x).share == 1.0
    model.function = torch.relu
    with pytest.warns(QuantPatchWarning, match="it called .*held when it was quantized and calls .*relu"):
        model(x)


class Head(nn.Conv1d):
    def forward(self, x):
        return super().forward(x.mT).mT


class Pooled(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize("make", [lambda: Head(8, 4, 3), lambda: Pooled(8, 2, batch_first=True)])
def test_a_subclass_that_calls_the_forward_of_torch_s_layer_has_its_products(make):
    x = torch.randn(2, 5, 8)
    with qp.quantize_modules(operations="products") as block:
        model = make().eval()
    assert block.skipped == ()
    with torch.no_grad():  # torch may compute attention in one piece then
        assert qp.audit(model, x).share == 1.0


class Processor:
    """An attention's work in an object, as diffusers has it."""

    def __call__(self, attention, x):
        query = attention.fc(x)
        return F.linear(query @ x.mT, attention.weight)


class Backends:
    """A registry that says which function is in use."""

    _functions = {"matmul": held}
    _in_use = "matmul"

    @classmethod
    def in_use(cls):
        """The one in use, with its name."""
        return cls._in_use, cls._functions[cls._in_use]


def dispatched(x):
    _, function = Backends.in_use()
    return function(x)


PROCESSOR = Processor()


class Processed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(5, 3))
        self.processor = Processor()
        self.processors = [self.processor]

    def forward(self, x):
        processor = self.processor
        of_attribute, of_variable = self.processor(self, x), processor(self, x)
        return of_attribute, of_variable, self.processors[0](self, x), PROCESSOR(self, x), dispatched(x)


def test_objects_that_are_called_and_functions_in_registries_are_followed():
    x = torch.randn(2, 3, 4)
    with qp.quantize_modules(operations="products") as block:
        model = Processed()
    assert block.skipped == ()
    qp.calibrate(model, [x])
    assert qp.audit(model, x).share == 1.0
    weights = [name for name, inner in model._inner.items() if inner.is_weight]
    assert weights == [f"linear_{n}_weight" for n in range(4)]
    twin = pickle.loads(pickle.dumps(model))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        outputs = [twin(x), compiled(x), model(x)]
    for of_twin, of_compiled, expected in zip(*outputs, strict=True):
        assert torch.equal(of_twin, expected)
        assert torch.equal(of_compiled, expected)
    model.processor = lambda layer, x: x
    with pytest.warns(
        QuantPatchWarning, match=r"called .*Processor.__call__ when it was quantized and calls"
    ):
        model(x)


class Named(nn.Module):
    """Names of its own that quantized layers use as well."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", torch.randn(4, 4))
        self.inputs = 3

    def parts(self):
        return self.inputs + 1

    def forward(self, x):
        assert self.parts() == 4
        return F.linear(x, self.weights)


class Vectors(nn.Module):
    """Quantizes vectors: to it a quantizer is something else."""

    def __init__(self):
        super().__init__()
        self.quantizer = nn.Linear(4, 4)
        self.register_buffer("descriptors", torch.randn(4, 4))

    def quantizers(self):
        return [self.quantizer]

    def forward(self, x):
        (quantizer,) = self.quantizers()
        return quantizer(x) @ self.descriptors


class Clashing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight_axes = nn.Identity()

    def forward(self, x):
        return self.weight_axes(x) @ x.mT


def test_names_of_a_class_s_own_stay_its_own():
    with qp.quantize_modules(operations="products"):
        model = Named()
    x = torch.randn(2, 4)
    assert qp.audit(model, x).share == 1.0
    assert qp.audit(pickle.loads(pickle.dumps(model)), x).share == 1.0


def test_a_class_may_have_quantizers_of_its_own(tmp_path):
    torch.manual_seed(0)
    with qp.quantize_modules(operations="products") as block:
        model = nn.Sequential(Vectors(), nn.Linear(4, 4)).eval()
    x = torch.randn(8, 4)
    assert not block.skipped
    layer = model[0]
    assert layer.quantizers() == [layer.quantizer]
    expected = nn.functional.linear(x, layer.quantizer.weight, layer.quantizer.bias) @ layer.descriptors
    own = QuantizedLayer.quantizers(layer)
    assert list(own) == ["matmul_0_left_quantizer", "matmul_0_right_quantizer"]
    assert len(qp.summary(model).rows) == 6
    qp.configure(model, {"0.matmul_0_left_quantizer": qp.QuantDescriptor(num_bits=6)})
    qp.calibrate(model, [x], progress=False)
    assert qp.audit(model, x).share == 1
    float_model = nn.Sequential(Vectors(), nn.Linear(4, 4)).eval()
    float_model.load_state_dict(qp.float_state_dict(model))
    qp.compare(model, float_model, [x])
    qp.sensitivity(model, lambda net: net(x).sum().item(), progress=False)
    qp.tune(model, [x], method="bias_correction", progress=False)
    qp.save(model, tmp_path / "model.safetensors")
    loaded = qp.load(nn.Sequential(Vectors(), nn.Linear(4, 4)).eval(), tmp_path / "model.safetensors")
    for other in (loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(x), model(x))
    qp.prepare(model, x)
    qp.export_onnx(model, x, tmp_path / "model.onnx", latency=False)
    qp.revert(model)
    assert type(model[0]) is Vectors
    torch.testing.assert_close(model[0](x), expected)


def test_a_class_that_uses_the_name_of_a_method_is_left_with_the_reason():
    with qp.quantize_modules(operations="products") as block:
        model = nn.Sequential(Clashing(), nn.Linear(2, 2))
    assert type(model[0]) is Clashing
    (row,) = block.skipped
    assert "it has 'weight_axes' of its own, which quantized layers use" in row.reason
    with pytest.raises(
        ConversionError, match=r"strict=True: 1 layers may multiply .* 0 \(it has 'weight_axes'"
    ):
        qp.convert(nn.Sequential(Clashing(), nn.Linear(2, 2)), operations="products", strict=True)


# --- rules -------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(False), Attention()

    def forward(self, x):
        return self.second(self.first(x)) + x


def build(**options):
    with qp.quantize_modules(**options):
        return Net().eval()


def test_rules_say_where_which_and_how():
    four = qp.QuantDescriptor(num_bits=4)
    model = build(operations={"*": ["products", "add"], "first": {"matmul": four}, "*second": None})
    found = {name: q.format.name for name, q in named_quantizers(model).items() if "qkv" not in name}
    assert found == {
        **{f"first.{name}_quantizer": "int4" for name in OPEN},
        "add_0_left_quantizer": "int8",
        "add_0_right_quantizer": "int8",
    }
    assert type(model.second) is Attention


def test_a_block_shows_its_operations_as_they_were_given():
    for given in ("products", {"*": "matmul"}):
        assert repr(qp.quantize_modules(operations=given)).startswith(
            f"quantize_modules(operations={given!r}"
        )


def test_a_class_or_its_name_says_where_too():
    for where in (Attention, "Attention", f"{__name__}.Attention", "*Attention"):
        assert inner(build(operations={where: "attention"})) == [f"second.{name}" for name in FUSED]


def test_what_is_not_multiplied_can_be_asked_for():
    model = build(operations=["add", "softmax"])
    assert inner(model) == ["first.softmax_0_output", "add_0_left", "add_0_right"] or set(inner(model)) == {
        "first.softmax_0_output", "add_0_left", "add_0_right",
    }  # fmt: skip
    assert qp.recipe("int8").input is not None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("product", UnknownNameError, "unknown operation 'product'. Did you mean 'products'"),
        ({"*": {"matmull": "int8"}}, UnknownNameError, "unknown operation 'matmull'"),
        ({"*": {"matmul": "int9"}}, UnknownNameError, "unknown recipe 'int9'"),
        (3, ArgumentTypeError, "operations takes 'products', names of operations, or rules"),
        ({"*": {"matmul": 8}}, ArgumentTypeError, "not 8"),
        ({3: "matmul"}, ArgumentTypeError, "not 3"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_built(given, error, message):
    with pytest.raises(error, match=message), qp.quantize_modules(operations=given):
        raise AssertionError


def test_a_rule_that_matches_nothing_is_an_error_with_near_misses():
    with pytest.raises(ArgumentError, match="'frist': 'matmul' .* no module has such a name .* 'first'"):
        build(operations={"frist": "matmul"})
    with pytest.raises(ArgumentError, match="first compute no conv2d in a forward"):
        build(operations={"first": "conv2d"})
    model = Net()
    with pytest.raises(ArgumentError, match="matches nothing"):
        qp.convert(model, operations={"frist": "matmul"})
    assert {type(module) for module in model.modules()} == {Net, Attention, nn.Linear}


class Branching(nn.Module):
    def forward(self, x, y=None):
        return x @ x.mT if y is None else x @ y.mT


def test_a_branch_that_batches_do_not_reach_is_reported_and_one_that_never_runs_is_an_error():
    model, x = Branching(), torch.randn(3, 4)
    qp.convert(model, operations="products")
    with pytest.warns(
        QuantPatchWarning, match="2 of 4 quantizers saw no data, because they stand in branches"
    ):
        qp.calibrate(model, [x], progress=False)
    qp.calibrate(model, [(x, x)], existing="keep", progress=False)
    model = nn.ModuleDict({"used": Branching(), "unused": Branching()})
    model.forward = lambda x: model["used"](x) + model["used"](x, x)
    qp.convert(model, operations="products")
    with pytest.raises(CalibrationError, match="4 of 8 quantizers saw no data, because their layers did not"):
        qp.calibrate(model, [x], progress=False)


def test_rules_that_contradict_are_an_error_and_the_model_is_as_before():
    model = Net()
    with pytest.raises(ArgumentError, match=r"the rule 'first': 'matmul' .* contradicts those after it"):
        qp.convert(model, operations={"first": {"matmul": "int8"}, Attention: {"matmul": None}})
    assert {type(module) for module in model.modules()} == {Net, Attention, nn.Linear}
    qp.convert(model, operations={"first": {"matmul": "int8"}, "*": "products"})  # which says the same
    assert inner(model.first)
    model = build(operations={"*": ["matmul", "softmax"], "first": {"matmul": None}})
    assert inner(model.first) == ["softmax_0_output"]


def test_a_recipe_without_activations_leaves_products_of_activations_alone():
    model = build(recipe="int8-weight-only", operations="products")
    assert type(model.first) is Attention


def test_blocks_inside_have_the_operations_around_or_their_own():
    with qp.quantize_modules(operations="products"):
        model = nn.ModuleList([Attention()])
        with qp.quantize_modules(skip=["Conv2d"]):
            model.append(Attention())
        with qp.keep_float():
            model.append(Attention())
        with qp.quantize_modules(operations="softmax"):
            model.append(Attention(False))
            model.append(Attention())
    assert [inner(module) for module in model] == [FUSED, FUSED, [], ["softmax_0_output"], []]


def test_copies_of_what_was_built_are_seen_to():
    with qp.quantize_modules(operations="products"):
        model = nn.ModuleList(copy.deepcopy(Attention()) for _ in range(2))
    assert [inner(module) for module in model] == [FUSED, FUSED]


# --- what cannot be followed -------------------------------------------------------------------


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x.mT

    @staticmethod
    def backward(ctx, grad):
        return grad


class OfItsOwn(nn.Module):
    def forward(self, x):
        return Square.apply(x)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT


def exec_made():
    names = {"torch": torch, "__name__": "made"}
    exec("class Made(torch.nn.Module):\n    def forward(self, x):\n        return x @ x.mT", names)
    return names["Made"]()


def squared(x):
    return x @ x.mT


def run_by_others(function, x):
    return function(x)


made_a_lambda = lambda x: x @ x  # noqa: E731
custom = torch.library.custom_op(
    "quantpatch_tests::squared", squared, mutates_args=(), schema="(Tensor x) -> Tensor"
)


class Calling(nn.Module):
    """A forward that is an expression of ``x``."""

    def __init__(self):
        super().__init__()
        self.register_buffer("eye", torch.eye(4))


class Handed(Calling):
    def forward(self, x):
        return run_by_others(squared, x)


class ByLambda(Calling):
    def forward(self, x):
        return made_a_lambda(x)


class Compiled(Calling):
    def forward(self, x):
        return torch.ops.quantpatch_tests.squared(x)


class Sparse(Calling):
    def forward(self, x):
        return torch.sparse.mm(self.eye.to_sparse(), x)


def patched():
    layer = Calling()
    layer.forward = squared
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (OfItsOwn, "Square: an autograd.Function, which has a backward of its own"),
        (lambda: Holder(lambda x: x @ x), "self.function is <lambda>, which no other process finds"),
        (exec_made, "needs the source of Made.forward, which cannot be read"),
        (Handed, "squared: handed on to run_by_others, which may call it. Call it by its name"),
        (ByLambda, r"cannot read a lambda (<lambda>, line "),
        (Compiled, "torch.ops.quantpatch_tests.squared: compiled code"),
        (Sparse, "torch.sparse.mm: a product of sparse tensors, which no format takes"),
        (patched, "a forward of the object's own, not of its class"),
    ],
    ids=["autograd", "held lambda", "exec", "handed on", "lambda", "compiled", "sparse", "patched"],
)
def test_what_cannot_be_followed_is_named_and_strict_is_an_error(make, why):
    model = nn.Sequential(make(), nn.Linear(4, 4))
    conversion = qp.convert(model, operations="products")
    assert any(why in row.reason for row in conversion.skipped)
    model = nn.Sequential(make(), nn.Linear(4, 4))
    with pytest.raises(ConversionError, match="may multiply where it cannot be seen: 0 "):
        qp.convert(model, operations="products", strict=True)
    assert type(model[1]) is nn.Linear


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class Choosing(nn.Module):
    """Chooses which of its methods is its forward, as timm's FasterNet does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.forward = self.plainly

    def plainly(self, x):
        return self.fc(x)


def test_a_forward_of_an_objects_own_that_does_not_multiply_is_nothing_to_name():
    model = Choosing()
    assert not qp.convert(model, operations="products").skipped
    assert qp.audit(model, torch.randn(2, 4)).share == 1


def test_a_scripted_module_in_a_block_is_named_once():
    with qp.quantize_modules(operations="products") as block:
        model = nn.Sequential(
            torch.jit.script(nn.Sequential(Matmul(), nn.ReLU())), torch.jit.script(nn.ReLU())
        )
    (row,) = (row for row in block.skipped if "scripted" in row.reason)
    assert "a scripted module, whose code is fixed. Work on the module" in row.reason
    assert model(torch.randn(3, 4)).shape == (3, 3)


class Matmul(Calling):
    def forward(self, x):
        return x @ x.mT


class Spectrum(Calling):
    def forward(self, x):
        return torch.fft.fft(x) @ torch.fft.ifft(x).mT


class Whole(Calling):
    def forward(self, x):
        return x.long() @ x.long().mT + x.long()[:, :1]


class Graph(Calling):
    def forward(self, x):
        return (self.eye.to_sparse() @ x.mT).mT


@pytest.mark.parametrize(
    ("cls", "what"), [(Spectrum, "complex64"), (Whole, "int64"), (Graph, "sparse_coo")], ids=lambda v: str(v)
)
def test_operands_that_no_format_takes_stay_and_are_reported(cls, what):
    model, x = cls(), torch.randn(3, 4)
    expected = model(x)
    qp.convert(model, operations=["matmul", "add"])
    with pytest.warns(
        QuantPatchWarning, match=f"matmul_0 multiplies tensors of {what}, which no format takes"
    ):
        got = model(x)
    assert got.is_floating_point() or torch.equal(got, expected)
    qp.revert(model)
    qp.convert(model, operations={"*": "products", cls.__name__: {"matmul": None}})
    model(x)  # no warning


class InThreads(Calling):
    def forward(self, x):
        results = []
        thread = threading.Thread(target=collect, args=(x, results))
        thread.start()
        thread.join()
        with futures.ThreadPoolExecutor(1) as pool:
            results.append(pool.submit(squared, x).result())
        return sum(results) + checkpoint(squared, x, use_reentrant=False)


def collect(x, results):
    results.append(x @ x.mT)


def test_functions_that_threads_and_checkpoints_run_are_followed():
    model, x = InThreads(), torch.randn(3, 4)
    expected = model(x)
    assert not qp.convert(model, operations="products").skipped
    assert len(inner(model)) == 6
    qp.calibrate(model, [x], progress=False)  # each of them sees data
    torch.testing.assert_close(model(x), expected, atol=0.2, rtol=0)
    for quantizer in model.quantizers().values():
        quantizer.disable()
    assert torch.equal(model(x), expected)


def test_a_function_that_is_scripted_is_read_from_its_python():
    class Calls(nn.Module):
        def forward(self, x):
            return scripted(x)

    model = Calls()
    qp.convert(model, operations="products")
    assert qp.audit(model, torch.randn(2, 3)).share == 1.0


# --- how it runs -------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated. Methods on autograd:DeprecationWarning"  # torch.compile's
)
def test_it_compiles_and_exports_in_one_graph():
    torch.manual_seed(0)
    model, x = build(operations="products"), torch.randn(2, 5, 8)
    qp.calibrate(model, [x])
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_gradients_and_checkpointing_are_as_without():
    torch.manual_seed(0)
    model, x = build(operations="products").train(), torch.randn(2, 5, 8, requires_grad=True)
    qp.calibrate(model, [x.detach()])
    (direct,) = torch.autograd.grad(model(x).sum(), x)
    (again,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), x)
    assert torch.equal(direct, again)
    assert direct.abs().sum() > 0


def test_several_threads_run_one_model_at_once():
    torch.manual_seed(0)
    model, inputs = build(operations="products"), torch.randn(8, 2, 5, 8)
    qp.calibrate(model, list(inputs), progress=False)
    expected = [model(x) for x in inputs]
    with futures.ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(model, inputs), expected))


def test_threads_and_what_is_outside_see_float_classes():
    build(operations="products")
    assert type(Net().first) is Attention
    seen = []
    thread = threading.Thread(target=lambda: seen.append(type(Net().first)))
    with qp.quantize_modules(operations="products"):
        thread.start()
        thread.join()
    assert seen == [Attention]


def test_a_block_goes_by_the_name_of_its_float_class():
    model = build(operations="products")
    assert type(model.first).__name__ == "Attention"
    assert isinstance(model.first, Attention)


def test_a_file_gives_a_float_model_its_operations_and_their_ranges(tmp_path):
    torch.manual_seed(0)
    model, x = build(operations={"*": "products", "second": None}), torch.randn(2, 5, 8)
    qp.calibrate(model, [x])
    qp.save(model, tmp_path / "net.safetensors")
    for made in (Net().eval(), build(), build(operations="products"), build(operations=["add", "matmul"])):
        loaded = qp.load(made, tmp_path / "net.safetensors")
        assert operands(loaded) == operands(model)
        assert torch.equal(loaded(x), model(x))
        qp.revert(loaded)
        assert {type(module) for module in loaded.modules()} == {Net, Attention, nn.Linear}


def test_rules_may_be_for_a_model_that_a_file_gives_its_operations_alone(tmp_path):
    model, rules = build(operations="products"), {"first": {"matmul": "int8"}, "second": ["attention"]}
    qp.save(model, tmp_path / "net.safetensors")
    with qp.quantize_modules(operations=rules):
        loaded = qp.load(Net(), tmp_path / "net.safetensors")
    assert operands(loaded) == operands(model)
    with pytest.raises(ArgumentError, match="'third'"), qp.quantize_modules(operations={"third": "matmul"}):
        qp.load(Net(), tmp_path / "net.safetensors")


def known_keywords_alone(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name in ("x", "weight")}
        return function(*args, **kwargs)

    return wrapped


@known_keywords_alone
def sifted(x, weight):
    return x @ weight.mT


class CallsSifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return sifted(x, weight=self.weight) @ self.weight


class Counting:
    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.__wrapped__(*args, **kwargs)


@Counting
def counted(x, weight):
    return x @ weight.mT


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_a_decorator_may_sift_keywords():
    model, other = (nn.Sequential(CallsSifted()) for _ in range(2))
    x = torch.randn(3, 4)
    for each in (model, other):
        assert not qp.convert(each, operations="products").skipped
        qp.calibrate(each, [x], progress=False)  # each quantizer sees data
        assert qp.audit(each, x).share == 1
        assert len(each[0].quantizers()) == 4
    expected = model(x)
    torch.testing.assert_close(expected, x, atol=0.05, rtol=0)
    for quantizer in other[0].quantizers().values():  # of one layer alone
        quantizer.disable()
    assert not torch.equal(other(x), expected)
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)


def test_a_decorator_that_makes_an_object_is_named_and_its_function_runs_with_it():
    class CallsCounted(CallsSifted):
        def forward(self, x):
            return counted(x, self.weight) @ self.weight

    model = nn.Sequential(CallsCounted())
    conversion = qp.convert(model, operations="products")
    why = "counted: a decorator made an object of counted: Counting"
    assert any(why in row.reason for row in conversion.skipped)
    before = counted.calls
    model(torch.randn(3, 4))
    assert counted.calls == before + 1
    assert len(model[0].quantizers()) == 2
