"""Reasons are values; each is printed as one sentence."""

from __future__ import annotations

import pytest

from quantpatch import Entry
from quantpatch.errors import EntryConflictError
from quantpatch.layers.subclass import CannotCombine, OwnInit, OwnMembers, WrittenOtherwise
from quantpatch.quantize import reasons

ENTRY = Entry("far.away", "Layer", "far.quant:QuantLayer", plugin="p")


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (reasons.KeptFloat(), "keep_float()"),
        (reasons.SkippedBy("Lin*"), "skip='Lin*'"),
        (reasons.SkippedBy("Linear", lazily=True), "skip='Linear', which it becomes"),
        (reasons.NotByDefault(("A", "B")), "not replaced by default; write include=['A', 'B']"),
        (
            reasons.NameTaken(ENTRY, "far.inside.Layer"),
            "it has taken the name far.away.Layer, but plugin 'p' replaces far.inside.Layer",
        ),
        (
            reasons.FloatBase("torch.nn.Linear", reasons.SkippedBy("Linear")),
            "a subclass of torch.nn.Linear, which stays float: skip='Linear'",
        ),
        (
            reasons.SubclassOf("torch.nn.Linear", OwnMembers(("forward", "out_size"))),
            "a subclass of torch.nn.Linear with a forward and an out_size of its own, for which there is no "
            "entry",
        ),
        (
            reasons.BuiltDirectly(OwnInit()),
            "built by an __init__ saved or wrapped by other code; it is a class whose replacement has an "
            "__init__ of its own, which makes new layers only",
        ),
        (reasons.BuiltDirectly(WrittenOtherwise()), "whose replacement is not a QuantizedLayer of it"),
        (reasons.SubclassOf("a.B", CannotCombine("TypeError: no")), "with its replacement (TypeError: no)"),
        (
            reasons.IsPart("a.B"),
            "it is a part of another layer, a.B, which multiplies with its weights",
        ),
    ],
)
def test_each_reason_says_what_it_is_about(reason, text) -> None:
    assert text in str(reason)


def test_a_conflict_is_the_error_that_a_block_raises() -> None:
    conflict = reasons.Conflict((ENTRY, Entry("far.away", "Layer", "other:Quant", plugin="q")))
    error = conflict.error()
    assert isinstance(error, EntryConflictError)
    assert (error.target, error.plugins) == ("far.away.Layer", ("p", "q"))
    assert "2 plugins replace far.away.Layer: 'p' by far.quant:QuantLayer; 'q' by other:Quant" in str(error)
    assert all(way in str(error) for way in conflict.ways)
