"""``sensitivity``: one layer at a time."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.analysis import SensitivityReport, SensitivityRow
from quantpatch.errors import ArgumentError, ArgumentTypeError, FileError


@pytest.fixture
def model():
    torch.manual_seed(0)
    with qp.quantize_modules():
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))


def on(model):
    """Which layers are quantized, as a number: layer 1 costs most, then layer 0."""
    costs = {"0": 0.2, "1": 0.5, "2": 0.0}
    return sum(costs[name] for name, m in model.named_children() if not m.input_quantizer.disabled)


def metric(model):
    return 1.0 - on(model)


def test_each_layer_is_quantized_alone_and_the_costliest_comes_first(model):
    report = qp.sensitivity(model, metric)
    assert (report.float_metric, report.quantized_metric) == (1.0, pytest.approx(0.3))
    assert [(r.layer, pytest.approx(r.loss)) for r in report.rows] == [("1", 0.5), ("0", 0.2), ("2", 0.0)]


def test_or_each_is_float_alone(model):
    report = qp.sensitivity(model, metric, mode="float_one")
    assert [(r.layer, pytest.approx(r.metric)) for r in report.rows] == [("1", 0.8), ("0", 0.5), ("2", 0.3)]
    assert [pytest.approx(r.loss) for r in report.rows] == [0.5, 0.2, 0.0]


def test_a_quantizer_that_was_disabled_stays_out_of_it(model):
    model[1].input_quantizer.disable()
    model[1].weight_quantizer.disable()
    report = qp.sensitivity(model, metric)
    assert [row.layer for row in report.rows] == ["0", "2"]
    assert model[1].input_quantizer.disabled
    assert not model[0].input_quantizer.disabled


def test_quantizers_are_as_before_when_evaluate_raises(model):
    def fail(m):
        if not m[1].input_quantizer.disabled and m[0].input_quantizer.disabled:
            raise KeyError("stop")
        return 0.0

    with pytest.raises(KeyError):
        qp.sensitivity(model, fail)
    assert not any(q.disabled for q in model.modules() if isinstance(q, qp.TensorQuantizer))


def test_an_interrupted_run_goes_on_where_it_stopped(model, tmp_path):
    path, calls = tmp_path / "results.json", []

    def interrupted(m):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return metric(m)

    with pytest.raises(KeyboardInterrupt):
        qp.sensitivity(model, interrupted, resume=path)
    again = []
    report = qp.sensitivity(model, lambda m: again.append(1) or metric(m), resume=path)
    assert len(calls) + len(again) == 5
    assert report == qp.sensitivity(model, metric)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda q: setattr(q, "descriptor", qp.QuantDescriptor(num_bits=4)),
        lambda q: q.disable_quant(),
        lambda q: q.disable(),
    ],
)
def test_results_of_other_settings_are_not_taken_for_these(change, model, tmp_path):
    path = tmp_path / "results.json"
    qp.sensitivity(model, metric, resume=path)
    change(model[1].input_quantizer)
    with pytest.raises(FileError, match=r"of other weights, ranges or settings; delete it"):
        qp.sensitivity(model, metric, resume=path)


def test_results_of_the_other_mode_are_not_taken_for_this_ones(model, tmp_path):
    path = tmp_path / "results.json"
    qp.sensitivity(model, metric, resume=path)
    with pytest.raises(FileError, match="holds results of mode 'quantize_one', not 'float_one'"):
        qp.sensitivity(model, metric, mode="float_one", resume=path)


def test_results_of_another_model_are_not_taken_for_this_ones(model, tmp_path):
    path = tmp_path / "results.json"
    report = qp.sensitivity(model, metric, resume=path)
    assert qp.sensitivity(model, lambda m: pytest.fail("measured again"), resume=path) == report
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    with pytest.raises(FileError, match=r"results\.json holds results of another model.*delete it"):
        qp.sensitivity(model, metric, resume=path)
    path.unlink()
    qp.sensitivity(model, metric, resume=path)
    model[1].input_quantizer.amax = 2.0
    with pytest.raises(FileError, match="other weights, ranges or settings"):
        qp.sensitivity(model, metric, resume=path)


def test_a_resumed_run_in_another_process_goes_on(model, tmp_path):
    """What a killed process has left is whole: every result up to then."""
    path = tmp_path / "results.json"
    torch.save(model.state_dict(), tmp_path / "model.pt")
    code = f"""
