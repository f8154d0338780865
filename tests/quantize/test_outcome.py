"""What came out of a block, as tables."""

from __future__ import annotations

import json

from torch import nn

import quantpatch as qp


class Own(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def opened():
    with qp.quantize_modules(subclasses=True) as block:
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Own(2, 2))
    return block


def test_a_block_prints_as_its_options_and_a_small_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    block = opened()
    first, *table = str(block).splitlines()
    assert first == repr(block)
    assert table[0].split() == ["class", "layers", "what", "became", "of", "them"]
    assert table[2].split() == ["torch.nn.Linear", "2", "quantpatch.layers.linear.QuantLinear"]
    assert "float: " in table[3]
    assert max(map(len, table)) <= 300


def test_what_was_replaced_is_a_tuple_that_prints_as_a_table():
    block = opened()
    (line,) = block.replaced
    assert isinstance(block.replaced, tuple)
    assert block.replaced == (line,)
    assert (
        str(block.replaced).splitlines()[2:]
        == str(qp.convert(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))).splitlines()[2:]
    )
    assert block.replaced.to_dicts() == [
        {
            "target": "torch.nn.Linear",
            "count": 2,
            "replacement": "quantpatch.layers.linear.QuantLinear",
            "plugin": "quantpatch.builtin",
        }
    ]
    assert json.loads(block.replaced.to_json()) == {"rows": block.replaced.to_dicts()}
    (skipped,) = block.skipped
    assert skipped.reason in " ".join(str(block.skipped).split())


def test_a_notebook_shows_the_same():
    block = opened()
    assert "QuantLinear" in block._repr_html_()
    assert "QuantLinear" in block.replaced._repr_html_()


def test_a_block_in_which_nothing_was_built_prints_too():
    with qp.quantize_modules() as block:
        pass
    assert str(block).splitlines()[0] == repr(block)
    assert block.replaced == ()
    assert block.replaced.to_dicts() == []
