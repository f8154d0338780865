"""Reports as text: tables as wide as there is room, and names that can be found."""

from __future__ import annotations

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from quantpatch.reports.render import as_percent, as_text


def table(name="layer.one", rows=2):
    made = Table(title="A title", caption="a caption")
    made.add_column("name")
    made.add_column("loss", justify="right")
    for number in range(rows):
        made.add_row(name, Text(f"{number * 100}"))
    return made


def test_parts_stand_one_below_another():
    code = Text("print(" + "x" * 200 + ")", no_wrap=True)
    made = Group(table(rows=1), Group("A sentence", Text("\nanother [b]")), code)
    assert as_text(made).splitlines() == [
        "A title",
        "name       loss",
        "───────────────",
        "layer.one     0",
        "",
        "a caption",
        "A sentence",
        "",
        "another [b]",
        code.plain,
    ]


def test_sentences_are_broken_where_the_terminal_ends(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    assert [len(line) for line in as_text("word " * 25).splitlines()] == [49, 49, 24]


def test_names_are_whole_where_there_is_no_terminal_or_the_table_is_long(monkeypatch):
    name = "layer." * 30
    short, long = table(name), table(name, rows=300)
    assert name in as_text(short, of_names=True)
    monkeypatch.setenv("COLUMNS", "110")
    assert name not in as_text(short, of_names=True)
    assert max(map(len, as_text(short, of_names=True).splitlines())) <= 110
    assert as_text(long, of_names=True).count(name) == 300


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "0.0%"), (1e-9, "<0.1%"), (0.5, "50.0%"), (1 - 1e-9, ">99.9%"), (1.0, "100.0%")],
)
def test_a_share_is_none_or_all_only_if_it_is(share, shown):
    assert as_percent(share) == shown
