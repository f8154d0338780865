"""Reports on a narrow terminal: nothing is wider than it, names break at dots, alike blocks are one row."""

from __future__ import annotations

import json
import re

import pytest
import torch
from rich.cells import cell_len
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import quantpatch as qp
from quantpatch.cli.main import app
from quantpatch.reports.folding import folded_name, folded_names
from quantpatch.reports.render import table_lines, width_of, wrapped


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(query, key, value))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), Attention(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vision(nn.Module):
    def __init__(self, dim=8, depth=12):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 4)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def model():
    with qp.quantize_modules():
        made = Vision().eval()
    qp.calibrate(made, [torch.randn(1, 3, 8, 8)], progress=False)
    made.blocks[5].attn.proj.weight_quantizer.disable()
    return made


@pytest.fixture(params=[80, 60])
def width(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def without_code(text):
    return text.partition("\nimport quantpatch\n")[0].splitlines()


def test_a_summary_fits_and_folds_blocks_that_are_alike(model, width):
    report = qp.summary(model)
    lines = str(report).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len(lines) < 60
    text = re.sub(r"\s+", " ", str(report))
    assert "Vision: 100 quantizers" in text
    assert "blocks.*.attn.qkv.input_quantizer (12)" in text
    # What differs from the others is not among them.
    assert "blocks.*.attn.proj.weight_quantizer (11)" in text
    assert "blocks.5.attn.proj.weight_quantizer QuantLinear" in text
    assert "99 calibrated; 1 disabled; without quantizers: 24 LayerNorm" in text
    assert len(json.loads(report.to_json())["rows"]) == len(report.rows) == 100


def test_a_folded_range_spans_those_of_all(model, width):
    named = {row.name: row for row in qp.summary(model).rows}
    those = [named[f"blocks.{n}.attn.qkv.input_quantizer"].amax_max for n in range(12)]
    text = re.sub(r"\s+", " ", str(qp.summary(model)))
    assert f"amax {min(those):.4g} .. {max(those):.4g}" in text.partition("qkv.input_quantizer (12)")[2]


def test_an_audit_fits_and_adds_up_what_is_alike(model, width):
    report = qp.audit(model, torch.randn(1, 3, 8, 8))
    lines = without_code(str(report))
    assert max(map(cell_len, lines)) <= width
    text = re.sub(r"\s+", " ", " ".join(lines))
    macs = sum(row.macs for row in report.rows if row.module.endswith("attn.qkv"))
    assert f"blocks.*.attn.qkv (12) QuantLinear; matrix product; calls 12; MACs {macs:,}" in text
    assert "blocks.5.attn.proj QuantLinear" in text
    assert "blocks.*.attn.proj (11)" in text
    assert len(json.loads(report.to_json())["rows"]) == len(report.rows) > 60


def test_code_to_paste_is_not_broken(model, width):
    report = qp.audit(model, torch.randn(1, 3, 8, 8))
    code = report.to_paste
    assert code in str(report)


def test_unreached_quantizers_are_folded_too(model, width):
    class Skipping(Vision):
        def forward(self, x):
            return self.head(self.patch_embed(x).mean((2, 3)))

    with qp.quantize_modules():
        made = Skipping().eval()
    report = qp.audit(made, torch.randn(1, 3, 8, 8))
    assert len(report.unreached) == 96
    assert "through:blocks.*.attn.qkv.input_quantizer(12)," in re.sub(r"\s+", "", str(report))


def test_without_a_terminal_every_name_is_there(model):
    report = qp.summary(model)
    assert all(row.name in str(report) for row in report.rows)


@pytest.mark.parametrize("command", [["layers"], ["plugins"], ["explain", "torch.nn.Linear"]])
def test_commands_fit(command, width):
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert max(map(cell_len, result.output.splitlines())) <= width


def test_layers_that_are_replaced_alike_are_one_row_and_all_are_named(width):
    shown = CliRunner().invoke(app, ["layers"], catch_exceptions=False).output
    rows = json.loads(CliRunner().invoke(app, ["layers", "--json"], catch_exceptions=False).output)
    assert len(shown.splitlines()) < len(rows)
    words = set(re.split(r"[\s,:;.]+", shown))
    assert {row["target"].rpartition(".")[2] for row in rows} <= words
    assert {row["plugin"].rpartition(".")[2] for row in rows} <= words


def test_names_break_after_dots_and_words_at_spaces():
    assert wrapped("blocks.0.attn.qkv.weight_quantizer", 20) == ["blocks.0.attn.qkv.", "weight_quantizer"]
    assert wrapped("a cat sat down", 6) == ["a cat", "sat", "down"]
    assert wrapped("0.1234 .. 0.5678", 9) == ["0.1234 ..", "0.5678"]
    assert wrapped("abcdefgh", 3) == ["abc", "def", "gh"]
    assert wrapped("one\ntwo", 10) == ["one", "two"]
    assert wrapped("", 10) == [""]


def table(name):
    made = Table(title="A title", caption="a caption")
    made.add_column("name", overflow="fold")
    made.add_column("loss", justify="right")
    made.add_column("why not")
    made.add_row(name, "1.5", "")
    made.add_row("b", "-", "it is not there")
    return made


def test_columns_stay_where_they_fit_and_are_stacked_where_not():
    assert list(table_lines(table("layer.one"), 32)) == [
        "A title",
        "name       loss  why not",
        "────────────────────────────────",
        "layer.one   1.5",
        "b             -  it is not there",
        "",
        "a caption",
    ]
    assert list(table_lines(table("layer.one"), 24))[3:7] == [
        "layer.   1.5",
        "one",
        "b          -  it is not",
        "              there",
    ]
    assert list(table_lines(table("layer." * 8), 22)) == [
        "A title",
        "layer.layer.layer.",
        "layer.layer.layer.",
        "layer.layer.",
        "    loss 1.5",
        "b",
        "    why not it is not",
        "    there",
        "",
        "a caption",
    ]


def test_a_table_without_a_width_is_as_wide_as_its_cells_and_sections_have_a_rule_between_them():
    made = Table()
    made.add_column("層")
    made.add_column("n", justify="right")
    made.add_row("a cat", "1", end_section=True)
    made.add_row("two\nlines", "10", end_section=True)
    lines = list(table_lines(made, None))
    assert lines == ["層      n", "─" * 9, "a cat   1", "─" * 9, "two    10", "lines"]
    assert width_of(made) >= 9
    assert list(table_lines(Table(title="no columns"), 40)) == ["no columns"]
    assert list(table_lines(Table("a", "b"), 40)) == ["a  b", "────"]


def test_names_that_differ_in_numbers_alone_become_one():
    assert folded_name(["a.0.b"]) == "a.0.b"
    assert folded_name(["a.0.b", "a.10.b"]) == "a.*.b (2)"
    assert folded_names(["a.0.b", "c", "a.1.b", "a.1.c"]) == ["a.*.b (2)", "c", "a.1.c"]
