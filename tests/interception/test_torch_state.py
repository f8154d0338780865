"""The comparison that everything else relies on: it sees each kind of change, and can take it back."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import nn

from quantpatch.interception.torch_state import ABSENT, Snapshot, owners

CHANGES = {
    "a class under another's name": (nn, "Linear", nn.Identity),
    "a method": (nn.Linear, "forward", lambda self, x: x),
    "a method where there was none": (nn.Linear, "half", lambda self: self),
    "a function": (nn.functional, "linear", print),
    "a new name": (torch, "shiny", 1),
    "an operator of tensors": (torch.Tensor, "__matmul__", print),
    "the base of all": (nn.Module, "__call__", print),
    "an attribute that is gone": (nn.Linear, "reset_parameters", ABSENT),
    "a module that is not torch's": (torch, "shiny", types.ModuleType("shiny")),
}


def test_every_layer_and_the_bases_are_looked_at():
    assert len(owners()) > 150
    assert {nn.Module, nn.Linear, nn.LSTM, nn.MultiheadAttention, torch.Tensor, nn, torch} <= set(owners())


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_seen_named_and_undone(case):
    owner, name, new = CHANGES[case]
    before = Snapshot()
    assert before.differences() == []
    old = vars(owner).get(name, ABSENT)
    order = list(vars(owner))
    if new is ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, new)
    try:
        (change,) = before.changes()
        assert (change.owner, change.name) == (owner, name)
        assert change.old is old
        assert change.new is new
        assert f"{owner.__name__.rpartition('.')[2]}.{name}: " in str(change)
    finally:
        change.undo()
    assert vars(owner).get(name, ABSENT) is old
    if new is not ABSENT:
        assert before.differences() == []
        return
    assert "the order" in before.differences()[0]  # a class cannot be given the old order
    rest = {key: vars(owner)[key] for key in order[order.index(name) + 1 :]}
    for key, value in rest.items():
        delattr(owner, key)
        setattr(owner, key, value)
    assert before.differences() == []


def test_what_python_and_torch_add_in_use_is_not_a_change(monkeypatch):
    before = Snapshot()
    module = types.ModuleType("torch.made_up")
    monkeypatch.setitem(sys.modules, "torch.made_up", module)
    monkeypatch.setattr(torch, "made_up", module, raising=False)
    copy.copy(nn.Linear(1, 1))
    assert before.differences() == []


def test_an_import_hook_is_a_difference_but_no_change_of_torch(monkeypatch):
    before = Snapshot()
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, object()])
    assert before.changes() == []
    assert "sys.meta_path" in before.differences()[0]
