"""The pictures of a page."""

from __future__ import annotations

import re

import pytest

from quantpatch.page import charts


@pytest.fixture(autouse=True)
def _extra():
    pytest.importorskip("vl_convert")


def said_in(svg):
    return [part.partition('"')[0] for part in svg.split('aria-label="') if "multiply-accumulates, " in part]


def test_a_treemap_joins_layers_by_module_where_they_are_too_many_to_be_seen():
    cells = [(f"stage.{n % 50}.block.{n}", "float" if n < 50 else "int8", 10) for n in range(1000)]
    said = said_in(charts.treemap(cells))
    assert len(said) == 100
    assert "stage.7.block: 190 multiply-accumulates, 1.9%, int8" in said
    assert "stage.7.block: 10 multiply-accumulates, 0.1%, float" in said


def test_a_treemap_of_many_layers_beside_each_other_names_the_largest():
    said = said_in(charts.treemap([(str(n), "int8", 1000 - n) for n in range(1000)]))
    assert len(said) == 401
    assert "399: 601 multiply-accumulates, 0.1%, int8" in said
    assert f"(smaller ones): {sum(range(1, 601)):,} multiply-accumulates, 36.0%, int8" in said


def test_labels_are_light_on_dark_colours_and_dark_on_light_ones():
    svg = charts.treemap([("dark", "int8", 10), ("light", "int4", 10), ("none", "float", 10)])
    fills = {name: re.search(rf'fill="(\S+)"[^>]*>{name}<', svg)[1] for name in ("dark", "light", "none")}
    assert fills == {"dark": "#fff", "light": "#111", "none": "#fff"}
