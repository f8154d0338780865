"""Neighbours that may exchange scales are found from what a model computes, and float outputs stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantpatch as qp
from quantpatch.dataflow import dataflow
from quantpatch.tuning.exchanges import exchanges


class Net(nn.Module):
    """Layers, called by a function."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class RMSNorm(nn.Module):
    """As language models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def attention(net: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).view(2, 5, 2, 4).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8))


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


X = torch.randn(2, 5, 8)
IMAGE = torch.randn(2, 3, 8, 8)
FOUND: dict[str, tuple[Net, Tensor, set[str], set[str]]] = {
    "a norm before several": (
        Net(lambda n, x: n.a(y := n.norm(x)) + n.b(y), norm=nn.LayerNorm(8), a=linear(), b=linear()),
        X, {"norm.weight", "norm.bias"}, {"a.weight", "b.weight"},
    ),
    "a norm of the user's own": (
        Net(lambda n, x: n.a(n.norm(x)), norm=RMSNorm(), a=linear()), X, {"norm.weight"}, {"a.weight"},
    ),
    "values of attention": (
        Net(attention, q=linear(), k=linear(), v=linear(), o=linear()),
        X, {"v.weight", "v.bias"}, {"o.weight"},
    ),
    "a gate": (
        Net(lambda n, x: n.down(F.silu(n.gate(x)) * n.up(x)), gate=linear(), up=linear(), down=linear()),
        X, {"up.weight", "up.bias"}, {"down.weight"},
    ),
    "convolutions": (
        Net(
            lambda n, x: n.c(F.max_pool2d(F.relu(n.b(F.relu(n.a(x)))), 2)),
            a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 6, 3, groups=6), c=nn.ConvTranspose2d(6, 4, 2, groups=2),
        ),
        IMAGE, {"b.weight", "b.bias"}, {"c.weight"},
    ),
    "both sides of an addition": (
        Net(lambda n, x: n.c(F.relu(n.a(x) + n.b(x))), a=linear(), b=linear(), c=linear()),
        X, {"a.weight", "a.bias", "b.weight", "b.bias"}, {"c.weight"},
    ),
}  # fmt: skip


def found_in(net: Net, x: Tensor) -> Any:
    weights = [name for name, p in net.named_parameters() if p.dim() > 1]
    return exchanges(net, dataflow(net, lambda: net(x)), weights)


@pytest.mark.parametrize("case", FOUND)
def test_what_makes_the_channels_and_what_uses_them_is_found(case: str) -> None:
    net, x, made_by, used_by = FOUND[case]
    found, _ = found_in(net, x)
    exchange = found[-1]
    assert {channels.parameter for channels in exchange.made_by} == made_by
    assert {channels.parameter for channels in exchange.used_by} == used_by


@pytest.mark.parametrize("case", FOUND)
def test_a_factor_for_each_channel_leaves_the_output_as_it_was(case: str) -> None:
    net, x, *_ = FOUND[case]
    before = net(x)
    parameters = dict(net.named_parameters())
    found, _ = found_in(net, x)
    assert found
    with torch.no_grad():
        for exchange in found:
            count = exchange.used_by[0].count(parameters[exchange.used_by[0].parameter])
            factor = torch.rand(count) + 0.5
            for channels in (*exchange.made_by, *exchange.used_by):
                parameter = parameters[channels.parameter]
                parameter.copy_(channels.scaled(parameter, factor if channels.is_input else 1 / factor))
    torch.testing.assert_close(net(x), before, atol=1e-5, rtol=1e-4)


WHY: dict[str, tuple[Net, str]] = {
    "a residual": (Net(lambda n, x: n.a(x) + x, a=linear()), "is an input or a constant of the model"),
    "a post-norm": (
        Net(lambda n, x: n.norm((y := n.norm(x)) + n.a(y)), norm=nn.LayerNorm(8), a=linear()),
        "is used by aten::native_layer_norm",
    ),
    "what is not linear": (
        Net(lambda n, x: n.b(F.gelu(n.a(x))), a=linear(), b=linear()), "is made by aten::gelu",
    ),
    "a norm without a weight": (
        Net(lambda n, x: n.a(n.norm(x)), norm=nn.LayerNorm(8, elementwise_affine=False), a=linear()),
        "is made by aten::native_layer_norm, which has no weight",
    ),
    "a layer that is used twice": (
        Net(lambda n, x: n.b(F.relu(n.a(F.relu(n.a(x))))), a=linear(), b=linear()),
        "a.weight, which is used 2 times",
    ),
    "an output": (
        Net(lambda n, x: (y := n.a(x), n.b(y)), a=linear(), b=linear()), "is an output of the model",
    ),
    "a square": (Net(lambda n, x: n.b((y := n.a(x)) * y), a=linear(), b=linear()), "is squared"),
    "another number of channels": (
        Net(lambda n, x: n.b(n.a(x).flatten(1)), a=linear(), b=nn.Linear(40, 3)), "other numbers of channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WHY)
def test_what_takes_no_factor_has_a_reason(case: str) -> None:
    net, why = WHY[case]
    _, skipped = found_in(net, X)
    assert any(why in str(reason) for reason in skipped.values()), skipped


def test_what_a_model_does_to_its_weights_beside_is_seen_by_comparing_and_undone() -> None:
    """The norm's weight is read past torch's operators, which is in no graph."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.a(net.norm(x)) + float(net.norm.weight.detach().numpy().sum())

    net = Net(forward, norm=nn.LayerNorm(8), a=linear())
    qp.convert(net, "int8")
    before = {name: p.clone() for name, p in net.named_parameters()}
    report = qp.tune(net, [torch.randn(4, 8)], method="smoothquant", alpha=0.9)
    assert report.tuned == {}
    assert "undone" in str(report.skipped["a.weight"])
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
