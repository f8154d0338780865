"""The code that the audit prints raises the share when it is pasted, for every kind of product."""

from __future__ import annotations

import importlib

import pytest
import torch

import quantpatch as qp

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
    "Addmm": "torch.addmm(x[0, :, :5], self.fc(x)[0], x[0].T)",
    "Addmv": "torch.addmv(x[0, :, 0], self.fc(x)[0], x[0, 0])",
    "Baddbmm": "torch.baddbmm(x[:, :, :5], self.fc(x), x.mT)",
    "Addbmm": "torch.addbmm(x[0, :, :5], self.fc(x), x.mT)",
    "Attention": "F.scaled_dot_product_attention(self.fc(x), x, x)",
    "Causal": "F.scaled_dot_product_attention(query=self.fc(x), key=x, value=x, is_causal=True)",
    "OwnLinear": "F.linear(self.fc(x).relu() + 1, self.weight)",
    "OwnLinearOfInput": "F.linear(x, self.weight)",
    "OwnMatmul": "(self.fc(x) + 1) @ self.weight",
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


def built(layers, name):
    with qp.quantize_modules():
        return getattr(layers, name)().eval()


def pasted(report, build):
    """The model that the code for a class gives, as it is printed."""
    ((_, code),) = report.to_paste
    assert code in str(report)
    namespace = {"build": build}
    exec(code.replace("...  # build the model here", "model = build()"), namespace)
    return namespace["model"].eval(), code


@pytest.mark.parametrize("name", FORWARDS)
def test_what_is_pasted_raises_the_share_and_disabled_computes_what_it_did(layers, name):
    x = torch.randn(2, 5, 8)
    before = built(layers, name)
    report = qp.audit(before, x)
    model, code = pasted(report, getattr(layers, name))
    assert isinstance(model, qp.QuantizedLayer)
    after = qp.audit(model, x)
    assert after.share > report.share

    assert after.share == 1.0 or "# Stays float: " in code
    model.load_state_dict(before.state_dict())
    for module in (*model.modules(), *before.modules()):
        if isinstance(module, qp.TensorQuantizer):
            module.disable()
    assert torch.equal(model(x), before(x))


def test_a_product_of_probabilities_that_stays_float_is_named_with_the_module_for_it(layers):
    ((_, code),) = qp.audit(built(layers, "Attention"), torch.randn(2, 5, 8)).to_paste
    # Which of the two torch runs depends on its version.
    named = ("matrix product (left)", "attention output (probabilities)")
    assert any(f"# Stays float: {product}." in code for product in named)
    assert "quantpatch.layers.ScaledDotProductAttention" in code


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("OwnLinear", {"weight": 0}),
        ("OwnMatmul", {"weight": 1}),
        ("EinsumOfWeight", {"weight": 0}),
        ("Experts", {"experts": (0, 2)}),
        ("Conv2d", {"kernel2": 0}),
        ("ConvTranspose1d", {"kernel1": 1}),
        ("HelperOfWeight", {"weight": 1}),
        ("Matmul", {}),
    ],
)
def test_only_the_weights_that_are_multiplied_are_declared_with_the_axis_of_their_outputs(
    layers, name, weights
):
    model, _ = pasted(qp.audit(built(layers, name), torch.randn(2, 5, 8)), getattr(layers, name))
    assert model.weights == weights


def test_trying_changes_nothing(layers):
    class Counting(layers.At):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.seen = []

        def forward(self, x):
            self.calls += 1
            self.seen.append(len(self.seen))
            x.add_(1)
            return super().forward(x) * torch.rand(())

    with qp.quantize_modules():
        model = Counting()
    x, random = torch.zeros(2, 5, 8), torch.get_rng_state()
    report = qp.audit(model, x)
    assert report.share < 1
    assert (model.calls, model.seen, x.unique().tolist()) == (1, [0], [1])
    assert type(model) is Counting
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)


class Hidden(torch.nn.Module):
    """What multiplies is no part of the code of its forward."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_where_no_code_helps_the_report_says_so_and_why():
    report = qp.audit(Hidden(lambda x: (x + 1) @ x.mT), torch.randn(2, 3))
    assert report.to_paste == ()
    ((name, why),) = report.no_code
    assert name.endswith("Hidden")
    assert "its forward names no function that multiplies float operands" in why
    assert "quantpatch.layers" in why
    assert f"Nothing covers {name}, and no replacement that was tried" in str(report)


def test_without_the_source_the_report_says_that_it_cannot_be_read():
    names = {"torch": torch, "__name__": "made"}
    exec(
        "class Made(torch.nn.Module):\n    def forward(self, x):\n        return (x + 1) @ x.mT",
        names,
    )
    ((_, why),) = qp.audit(names["Made"](), torch.randn(2, 3)).no_code
    assert "needs the source of Made.forward, which cannot be read" in why


def test_a_layer_that_fails_when_it_is_tried_is_reported():
    class Once(torch.nn.Module):
        ran = False

        def forward(self, x):
            if Once.ran:
                raise RuntimeError("once is enough")
            Once.ran = True
            return x @ x.mT

    ((_, why),) = qp.audit(Once(), torch.randn(2, 3)).no_code
    assert why == "trying a replacement failed (RuntimeError: once is enough)"
