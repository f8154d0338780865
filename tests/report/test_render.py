"""Tables as text: what rich makes of them, and names that can be found."""

from __future__ import annotations

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from quantpatch.report import render
from quantpatch.report.render import as_percent, as_text


def table(
    *, rows=3, name="層.[b]x", title="A title", caption="a caption that is longer than the whole table is"
):
    made = Table(title=title, caption=caption)
    made.add_column("name", overflow="fold", min_width=9)
    made.add_column("loss", justify="right")
    for number in range(rows):
        made.add_row(name, Text(f"{number * 100}"), end_section=number in (0, rows - 1))
    return made


def by_rich(renderable, width=120):
    return render._by_rich(renderable, width)


@pytest.mark.parametrize(
    "made",
    [
        table(),
        table(rows=1),
        table(rows=0),
        table(title=None, caption=None),
        table(caption=Text("")),
        table(name="two\nlines"),
        table(name="word " * 40),
        Group(table(), "A sentence " * 20, table(rows=1), "", "the end"),
        Table(title="of no columns"),
    ],
)
def test_it_is_what_rich_makes_of_it(made):
    assert as_text(made) == by_rich(made)


def test_names_are_whole_where_there_is_no_terminal_or_the_table_is_long(monkeypatch):
    name = "layer." * 30
    short, long = table(name=name), table(name=name, rows=300)
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
