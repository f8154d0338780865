"""What every report can do: a table on terminals and in notebooks, JSON, and rows for pandas."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.reports.report import Report


def net():
    torch.manual_seed(0)
    with qp.quantize_modules():
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
        ).eval()


X = torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model, converted = net(), nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 2))
    found = {"convert": qp.convert(converted, skip="Bilinear")}
    with qp.quantize_modules(include="Bilinear") as block:
        nn.Bilinear(2, 2, 2)
    found["replaced"] = block.replaced
    found["prepare"] = qp.prepare(model, X)
    found["fold_batchnorm"] = qp.fold_batchnorm(net(), X)
    found["calibrate"] = qp.calibrate(model, [X])
    found["summary"] = qp.summary(model)
    found["audit"] = qp.audit(model, X)
    found["compare"] = qp.compare(net(), qp.revert(in_float := net()) and in_float, [X])
    found["sensitivity"] = qp.sensitivity(model, lambda m: 0.5)
    found["search"] = qp.search(net(), data=X, candidates=["int8", None], max_drop=0.1)
    found["configure"] = qp.configure(model, {":last": None})
    found["explain"] = qp.explain("torch.nn.Linear")
    found["revert"] = qp.revert(converted)
    found["tune"] = qp.tune(net_calibrated(), [X], method="gptq", progress=False)
    found["fit_zero_points"] = qp.fit_zero_points(net_calibrated(), [X])
    pytest.importorskip("safetensors")
    found["save"] = qp.save(net(), folder / "model.safetensors", packed=False)
    pytest.importorskip("onnxruntime")
    found["export_onnx"] = qp.export_onnx(net_calibrated(), X, folder / "model.onnx", latency=False)
    return found


def net_calibrated():
    model = net()
    qp.prepare(model, X)
    qp.calibrate(model, [X])
    return model


def test_these_are_all_kinds_of_reports_but_those_of_long_runs(reports):
    kinds, known = [Report], set()
    while kinds:
        known.add(kind := kinds.pop())
        kinds += kind.__subclasses__()
    of_long_runs = {
        "BenchReport",
        "DemoReport",
        "LoweringReport",
    }  # bench, demo and lower have tests of theirs
    unseen = known - {type(report) for report in reports.values()} - {Report}
    assert {kind.__name__ for kind in unseen if kind.__module__.startswith("quantpatch.")} <= of_long_runs


@pytest.mark.parametrize("width", [80, 120, 200])
def test_each_is_a_table_no_wider_than_the_terminal(reports, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for name, report in reports.items():
        text = str(report)
        assert max(map(len, text.splitlines())) <= width, name
        assert "───" in text or (width == 80 and name == "summary"), name  # of which each row is a paragraph


def test_each_is_html_for_notebooks(reports):
    for name, report in reports.items():
        html = report._repr_html_()
        assert html.startswith("<pre"), name
        assert html.count("\n") >= 3, name


def test_each_is_json_and_rows_for_pandas(reports):
    for name, report in reports.items():
        assert isinstance(report, Report)
        assert json.loads(report.to_json()), name
        rows = report.to_dicts()
        assert rows, name
        for row in rows:
            assert all(isinstance(key, str) and not isinstance(value, dict) for key, value in row.items()), (
                name
            )