import os, sys, torch, quantpatch as qp
with qp.quantize_modules():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
model.load_state_dict(torch.load({str(tmp_path / "model.pt")!r}))
calls = []
def evaluate(model):
    if len(calls) == 3:
        os._exit(9)
    calls.append(1)
    return 0.25
qp.sensitivity(model, evaluate, resume={str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 9, done.stderr
    calls = []
    report = qp.sensitivity(model, lambda m: calls.append(1) or 0.5, resume=path)
    assert len(calls) == 2
    assert sorted(row.metric for row in report.rows) == [0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"mode": "quantize_one", "model": "", "results": []}',
        '{"mode": "float_one", "model": "", "results": {}}',
        '{"mode": "quantize_one", "model": "", "results": {"float": NaN}}',
        '{"mode": "quantize_one", "model": "", "results": {"float": 1' + "0" * 400 + "}}",
        '{"mode": "quantize_one", "model": "", "results": {"float": "1.5"}}',
        '{"mode": "' + "x" * 100_000 + '", "model": "", "results": {}}',
        "[" * 100_000,
    ],
)
def test_a_file_of_something_else_is_an_error(model, tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(FileError, match=r"results\.json") as caught:
        qp.sensitivity(model, metric, resume=path)
    assert len(str(caught.value)) < 1_000
    assert path.read_text() == text


def test_a_folder_holds_no_results(model, tmp_path):
    with pytest.raises(FileError, match="is a folder: name a file in it"):
        qp.sensitivity(model, metric, resume=tmp_path)


def test_what_is_not_a_number_or_a_mode_is_an_error(model):
    with pytest.raises(ArgumentError, match="NaN while measuring 'float'"):
        qp.sensitivity(model, lambda m: float("nan"))
    with pytest.raises(ArgumentError, match="'quantize_one' or 'float_one'"):
        qp.sensitivity(model, metric, mode="quantize_all")


def test_quantizers_that_no_quantized_layer_has_count_as_well():
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4))
    model[0].mine = qp.TensorQuantizer()
    qp.convert(model[1])
    seen = []

    def evaluate(m):
        seen.append((m[0].mine.disabled, m[1].input_quantizer.disabled))
        return 0.0

    report = qp.sensitivity(model, evaluate)
    assert {row.layer for row in report.rows} == {"0", "1"}
    assert seen == [(True, True), (False, False), (False, True), (True, False)]


