"""The plugin's README: its Python runs and prints what the page shows; its figures are the audit's."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from architectures import MODELS

import quantpatch as qp

README = Path(__file__).resolve().parent.parent / "README.md"
GUIDE = README.parent.parent.parent / "docs" / "transformers.md"  # of quantpatch's pages, in its repository
CODE = re.compile(r"^```python\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def run_page(path, page, capsys):
    """Runs a page's Python in a module."""
    blocks = CODE.findall(path.read_text())
    assert blocks
    for code, shown in blocks:
        capsys.readouterr()
        exec(code, vars(page))
        if shown:
            assert capsys.readouterr().out == shown


@pytest.mark.skipif(not GUIDE.is_file(), reason="not a checkout")
def test_the_guide_to_transformers_models_runs_and_prints_what_it_shows(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_page(GUIDE, ModuleType("guide"), capsys)


# accelerate and the Trainer warn of what a CPU does not have.
@pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*no accelerator")
def test_every_python_block_runs_and_prints_what_the_page_shows(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", page)
    run_page(README, page, capsys)
    mine = vars(page)["mine"]
    with qp.quantize_modules(custom=[mine]) as scope:
        vars(page)["MyExperts"](MODELS["mixtral"].build().config)
    assert [row.replacement for row in scope.replaced if row.plugin is None] == ["readme.QuantMyExperts"]


def test_the_figures_of_the_table_are_those_of_the_audit():
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) % \| ([\d.]+) % \|$", README.read_text(), re.M)
    assert [name for name, *_ in rows] == list(MODELS)
    for name, *shares in rows:
        for share, operations in zip(shares, (None, "products"), strict=True):
            torch.manual_seed(0)
            model = MODELS[name].build().eval()
            qp.convert(model, operations=operations)
            assert share == f"{100 * qp.audit(model, kwargs=MODELS[name].inputs).share:.1f}", name
