"""``Calibration``: what it reports, and what a model and its copies are while it is open."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import QuantPatchWarning
from quantpatch.layers.quantizer import in_float, named_quantizers
from quantpatch.quantize.calibration import Calibration


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.zero, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x) + self.zero(torch.zeros_like(x))


def build(cls=TwoInputs):
    torch.manual_seed(0)
    with qp.quantize_modules():
        return cls()


X = torch.linspace(-1, 1, 32).reshape(8, 4)


def test_the_report_names_what_got_a_range_and_what_did_not_and_why():
    model = build()
    qp.configure(model, {"used.weight_quantizer": qp.QuantDescriptor(amax=2.0)})
    with pytest.warns(QuantPatchWarning, match="saw no data"):
        report = qp.calibrate(model, X, strict=False)
    assert report.calibrated == ("used.input_quantizer", "zero.weight_quantizer")
    assert report.skipped == {
        "used.weight_quantizer": "kept its range",
        "unused.input_quantizer": "saw no data",
        "unused.weight_quantizer": "saw no data",
        "zero.input_quantizer": "saw only zeros",
    }
    assert "2 of 5 quantizers saw no data" in report.problem
    assert json.loads(report.to_json())["skipped"] == report.skipped
    text = " ".join(str(report).split())
    assert "TwoInputs: 2 quantizers calibrated" in text
    for outcome in ("calibrated", "kept its range", "saw no data", "saw only zeros"):
        assert outcome in text
    assert "zero point" not in text


def test_ranges_that_are_kept_are_reported_as_kept():
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(4, 4))
    assert qp.calibrate(model, X).skipped == {}
    report = qp.calibrate(model, X, existing="keep")
    assert report.calibrated == ()
    assert report.skipped == dict.fromkeys(("0.input_quantizer", "0.weight_quantizer"), "kept its range")
    assert qp.calibrate(model, X, existing="overwrite").calibrated == tuple(report.skipped)


def test_zero_points_that_were_found_are_in_the_report():
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(4, 4))
    report = qp.calibrate(model, X.abs(), zero_points=True)
    assert report.zero_points == {"0.input_quantizer": 0}
    assert "0.input_quantizer: 0" in str(report)


def test_a_block_has_its_report_once_it_is_over():
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(4, 4))
    with qp.calibrating(model) as calibration:
        model(X)
        assert calibration.report is None
        assert list(calibration.quantizers) == ["0.input_quantizer", "0.weight_quantizer"]
    assert calibration.report.calibrated == tuple(calibration.quantizers)
    with pytest.raises(KeyError), qp.calibrating(model, existing="overwrite") as failed:
        raise KeyError
    assert failed.report is None


def test_a_passive_one_leaves_mode_and_gradients_as_they_are_and_reports_instead_of_warning():
    model = build().train()
    with Calibration(model, strict=False, passive=True) as calibration:
        model(X).sum().backward()
        assert model.training
    assert model.used.weight.grad.any()
    unseen = [name for name, why in calibration.report.skipped.items() if why == "saw no data"]
    assert unseen == ["unused.input_quantizer", "unused.weight_quantizer"]
    assert "saw only zeros: zero.input_quantizer" in calibration.report.problem


def copies(model):
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


def test_a_model_in_float_has_no_mark_and_copies_of_it_quantize():
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(4, 4))
    qp.calibrate(model, X)
    expected = model(X)
    before = {name: {**vars(q)} for name, q in named_quantizers(model).items()}
    with in_float(model), in_float(model):
        for name, quantizer in named_quantizers(model).items():
            assert vars(quantizer) == before[name] | {"quantizing": False}
        for made in copies(model):
            assert torch.equal(made(X), expected)
            assert all(vars(q).keys() == before[n].keys() for n, q in named_quantizers(made).items())
        assert not torch.equal(model(X), expected)
    assert {name: vars(q) for name, q in named_quantizers(model).items()} == before
    model[0].weight_quantizer.disable_quant()
    assert not next(copies(model))[0].weight_quantizer.quantizing  # set by hand, so that a copy has it too


def test_copies_made_during_a_calibration_are_not_watched_by_it_and_can_be_pickled():
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(4, 4))
    with Calibration(model, zero_points=True, passive=True) as calibration:
        model(X.abs())
        made = list(copies(model))
        for each in made:
            each(-X.abs())
            assert each[0].input_quantizer.calibrator is None
    assert calibration.report.zero_points == {"0.input_quantizer": 0}
    for each in (model, *made):
        assert set(each[0].input_quantizer._forward_pre_hooks) <= {"quantpatch"}
