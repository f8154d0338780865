"""Entries: what is replaced by what."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from quantpatch.errors import EntryError
from quantpatch.plugins.entry import Entry


def test_a_module_and_its_name_make_equal_entries() -> None:
    assert Entry(nn, "Linear", nn.Conv2d) == Entry("torch.nn", "Linear", nn.Conv2d)
    assert Entry.of((nn, "Linear", nn.Conv2d)).dotted == "torch.nn.Linear"
    assert str(Entry(nn, "Linear", nn.Conv2d)) == "torch.nn.Linear -> torch.nn.modules.conv:Conv2d"
    assert str(Entry(nn, "Linear", "a.b:C")) == "torch.nn.Linear -> a.b:C"


def test_an_entry_is_itself() -> None:
    entry = Entry("a.b", "C", "d:E", default=False)
    assert Entry.of(entry) is entry


@pytest.mark.parametrize(
    "given", [("a", "b", "c"), ("a", "b", ":c"), ("a", "b.c", "d:e"), ("", "b", "c:d"), ("a", "b"), 3, None]
)
def test_what_is_not_an_entry_says_what_to_write(given) -> None:
    with pytest.raises(
        EntryError, match=r"is not an entry: .*\(torch.nn, 'Linear', MyQuantLinear\)"
    ) as caught:
        Entry.of(given)
    assert caught.value.entry == given


def test_nothing_is_imported_before_the_replacement_is_asked_for(package) -> None:
    name = package(layers="class Q: pass")
    entry = Entry(f"{name}.layers", "X", f"{name}.layers:Q")
    assert entry.loaded_module() is None
    assert name not in sys.modules
    assert entry.load_replacement().__name__ == "Q"
    assert entry.loaded_module() is sys.modules[f"{name}.layers"]


def test_a_replacement_that_cannot_be_imported(package) -> None:
    name = package(broken="1 / 0")
    with pytest.raises(EntryError, match="cannot be imported: ZeroDivisionError"):
        Entry("a", "B", f"{name}.broken:Q").load_replacement()
    with pytest.raises(EntryError, match="has no 'Q'"):
        Entry("a", "B", f"{name}:Q").load_replacement()
