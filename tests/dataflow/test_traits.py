"""The table of what operators keep says what they do."""

from __future__ import annotations

import pytest
import torch

from quantpatch.dataflow import MOVING_NODES, PASSED_NODES, traits
from quantpatch.dataflow.traits import _TABLE

X = torch.arange(-8.0, 8.0).reshape(1, 1, 4, 4)
CALLS = {
    "permute": ([0, 1, 3, 2],),
    "transpose": (2, 3),
    "select": (2, 1),
    "slice": (2, 0, 2),
    "squeeze": (),
    "unsqueeze": (0,),
    "view": ([16],),
    "expand": ([2, 1, 4, 4],),
    "flip": ([2],),
    "roll": ([1], [2]),
    "repeat": ([2, 1, 1, 1],),
    "diagonal": (0, 2, 3),
    "tril": (),
    "triu": (),
    "max_pool2d": ([2, 2],),
    "reflection_pad2d": ([1, 1, 1, 1],),
    "upsample_nearest2d": ([8, 8],),
    "constant_pad_nd": ([1, 1],),
    "neg": (),
    "relu": (),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_keeps_the_grid_gives_values_of_its_argument_zeros_or_their_negatives(name: str) -> None:
    known = traits(f"aten::{name}")
    assert known.keeps_grid
    result = getattr(torch.ops.aten, name)(X, *CALLS[name])
    allowed = set(X.flatten().tolist())
    if not known.moves:
        allowed |= {0.0, *(-value for value in allowed)}
    assert set(result.flatten().tolist()) <= allowed
    if known.keeps_sign or known.never_negative:
        positive = getattr(torch.ops.aten, name)(X.abs(), *CALLS[name])
        assert positive.min() >= 0


@pytest.mark.parametrize("name", [name for name, row in _TABLE.items() if row.never_negative])
def test_what_is_never_negative_is_not(name: str) -> None:
    args = (3, False) if name == "_softmax" else ()
    assert getattr(torch.ops.aten, name)(X, *args).min() >= 0


def test_an_operator_in_place_is_known_as_the_other_is() -> None:
    assert traits("aten::relu_") == traits("aten::relu")
    assert traits("aten::squeeze_").moves
    assert traits("aten::sub") == traits("aten::sub_") == traits("mine::view")


def test_every_operator_of_the_table_is_one_of_torchs() -> None:
    assert [name for name in _TABLE if not hasattr(torch.ops.aten, name)] == []


def test_nodes_of_onnx() -> None:
    assert {"Transpose", "Reshape", "MaxPool", "Resize"} <= MOVING_NODES
    assert {"Relu", "Clip"} == PASSED_NODES - MOVING_NODES
