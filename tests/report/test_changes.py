"""The value that a function returns which changes a model."""

from __future__ import annotations

import json

from quantpatch.report.changes import ChangeReport


def test_it_prints_a_line_for_each_outcome_with_a_count_and_the_first_names() -> None:
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
