"""``summary``: every quantizer by name, and what has none."""

from __future__ import annotations

import json

import torch
from torch import nn

import quantpatch as qp


def build():
    with qp.quantize_modules():
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def test_there_is_a_row_for_each_quantizer_in_the_models_order():
    names = [row.name for row in qp.summary(build()).rows]
    assert names == [f"{i}.{operand}_quantizer" for i in (0, 2) for operand in ("input", "weight")]


def test_before_calibration_the_state_says_so_and_there_is_no_range():
    row = qp.summary(build()).rows[0]
    assert (row.state, row.ranges, row.amax_max) == ("dynamic (not calibrated)", 0, None)


def test_after_calibration_the_ranges_are_shown():
    model = build()
    x = torch.randn(3, 4)
    qp.calibrate(model, [x])
    first, weight = qp.summary(model).rows[:2]
    assert (first.state, first.ranges, first.amax_max) == ("calibrated", 1, x.abs().max().item())
    assert (weight.axis, weight.ranges) == ((0,), 8)
    assert weight.amax_min == model[0].weight_quantizer.amax.min().item()


def test_layers_with_parameters_and_no_quantizer_are_named():
    assert qp.summary(build()).float_layers == (("1", "LayerNorm"),)


def test_printing_shows_every_row_whole():
    text = str(qp.summary(build()))
    assert all(row.name in text for row in qp.summary(build()).rows)
    assert "dynamic (not calibrated)" in text
    assert "1 LayerNorm" in text


def test_json_holds_the_same():
    report = qp.summary(build())
    assert len(json.loads(report.to_json())["rows"]) == len(report.rows)


def test_a_bare_layer_has_a_summary():
    with qp.quantize_modules():
        layer = nn.Linear(2, 2)
    assert [row.layer for row in qp.summary(layer).rows] == ["QuantLinear"] * 2


def test_a_model_on_the_meta_device_has_a_summary():
    with torch.device("meta"):
        assert len(qp.summary(build()).rows) == 4


def test_names_with_brackets_are_shown_as_they_are():
    with qp.quantize_modules():
        model = nn.ModuleDict({"[red]a": nn.Linear(2, 2), "[/b]": nn.Linear(2, 2)})
    shown = str(qp.summary(model))
    assert "[red]a.input_quantizer" in shown
    assert "[/b].input_quantizer" in shown