def test_what_it_recommends_to_leave_float_keeps_the_loss_it_was_asked_for():
    """The whole way, from measuring to rules, and measuring again."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        label = model(x).argmax(1)
    coarse = qp.QuantDescriptor(num_bits=2)
    qp.convert(model, recipe=qp.Recipe(name="uneven", rules={"2": coarse}))
    qp.calibrate(model, [x])

    def agreement(m):
        with torch.no_grad():
            return (m(x).argmax(1) == label).float().mean().item()

    report = qp.sensitivity(model, agreement)
    assert report.float_metric == 1.0
    assert report.quantized_metric < 0.9
    names = report.keep_float(0.05)
    assert names == ("2",)
    qp.configure(model, dict.fromkeys(names))
    assert agreement(model) >= 0.95


def test_a_float_model_is_an_error():
    with pytest.raises(ArgumentError, match="no quantized layer"):
        qp.sensitivity(nn.Linear(1, 1), metric)


def test_the_recommendation_leaves_the_costliest_float_until_the_rest_is_cheap_enough():
    rows = tuple(SensitivityRow(name, 0.0, loss) for name, loss in [("a", 0.5), ("b", 0.2), ("c", -0.1)])
    report = SensitivityReport("quantize_one", 1.0, 0.3, rows)
    assert report.keep_float(1.0) == ()
    assert report.keep_float(0.3) == ("a",)
    assert report.keep_float(0.1) == ("a", "b")


def test_it_prints_and_is_json(model):
    report = qp.sensitivity(model, metric)
    assert re.search(r"all quantized\W+0\.3", str(report))
    assert "this layer alone quantized" in " ".join(str(report).split())
    other = qp.sensitivity(model, metric, mode="float_one")
    assert "this layer alone float" in " ".join(str(other).split())
    assert json.loads(report.to_json())["rows"][0]["layer"] == "1"


def test_what_is_not_a_function_is_refused(model):
    with pytest.raises(ArgumentTypeError, match="gets the model and returns a metric"):
        qp.sensitivity(model, [torch.zeros(1, 4)])


@pytest.mark.parametrize(
    ("result", "shown"),
    [(torch.ones(2, 2), r"a Tensor of shape \(2, 2\)"), (None, "a NoneType"), ("0.5x", "a str")],
)
def test_a_metric_that_is_not_a_number_is_reported(result, shown):
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ArgumentTypeError, match=f"evaluate returned {shown}, expected one number"):
        qp.sensitivity(model, lambda model: result)


def test_a_metric_may_be_a_tensor_with_a_gradient():
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(2, 2))
    assert len(qp.sensitivity(model, lambda model: model(torch.ones(1, 2)).sum()).rows) == 1


@pytest.fixture
def with_norm():
    torch.manual_seed(0)
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    qp.calibrate(model, [torch.randn(8, 4)], progress=False)
    model.train()
    model[1].eval()
    return model


def test_a_model_in_training_mode_is_measured_in_eval_mode_and_is_as_before(with_norm, tmp_path):
    path, x = tmp_path / "results.json", torch.randn(8, 4)
    state = {key: value.clone() for key, value in with_norm.state_dict().items()}
    random = torch.get_rng_state()
    measured = []

    def evaluate(model):
        measured.append(any(m.training for m in model.modules()))
        with torch.no_grad():
            return float(model(x).sum())

    first = qp.sensitivity(with_norm, evaluate, resume=path)
    assert first == qp.sensitivity(with_norm, evaluate, resume=path)
    assert measured == [False] * 4
    assert [m.training for m in with_norm] == [True, False, True, True]
    assert all(torch.equal(value, state[key]) for key, value in with_norm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_each_measurement_starts_in_eval_mode_whatever_the_one_before_left(with_norm):
    measured = []

    def evaluate(model):
        measured.append(any(m.training for m in model.modules()))
        model.train()
        return 0.0

    qp.sensitivity(with_norm, evaluate)
    assert measured == [False] * 4
    assert [m.training for m in with_norm] == [True, False, True, True]


def test_an_evaluate_that_moves_batch_norm_is_reported_once(with_norm):
    def evaluate(model):
        model.train()
        return float(model(torch.ones(8, 4)).detach().sum())

    with pytest.warns(
        qp.QuantPatchWarning, match=r"evaluate changed 1\.num_batches_tracked of Sequential"
    ) as told:
        qp.sensitivity(with_norm, evaluate)
    assert len(told) == 1


def test_switching_layers_sets_only_what_differs(model, monkeypatch):
    sets = []
    own = qp.TensorQuantizer.__setattr__

    def counted(quantizer, name, value):
        sets.extend([name] * (name == "disabled"))
        own(quantizer, name, value)

    monkeypatch.setattr(qp.TensorQuantizer, "__setattr__", counted)
    qp.sensitivity(model, lambda model: 0.0)
    # 6 off, 6 on, then 4 off, 2 off and 2 on for each further layer, and 6 on at the end.
    assert len(sets) == 6 + 6 + 4 + 2 * 4 + 6
