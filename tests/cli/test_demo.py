"""The demo: real data, figures that make sense, the same each time."""

from __future__ import annotations

import sys

import attrs
import pytest
import torch
from torch import nn

from quantpatch.cli import demo
from quantpatch.errors import MissingExtraError


def without_times(report):
    return [attrs.evolve(row, seconds=0.0) for row in report.rows]


def test_figures_make_sense():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    report = demo.run(epochs=6, tuning_epochs=2)
    accuracy = {(row.model, row.bits): row.accuracy for row in report.rows}
    assert accuracy["float", 32] > 0.85
    assert accuracy["calibrated", 8] > accuracy["float", 32] - 0.02
    assert accuracy["calibrated", 4] < accuracy["calibrated", 8]
    assert accuracy["fine-tuned", 4] > accuracy["calibrated", 4]
    assert accuracy["in ONNX Runtime", 8] == accuracy["fine-tuned", 8]
    assert all((row.replaced, row.covered) == (1.0, 1.0) for row in report.rows[1:])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_without_onnx_the_demo_says_what_it_leaves_out_and_its_figures_are_the_same_in_each_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    report = demo.run(epochs=1, tuning_epochs=1)
    assert [row.model for row in report.rows] == ["float", *["calibrated", "fine-tuned"] * 2]
    shown = " ".join(str(report).split())
    assert "not run in ONNX Runtime: qp.export_onnx needs onnxscript" in shown
    assert "pip install 'quantpatch[onnx]'" in shown
    torch.rand(1)
    assert without_times(demo.run(epochs=1, tuning_epochs=1)) == without_times(report)


def test_the_model_is_plain_pytorch():
    assert {type(m).__module__.partition(".")[0] for m in demo.build_model().modules()} == {"torch"}
    assert isinstance(demo.build_model(), nn.Sequential)


def test_the_test_images_are_not_among_the_training_images():
    (train, _), (test, _) = demo.load_data()
    assert (len(train), len(test)) == (1437, 360)
    assert sum(bool((train == image).all((1, 2, 3)).any()) for image in test) == 0


def test_without_scikit_learn_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'quantpatch\[demo\]'"):
        demo.load_data()


def test_the_table_says_that_figures_differ_between_machines_and_what_was_left_out():
    report = demo.DemoReport(
        (demo.DemoRow("float", 32, 0.5, 0.0, 0.0, 1.0),), "not run in ONNX Runtime: no file"
    )
    text = " ".join(str(report).split())
    assert "accuracy and time differ somewhat between machines and versions of torch" in text
    assert text.endswith("not run in ONNX Runtime: no file")
