"""What all reports have in common."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
from rich.console import Console

from quantpatch.report.report import ChangeReport, Report, table_of


@attrs.frozen
class Found(Report):
    path: Path
    ratio: float
    skipped: dict[str, str]

    def __str__(self) -> str:
        return f"{self.path}: {self.ratio}"


FOUND = Found(Path("file"), math.inf, {"a": "no data"})


def test_json_has_every_field_and_null_for_what_is_no_finite_number() -> None:
    assert json.loads(FOUND.to_json()) == {"path": "file", "ratio": None, "skipped": {"a": "no data"}}


def test_rich_prints_what_str_says_where_there_is_no_table() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(FOUND)
    assert captured.get().strip() == str(FOUND) == "file: inf"


def test_columns_of_numbers_are_set_to_the_right() -> None:
    table = table_of("name", "count", right=("count",), title="Things")
    assert [column.justify for column in table.columns] == ["left", "right"]


def test_changes_print_a_line_for_each_outcome_with_a_count_and_the_first_names() -> None:
    many = {f"layer{n}": "float" for n in range(12)}
    report = ChangeReport("Net", many | {"head": "int4"}, {"stem": "int8"})
    lines = [line.split() for line in str(report).splitlines()]
    assert lines[0] == ["Net:", "13", "changed"]
    assert lines[3][:3] == ["now", "float", "12"]
    text = " ".join(str(report).split())
    assert "layer9 and 2 more" in text
    assert "now int4 1 head" in text
    assert "still int8 1 stem" in text
    assert json.loads(report.to_json()) == {
        "model": "Net",
        "changed": dict(report.changed),
        "skipped": {"stem": "int8"},
    }


def test_every_report_says_how_it_prints() -> None:
    import quantpatch.cli.demo

    reports = [cls for cls in Report.__subclasses__() if cls is not Found]
    assert quantpatch.cli.demo.DemoReport in reports
    own = [{"__rich__", "__str__"} & set(vars(cls)) for cls in reports]
    assert [cls.__name__ for cls, ways in zip(reports, own, strict=True) if len(ways) != 1] == []
