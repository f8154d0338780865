"""Which layers of a search share a format."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantpatch as qp
from quantpatch.dataflow import dataflow
from quantpatch.errors import ArgumentError, ArgumentTypeError
from quantpatch.mixed_precision.layers import found_groups, given_groups, layers_of, pattern


def groups_of(model, x):
    qp.convert(model)
    return found_groups(dataflow(model, lambda: model(x)), layers_of(model))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        heads = (layer(x.reshape(-1, 4)).view(x.shape) for layer in (self.one, self.two, self.three))
        return x + self.last(F.scaled_dot_product_attention(*heads))


def test_layers_that_read_one_tensor_share_a_format_whatever_they_are_called():
    assert groups_of(Attention(), torch.randn(1, 2, 4)) == [("one", "two", "three"), ("last",)]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)
        self.short, self.head = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.norm(self.second(x.sigmoid())) + self.short(x)
        return x + self.head(x)


def test_layers_whose_results_an_addition_takes_share_a_format():
    """The last addition takes an earlier one's result, which is no layer's."""
    found = groups_of(Residual().eval(), torch.randn(1, 2, 3, 3))
    assert found == [("first",), ("second", "short"), ("head",)]


def test_layers_that_read_different_parts_of_one_tensor_do_not():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            left, right = x.chunk(2, -1)
            return torch.cat([self.left(left), self.right(right)])

    assert groups_of(Halves(), torch.randn(1, 4)) == [("left",), ("right",)]


def test_layers_that_share_a_weight_or_a_quantizer_share_a_format():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    model[2].weight = model[0].weight
    qp.convert(model)
    model[3].input_quantizer = model[1].input_quantizer
    found = found_groups(dataflow(model, lambda: model(torch.randn(1, 4))), layers_of(model))
    assert found == [("0", "2"), ("1", "3")]


def test_groups_may_be_given_by_names_and_globs():
    names = ["a.q", "a.k", "b.q", "b.k", "head"]
    assert given_groups([("a.*",), ["b.q", "b.k"]], names) == [("a.q", "a.k"), ("b.q", "b.k"), ("head",)]
    assert given_groups(["*.q"], names) == [("a.q", "b.q"), ("a.k",), ("b.k",), ("head",)]
    assert given_groups([], names) == [(name,) for name in names]


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([("a", "c")], "'c' matches no layer searched"),
        (["a", "*"], "'a' is in two groups"),
        ([(1,)], "1 matches no layer searched"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups, said):
    with pytest.raises(ArgumentError, match=said):
        given_groups(groups, ["a", "b"])


def test_groups_that_are_no_groups_are_refused():
    for wrong in ("a", {"a": "b"}, 3):
        with pytest.raises(ArgumentTypeError, match="expected groups of names"):
            given_groups(wrong, ["a"])


def test_the_pattern_of_a_layer_is_for_its_own_quantizers_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    qp.convert(model)
    model[0].inner = nn.Linear(2, 2)
    qp.convert(model[0].inner)
    qp.configure(model, {pattern("0", model[0]): None, pattern("1", model[1]): "int4"})
    disabled = {row.name for row in qp.summary(model).rows if row.state == "disabled"}
    assert disabled == {"0.input_quantizer", "0.weight_quantizer"}
    assert {row.bits for row in qp.summary(model).rows if row.name.startswith("1.")} == {4}
