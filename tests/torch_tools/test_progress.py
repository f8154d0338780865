"""What long work shows of itself: on terminals and in notebooks, and nothing in logs."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

import quantpatch as qp
from quantpatch.reports import ChangeReport
from quantpatch.torch_tools import notebooks, progress
from quantpatch.torch_tools.progress import Bar, progress_bar, progress_over


def on(monkeypatch, *, terminal):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    return stream


@pytest.mark.parametrize(("terminal", "wanted"), [(True, True), (True, False), (False, True)])
def test_a_bar_with_an_estimate_is_shown_on_a_terminal_alone(terminal, wanted, monkeypatch):
    stream = on(monkeypatch, terminal=terminal)
    with progress_over([1, 2, 3], "Counting", progress=wanted) as each:
        assert list(each) == [1, 2, 3]
    if terminal and wanted:
        assert "Counting" in stream.getvalue()
        assert "0:00:00" in stream.getvalue()
        assert "100%" in stream.getvalue()
    else:
        assert stream.getvalue() == ""


def test_items_are_handed_on_one_by_one(monkeypatch):
    on(monkeypatch, terminal=True)
    made = []

    def items():
        for n in range(3):
            made.append(n)
            yield n

    with progress_over(items(), "Counting", progress=True) as each:
        for n in each:
            assert made[-1] == n


def test_steps_are_named_as_they_are_and_not_taken_for_markup(monkeypatch):
    stream = on(monkeypatch, terminal=True)
    with progress_bar("model[0].onnx", 2, progress=True) as bar:
        bar.step("tracing [red]Net[/red]")
        bar.step("checking")
        assert bar.total == 2
        bar.total = 3
        assert bar.total == 3
    assert "model[0].onnx: checking" in stream.getvalue()


@pytest.fixture
def notebook(monkeypatch):
    """What a cell of a notebook was given to show, from the first display to the last."""
    shown = []
    display = SimpleNamespace(
        HTML=lambda text: text,
        display=lambda html, display_id: shown.append(html) or SimpleNamespace(update=shown.append),
    )
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    return shown


def test_in_a_notebook_one_display_is_updated_and_empty_afterwards(notebook, capsys):
    with progress_over(["<a>", "b"], "Counting <i>", progress=True) as each:
        assert list(each) == ["<a>", "b"]
    assert len(notebook) == 4
    assert "Counting &lt;i&gt;" in notebook[0]
    assert "100%" in notebook[2]
    assert notebook[-1] == ""
    assert capsys.readouterr() == ("", "")


def test_what_is_raised_in_a_notebook_takes_the_display_away(notebook):
    with pytest.raises(KeyError), progress_bar("Counting", progress=True):
        raise KeyError
    assert notebook[-1] == ""


def test_a_notebook_shows_it_only_if_that_is_wanted(notebook):
    with progress_bar("Counting", 3, progress=False) as bar:
        bar.step("one")
        bar.advance()
    assert type(bar) is Bar
    assert notebook == []


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("Calibrating", lambda model: qp.calibrate(model, [torch.randn(2, 4)], existing="overwrite")),
        ("Sensitivity", lambda model: qp.sensitivity(model, lambda m: 0.5)),
        ("Searching", lambda model: qp.search(model, data=torch.randn(2, 4), candidates=["int8", None])),
        ("Finding ranges", lambda model: qp.search(model, data=torch.randn(2, 4), candidates=["int8", None])),
    ],
)
def test_all_long_work_shows_itself_in_one_way(name, run, notebook):
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(4, 4))
    run(model)
    assert any(name in html for html in notebook)


def test_a_table_in_html_has_its_names_escaped():
    table = notebooks.as_html(ChangeReport("<b>Net</b>", {"[red]a": "int8"}, {}))
    assert "&lt;b&gt;Net&lt;/b&gt;" in table
    assert "[red]a" in table
    assert "<b>" not in table
