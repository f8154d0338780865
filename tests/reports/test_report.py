"""What all reports have in common."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
from rich.console import Console

from quantpatch.reports.report import CalibrationReport, ChangeReport, Report, table_of
from quantpatch.reports.summary import QuantizerRow, Summary


@attrs.frozen
class Found(Report):
    path: Path
    ratio: float
    skipped: dict[str, str]

    def __str__(self) -> str:
        return f"{self.path}: {self.ratio}"


FOUND = Found(Path("file"), math.inf, {"a": "no data"})


def test_json_has_every_field_and_null_for_what_is_not_a_finite_number() -> None:
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


@attrs.frozen
class Row:
    name: str
    noise: dict[str, float]


@attrs.frozen
class Measured(Report):
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return "measured"


def test_a_table_for_pandas_has_a_dictionary_for_each_row() -> None:
    report = Measured((Row("a", {"int8": 0.5, "int4": math.nan}), Row("b", {"int8": 1.0})))
    assert report.to_dicts() == [
        {"name": "a", "noise.int8": 0.5, "noise.int4": None},
        {"name": "b", "noise.int8": 1.0},
    ]


def test_of_several_kinds_of_rows_each_says_which_it_is() -> None:
    assert ChangeReport("Net", {"head": "int4"}, {"stem": "int8"}).to_dicts() == [
        {"outcome": "changed", "name": "head", "detail": "int4"},
        {"outcome": "skipped", "name": "stem", "detail": "int8"},
    ]
    report = CalibrationReport("Net", ("a",), {"b": "saw no data"})
    assert report.to_dicts() == [
        {"outcome": "calibrated", "name": "a"},
        {"outcome": "skipped", "name": "b", "detail": "saw no data"},
    ]


def test_a_report_without_rows_is_one_dictionary() -> None:
    assert FOUND.to_dicts() == [{"path": Path("file"), "ratio": None, "skipped.a": "no data"}]


def test_a_notebook_shows_a_table_with_names_escaped() -> None:
    html = ChangeReport("<script>", {"a[0].<b>": "int4"}, {})._repr_html_()
    assert html.startswith("<pre")
    assert "&lt;script&gt;: 1 changed" in html
    assert "a[0].&lt;b&gt;" in html
    assert "<script>" not in html


def test_a_notebook_shows_thousands_of_alike_rows_as_one() -> None:
    rows = tuple(
        QuantizerRow(f"blocks.{n}.input_quantizer", "QuantLinear", "int8", 8, (), 1, 0.5, 1.0, "calibrated")
        for n in range(10_000)
    )
    report = Summary("Net", rows, ())
    html = report._repr_html_()
    assert "blocks.*.input_quantizer (10000)" in html
    assert len(html) < 10_000
    assert len(report.to_dicts()) == 10_000


def test_every_report_says_how_it_prints() -> None:
    import quantpatch.cli.demo

    reports = [cls for cls in Report.__subclasses__() if cls not in (Found, Measured)]
    assert quantpatch.cli.demo.DemoReport in reports
    own = [{"__rich__", "__str__"} & set(vars(cls)) for cls in reports]
    assert [cls.__name__ for cls, ways in zip(reports, own, strict=True) if len(ways) != 1] == []


def test_many_names_of_alike_blocks_are_one():
    names = [f"blocks.{n}.attn.input_quantizer" for n in range(12)]
    text = str(CalibrationReport("Net", (*names, "head.input_quantizer")))
    assert "blocks.*.attn.input_quantizer (12), head.input_quantizer" in text
    assert "blocks.0.attn.input_quantizer, blocks.1." in str(CalibrationReport("Net", tuple(names[:3])))
