"""What ``QUANTPATCH_TRACE`` tells."""

from __future__ import annotations

import re

import pytest
from torch import nn

from quantpatch import quantize_modules
from quantpatch.plugins.registry import Registry

SOURCE = """
import quantpatch
@quantpatch.hookimpl
def quantpatch_entries():
    return [("far.away", "Layer", "far.quant:QuantLayer")]
@quantpatch.hookimpl
def quantpatch_recipes():
    raise KeyError("no such thing")
"""


@pytest.fixture
def lines(monkeypatch, capsys):
    """The lines since the last call, without durations."""
    monkeypatch.setenv("QUANTPATCH_TRACE", "1")

    def read():
        captured = capsys.readouterr()
        assert captured.out == ""
        return re.sub(r"\(\d+\.\d\d ms\)", "(T ms)", captured.err).splitlines()

    return read


def test_imports_and_hooks_are_reported_with_plugin_result_and_duration(install, lines):
    install("mine", SOURCE, "my-dist", "0.3")
    registry = Registry()
    registry.entries(["mine"])
    found = lines()
    assert "quantpatch: plugin 'mine' (from my-dist 0.3) imported (T ms)" in found
    assert (
        "quantpatch: plugin 'mine': quantpatch_entries() -> far.away.Layer -> far.quant:QuantLayer (T ms)"
        in found
    )
    registry.entries(["mine"])
    assert lines() == []  # asked once
    with pytest.raises(Exception, match="no such thing"):
        registry.recipe("mine")
    assert "quantpatch: plugin 'mine': quantpatch_recipes() -> KeyError: 'no such thing' (T ms)" in lines()


def test_a_block_says_what_it_opens_with_and_each_decision_once(lines):
    with quantize_modules(skip=["Conv2d"], plugins=[]):
        opened = lines()
        assert (
            "quantpatch: quantize_modules(skip=('Conv2d',), plugins=()) opened, recipe int8: replaces"
            in opened[-1]
        )
        for _ in range(2):
            nn.Linear(2, 2)
            nn.Conv2d(1, 1, 1)
        assert lines() == [
            "quantpatch:   torch.nn.Linear -> quantpatch.layers.linear.QuantLinear "
            "(plugin 'quantpatch.builtin')",
            "quantpatch:   torch.nn.Conv2d stays float: skip='Conv2d'",
        ]


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_the_variable_nothing_is_reported(value, monkeypatch, capsys):
    if value is None:
        monkeypatch.delenv("QUANTPATCH_TRACE", raising=False)
    else:
        monkeypatch.setenv("QUANTPATCH_TRACE", value)
    with quantize_modules():
        nn.Linear(2, 2)
    assert capsys.readouterr().err == ""
