"""Why an operand was float, for what tests of whole audits do not meet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.analysis.audit import reasons


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (reasons.FloatOperands("QuantX", ("input",), ()), "the recipe leaves it float"),
        (
            reasons.FloatOperands("QuantX", ("input",), ("scores", "mask")),
            "the recipe leaves input float; scores and mask are made inside QuantX",
        ),
        (reasons.SwitchedOff("QuantX", ("a", "b")), "a and b of QuantX are switched off"),
        (
            reasons.OfAFunction("Net", ("fc", "head"), None),
            "a function called in the forward of Net, which reads the weight of fc and head itself: "
            "operations='products' quantizes it",
        ),
    ],
)
def test_each_reason_is_one_sentence(reason, text):
    assert str(reason) == text


def test_plugins_that_want_one_target_and_an_entry_that_cannot_be_used_do_not_end_an_audit(plugin):
    plugin("one", entries=[("torch.nn", "Linear", "one.quant:QuantLinear")])
    (row,) = qp.audit(nn.Linear(2, 2), torch.randn(1, 2)).rows
    assert "Linear was left float: plugin 'one': entry torch.nn.Linear -> one.quant:QuantLinear" in row.reason
    plugin("two", entries=[("torch.nn", "Linear", "two.quant:QuantLinear")])
    (row,) = qp.audit(nn.Linear(2, 2), torch.randn(1, 2)).rows
    assert row.reason.startswith("Linear was left float: 'one' and 'two' both replace it")


def test_the_reason_is_in_json_as_a_sentence():
    report = qp.audit(nn.Linear(2, 2), torch.randn(1, 2))
    assert '"reason": "Linear was left float: it was skipped, or built outside a block"' in report.to_json()
    assert isinstance(report.rows[0].why, reasons.LeftFloat)
