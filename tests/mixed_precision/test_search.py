"""``search``: the cheapest formats of layers that keep a metric."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from datetime import timedelta
from fractions import Fraction

import pytest
import torch
from torch import nn

import quantpatch as qp
from quantpatch.errors import (
    ArgumentError,
    ArgumentTypeError,
    CalibrationError,
    FileError,
    MissingExtraError,
    SearchError,
)

COARSE = qp.Recipe(name="w3a8", weight=qp.QuantDescriptor(num_bits=3, axis="channel", narrow_range=True))
CANDIDATES = ["int8", "w4a8", COARSE, None]
THREE = ["int8", COARSE, None]
X = torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
BATCHES = [X[:128], X[128:]]


def build():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(8, 24, bias=False), nn.Tanh(), nn.Linear(24, 12, bias=False), nn.Tanh(), nn.Linear(12, 4)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=2 / parameter.shape[-1] ** 0.5)
    return model


with torch.no_grad():
    LABEL = build()(X).argmax(1)


def agreement(model):
    with torch.no_grad():
        return (model(X).argmax(1) == LABEL).float().mean().item()


def state(model):
    """What a search may not change: classes, modes, tensors, quantizers and their settings."""
    return (
        [(name, type(m), m.training, list(m._modules)) for name, m in model.named_modules()],
        {key: value.clone() for key, value in model.state_dict().items()},
        [
            (name, id(q), q.descriptor, q.disabled)
            for name, q in qp.layers.quantizer.named_quantizers(model).items()
        ]
        if any(isinstance(m, qp.TensorQuantizer) for m in model.modules())
        else [],
    )


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][key].nan_to_num(), after[1][key].nan_to_num()) for key in before[1])
    assert before[2] == after[2]


def bits(model):
    """Bits of all weights, counted from the model as it is."""
    total = 0
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            quantizer = layer._modules.get("weight_quantizer")
            off = quantizer is None or quantizer.disabled
            total += layer.weight.numel() * (32 if off else quantizer.format.bits)
    return total


@pytest.fixture(scope="module")
def every():
    """Cost and metric of every configuration, found by the functions that a user would call."""
    found = {}
    for choice in itertools.product(THREE, repeat=3):
        model = build()
        if any(choice):
            qp.convert(model)
            qp.configure(model, dict(zip(("0", "2", "4"), choice, strict=True)))
            qp.calibrate(model, BATCHES)
        found[tuple("float" if c is None else c if isinstance(c, str) else c.name for c in choice)] = (
            bits(model),
            agreement(model),
        )
    return found


@pytest.mark.parametrize("max_drop", [0.0, 0.02, 0.06])
def test_it_finds_what_trying_all_finds_with_fewer_evaluations(every, max_drop):
    model = build()
    result = qp.search(model, agreement, max_drop=max_drop, candidates=THREE, data=BATCHES)
    good = {c: (cost, -metric) for c, (cost, metric) in every.items() if metric >= 1 - max_drop - 1e-9}
    best = min(good, key=good.get)
    assert (result.cost, result.metric) == every[best]
    assert result.evaluations < len(every)
    assert result.float_metric == 1.0
    assert result.float_cost == bits(build())
    # What was evaluated is what the functions that a user calls give.
    assert all((point.cost, point.metric) == every[point.recipes] for point in result.points)
    # And the model is it.
    assert (bits(model), agreement(model)) == every[best]


def test_the_model_is_as_the_rules_make_another_one():
    model, other = build(), build()
    result = qp.search(model, agreement, candidates=CANDIDATES, data=BATCHES)
    qp.convert(other)
    qp.configure(other, result.rules)
    qp.calibrate(other, BATCHES)
    assert torch.equal(model(X), other(X))
    assert qp.summary(model).rows == qp.summary(other).rows
    cheapest = result.frontier[0]
    qp.configure(other, result.rules_of(cheapest))
    qp.calibrate(other, BATCHES, existing="overwrite")
    assert (bits(other), agreement(other)) == (cheapest.cost, cheapest.metric)


def test_a_quantized_model_is_searched_with_its_own_layers_and_keeps_its_quantizers_tensors():
    with qp.quantize_modules(recipe="w4a8"):
        model = build()
    model.train()
    qp.configure(model, {"2": None})
    held = model[0].input_quantizer._amax
    result = qp.search(model, agreement, candidates=["int8", "w4a8"], data=BATCHES, max_drop=0.5)
    assert [row.layers for row in result.rows] == [("0",), ("4",)]
    assert result.skipped == {"2": "its quantizers are disabled"}
    assert model[0].input_quantizer._amax is held
    assert all(m.training for m in model)
    assert [row.state for row in qp.summary(model).rows] == [
        *(["calibrated"] * 2), *(["disabled"] * 2), *(["calibrated"] * 2)
    ]  # fmt: skip


def test_without_data_ranges_come_from_what_evaluate_feeds_the_float_model():
    model, with_data, seen = build(), build(), []

    def evaluate(given):
        seen.append(any(m.training for m in given.modules()))
        return agreement(given)

    result = qp.search(model.train(), evaluate, candidates=CANDIDATES)
    assert result.evaluations == len(seen)
    assert not any(seen)
    assert all(m.training for m in model)
    assert result.rules == qp.search(with_data, agreement, candidates=CANDIDATES, data=X).rules


def test_without_evaluate_outputs_are_held_against_those_in_float():
    model, in_float = build(), build()
    result = qp.search(model, data=BATCHES, max_drop=0.01, candidates=CANDIDATES)
    with torch.no_grad():
        noise = (model(X) - in_float(X)).square().sum() / in_float(X).square().sum()
    assert result.metric == pytest.approx(1 - float(noise))
    assert noise < 0.01
    assert result.evaluations == len(result.points) - 1  # the float model's is known


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x, *, scale, **others):
        return self.layer(x) * scale + others["shift"]


def test_what_evaluate_calls_the_model_with_may_be_arguments_beside_keywords():
    model = Keywords()
    result = qp.search(
        model,
        lambda m: float(-m(X, scale=2.0, shift=torch.ones(4)).detach().square().mean()),
        candidates=["int8", None],
        max_drop=0.5,
    )
    assert [row.layers for row in result.rows] == [("layer",)]
    assert model.layer.input_quantizer.amax == X.abs().max()


def test_blocks_that_have_no_quantizers_themselves_are_no_layers():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    result = qp.search(model, data=torch.randn(2, 3, 8), candidates=["int8", None], max_drop=0.1)
    assert [row.layers for row in result.rows] == [
        ("layers.0.self_attn",),
        ("layers.0.linear1",),
        ("layers.0.linear2",),
    ]


def test_a_model_that_is_a_layer_itself_is_searched():
    model = nn.Linear(8, 4)
    result = qp.search(model, data=X, candidates=["int8", None], max_drop=0.1)
    assert result.rules == {"*": "int8"}
    assert model.input_quantizer.amax == X.abs().max()


def test_a_group_gets_one_recipe():
    model = build()
    qp.search(model, agreement, candidates=CANDIDATES, data=BATCHES, groups=[("0", "4")])
    assert model[0].weight_quantizer.descriptor == model[4].weight_quantizer.descriptor


def test_macs_count_the_bits_of_both_operands():
    result = qp.search(build(), agreement, candidates=["int8", "w4a8"], data=BATCHES, cost="macs", max_drop=1)
    macs = 128 * (8 * 24 + 24 * 12 + 12 * 4)
    assert result.float_cost == macs * 32 * 32
    assert result.cost == macs * 8 * 4
    assert result.unit == "bit operations"


def test_bits_count_the_scales_of_blocks_and_a_shared_weight_once():
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    model[1].weight = model[0].weight
    result = qp.search(model, data=torch.randn(2, 32), candidates=["mxfp4", "int4-weight-only"], max_drop=1)
    assert {point.cost for point in result.points} <= {1024 * (4 + 8 / 32), 1024 * (4 + 32 / 128)}
    assert result.float_cost == 1024 * 32
    assert [row.layers for row in result.rows] == [("0", "1")]


def test_cost_may_be_a_function():
    asked = []

    def cost(name, layer, recipe):
        asked.append((name, layer.out_features))
        return {"0": 5, "2": 1, "4": 1}[name] * (3 if recipe is None else 1)

    result = qp.search(build(), agreement, candidates=["int8", None], data=BATCHES, cost=cost, max_drop=1)
    assert (result.cost, result.float_cost, result.unit) == (7, 21, "cost")
    assert set(asked) == {("0", 24), ("2", 12), ("4", 4)}


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), None])
def test_a_cost_that_is_none_is_an_error(value):
    with pytest.raises(ArgumentError, match="cost returned .* for '0' as int8: expected a finite number"):
        qp.search(build(), agreement, data=BATCHES, cost=lambda name, layer, recipe: value)


def test_latency_is_measured_of_each_layer_in_onnx_runtime():
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    result = qp.search(
        model, data=torch.randn(8, 16), candidates=["int8", None], cost="latency", max_drop=0.5
    )
    assert result.unit == "ms in ONNX Runtime"
    assert 0 < result.cost <= result.float_cost < 100


def test_a_format_that_no_file_has_cannot_be_timed():
    pytest.importorskip("onnxruntime")
    with pytest.raises(ArgumentError, match="(?s)'0' as mxfp8 does not export.*Leave out that candidate"):
        qp.search(build(), agreement, data=BATCHES, candidates=["mxfp8", None], cost="latency")


# --- metrics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.tensor, Fraction, lambda x: torch.tensor([x], requires_grad=True)])
def test_a_metric_is_anything_that_is_a_number(kind):
    result = qp.search(
        build(), lambda m: kind(agreement(m)), candidates=CANDIDATES, data=BATCHES, max_drop=0.02
    )
    plain = qp.search(build(), agreement, candidates=CANDIDATES, data=BATCHES, max_drop=0.02)
    assert result.rules == plain.rules


def test_or_anything_with_an_order_and_a_function_that_says_what_is_good_enough():
    def grade(model):
        return "ABC"[::-1][min(2, int(3 * max(0, agreement(model) - 0.7) / 0.3))]

    wanted = {"A": 2, "B": 1, "C": 0}

    class Grade:
        def __init__(self, text):
            self.text = text

        def __lt__(self, other):
            return wanted[self.text] < wanted[other.text]

        def __gt__(self, other):
            return other < self

        def __eq__(self, other):
            return self.text == other.text

        __hash__ = None

    result = qp.search(
        build(),
        lambda m: Grade(grade(m)),
        candidates=CANDIDATES,
        data=BATCHES,
        max_drop=lambda reference, metric: not metric < reference,
    )
    assert result.metric.text == result.float_metric.text == "A"
    assert result.cost < result.float_cost
    pairs = qp.search(
        build(),
        lambda m: (agreement(m) > 0.9, agreement(m)),
        candidates=CANDIDATES,
        data=BATCHES,
        max_drop=lambda reference, metric: metric[0],
    )
    assert pairs.metric[0]
    json.loads(pairs.to_json())
    print(pairs)


def test_of_what_is_not_a_number_a_drop_in_numbers_is_refused():
    model = build()
    before = state(model)
    with pytest.raises(ArgumentTypeError, match="give max_drop a function"):
        qp.search(model, lambda m: (1, agreement(m)), candidates=CANDIDATES, data=BATCHES)
    assert_same(before, state(model))


# --- what goes wrong --------------------------------------------------------------------------------


def failing_after(count, error):
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) > count:
            raise error
        return agreement(model)

    return evaluate


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_whatever_evaluate_raises_comes_out_and_the_model_is_as_it_was(count, quantized):
    model = build().train()
    if quantized:
        qp.convert(model, "w4a8")
        qp.calibrate(model, BATCHES)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        qp.search(model, failing_after(count, KeyboardInterrupt()), candidates=CANDIDATES, data=BATCHES)
    assert_same(before, state(model))


def test_nan_is_an_error_and_the_model_is_as_it_was():
    model = build()
    before = state(model)
    with pytest.raises(ArgumentError, match="evaluate returned NaN for a configuration"):
        qp.search(model, lambda m: 1.0 if type(m[0]) is nn.Linear or m[0].input_quantizer.disabled
                  else float("nan"), candidates=["int8"], data=BATCHES)  # fmt: skip
    assert_same(before, state(model))


def test_an_evaluate_that_is_not_deterministic_is_reported_with_the_spread():
    noise = itertools.cycle([0.0, 0.25, 0.0])
    with pytest.warns(qp.QuantPatchWarning, match=r"a spread of 0\.25 beside max_drop=0\.01.*manual_seed"):
        result = qp.search(
            build(), lambda m: agreement(m) - next(noise), candidates=["int8", None], data=BATCHES
        )
    assert result.spread == 0.25
    assert "evaluate is not deterministic: spread 0.25" in " ".join(str(result).split())


def test_an_evaluate_that_changes_the_model_is_reported():
    def evaluate(model):
        with torch.no_grad():
            model[4].bias.add_(0.0)
        return agreement(model)

    with pytest.warns(qp.QuantPatchWarning, match=r"evaluate changed 4\.bias of Sequential"):
        qp.search(build(), evaluate, candidates=["int8", None], data=BATCHES)


@pytest.mark.parametrize("budget", [None, 3])
def test_a_drop_that_no_candidate_keeps_is_an_error_with_the_best_that_was_found(budget):
    model = build()
    before = state(model)
    with pytest.raises(
        SearchError, match=r"no configuration keeps the metric.*or None, which leaves"
    ) as caught:
        qp.search(
            model,
            lambda m: agreement(m) - 9 * (type(m[0]) is not nn.Linear and not m[0].input_quantizer.disabled),
            candidates=["int8", "w4a8"], data=BATCHES, budget=budget,
        )  # fmt: skip
    result = caught.value.result
    assert result.metric == max(point.metric for point in result.points)
    assert result.metric < -7
    assert "'0'" not in str(caught.value)
    assert_same(before, state(model))


def test_data_that_gives_no_range_is_an_error_and_the_model_as_it_was():
    model = build()
    before = state(model)
    with pytest.raises(ArgumentError, match="Sequential gives NaN or infinity for the data, in float"):
        qp.search(model, agreement, data=[torch.full((1, 8), torch.nan)])
    assert_same(before, state(model))
    with pytest.raises(CalibrationError, match="saw only zeros"):
        qp.search(model, agreement, data=[torch.zeros(1, 8)])
    assert_same(before, state(model))


def test_layers_that_the_data_does_not_reach_stay_float_and_are_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.used(x)

    model = Two()
    result = qp.search(model, data=X, candidates=["int8", None], max_drop=0.1)
    assert result.skipped == {"other": "the data does not reach it"}
    assert model.other.weight_quantizer.disabled
    assert "left float, the data does not reach it: other" in " ".join(str(result).split())


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"candidates": []}, ArgumentError, "nothing to choose from"),
        ({"candidates": [None]}, ArgumentError, "nothing to choose from"),
        ({"candidates": "int8"}, ArgumentTypeError, "expected a list of recipes"),
        ({"candidates": [8]}, ArgumentTypeError, "8 is neither a Recipe"),
        ({"candidates": ["int7"]}, ArgumentError, "unknown recipe 'int7'"),
        ({"candidates": ["int8", "int8"]}, ArgumentError, "two called 'int8'"),
        ({"candidates": [qp.recipe("int8").replace(rules={"0": None})]}, ArgumentError, "has rules"),
        ({"max_drop": -0.1}, ArgumentError, "expected a finite number from 0 on"),
        ({"max_drop": float("nan")}, ArgumentError, "expected a finite number from 0 on"),
        ({"max_drop": "1%"}, ArgumentTypeError, "expected the largest loss"),
        ({"cost": "flops"}, ArgumentError, "'bits', 'macs', 'latency' or a function"),
        ({"cost": 3}, ArgumentTypeError, "or a function"),
        ({"budget": 0}, ArgumentError, "more than 0"),
        ({"budget": timedelta(0)}, ArgumentError, "more than 0"),
        ({"budget": True}, ArgumentTypeError, "timedelta"),
        ({"budget": 2.5}, ArgumentTypeError, "timedelta"),
        ({"budget": 1}, ArgumentError, "the float model takes two evaluations"),
        ({"groups": [("0", "7")]}, ArgumentError, "'7' matches no layer"),
        ({"data": []}, ArgumentError, "data holds no batch"),
        ({"data": 5}, ArgumentTypeError, "batches"),
        ({"evaluate": 5}, ArgumentTypeError, "evaluate is a int, expected a function"),
        ({"evaluate": None, "data": None}, ArgumentError, "something to go by"),
        ({"evaluate": lambda model: 0.5, "data": None}, ArgumentError, "does not call the Sequential"),
        ({"evaluate": lambda model: None}, ArgumentTypeError, "returned a NoneType.*with an order"),
    ],
)
def test_arguments_that_cannot_be_are_refused_and_the_model_is_as_it_was(wrong, error, said):
    model = build()
    before = state(model)
    given = {"evaluate": agreement, "data": BATCHES, **wrong}
    with pytest.raises(error, match=said):
        qp.search(model, **given)
    assert_same(before, state(model))


def test_a_prepared_model_is_searched_first():
    with qp.quantize_modules():
        model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    qp.prepare(model, torch.randn(1, 1, 4, 4))
    with pytest.raises(ArgumentError, match="search first, then prepare"):
        qp.search(model, data=torch.randn(1, 1, 4, 4))


# --- budget and resume ------------------------------------------------------------------------------


def test_a_budget_is_kept_and_the_best_so_far_is_the_result():
    calls = []
    result = qp.search(
        build(),
        lambda m: calls.append(1) or agreement(m),
        candidates=CANDIDATES,
        data=BATCHES,
        budget=5,
        max_drop=0.02,
    )
    assert len(calls) == result.evaluations == 5
    assert result.stopped == "the budget is used up"
    assert result.metric >= 0.98


def test_a_budget_for_all_that_are_cheaper_tries_all(every):
    result = qp.search(
        build(), agreement, candidates=THREE, data=BATCHES, max_drop=0.02, budget=len(every) + 2
    )
    cheaper = {recipes for recipes, (cost, _) in every.items() if cost < result.cost}
    assert cheaper <= {point.recipes for point in result.points}


def test_a_budget_may_be_a_time(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("quantpatch.mixed_precision.evaluations.time.monotonic", lambda: next(clock))
    result = qp.search(build(), agreement, candidates=CANDIDATES, data=BATCHES, budget=timedelta(seconds=5))
    assert result.stopped == "the budget is used up"
    assert 2 <= result.evaluations <= 5


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "search.json"
    whole = qp.search(build(), agreement, candidates=CANDIDATES, data=BATCHES)
    model = build()
    with pytest.raises(KeyboardInterrupt):
        qp.search(
            model, failing_after(5, KeyboardInterrupt()), candidates=CANDIDATES, data=BATCHES, resume=path
        )
    result = qp.search(model, agreement, candidates=CANDIDATES, data=BATCHES, resume=path)
    assert result.resumed == 5
    assert result.evaluations == whole.evaluations - 5
    assert result.points == whole.points
    assert [p.name for p in tmp_path.iterdir()] == ["search.json"]
    assert "5 more from the file" in " ".join(str(result).split())
    # Another drop needs other configurations, and takes those that are known.
    again = qp.search(build(), agreement, candidates=CANDIDATES, data=BATCHES, resume=path, max_drop=0.05)
    assert again.resumed > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[4].bias.data.add_(1),
        {"candidates": ["int8", "w4a8", None]},
        {"candidates": ["int8", "w4a8", COARSE.replace(input=None), None]},
        {"data": [10 * X]},
    ],
)
def test_results_of_something_else_are_not_taken_for_these(change, tmp_path):
    path, model = tmp_path / "search.json", build()
    given = {"candidates": CANDIDATES, "data": BATCHES, "resume": path}
    qp.search(copy.deepcopy(model), agreement, **given)
    if callable(change):
        change(model)
    else:
        given |= change
    before = path.read_text()
    with pytest.raises(FileError, match="of other weights, ranges or settings; delete it"):
        qp.search(model, agreement, **given)
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["", "[]", '{"model": "", "results": {"float": NaN}}', '{"results": {}}'])
def test_a_file_of_something_else_is_an_error(text, tmp_path):
    path = tmp_path / "search.json"
    path.write_text(text)
    with pytest.raises(FileError, match=r"search\.json holds no results of search"):
        qp.search(build(), agreement, candidates=CANDIDATES, data=BATCHES, resume=path)
    assert path.read_text() == text


def test_what_a_file_cannot_keep_is_refused_with_resume(tmp_path):
    with pytest.raises(ArgumentTypeError, match="cannot keep"):
        qp.search(
            build(),
            lambda m: frozenset({agreement(m)}),
            max_drop=lambda reference, metric: True,
            candidates=["int8"],
            data=BATCHES,
            resume=tmp_path / "search.json",
        )


# --- the result -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return qp.search(build(), agreement, candidates=CANDIDATES, data=BATCHES, max_drop=0.02)


def test_the_frontier_has_the_chosen_configuration_and_nothing_that_another_beats(result):
    costs = [point.cost for point in result.frontier]
    metrics = [point.metric for point in result.frontier]
    assert costs == sorted(costs)
    assert metrics == sorted(metrics)
    chosen = [point for point in result.frontier if point.cost == result.cost]
    assert [point.metric for point in chosen] == [result.metric]
    assert chosen[0].keeps
    assert not any(point.keeps for point in result.frontier if point.cost < result.cost)
    assert set(result.frontier) <= set(result.points)


def test_it_prints_its_tables_and_is_json(result, monkeypatch):
    for width in ("60", "80", "200"):
        monkeypatch.setenv("COLUMNS", width)
        text = str(result)
        assert max(map(len, text.splitlines())) <= int(width)
        assert "Frontier: cost against metric" in text
        assert "chosen" in text
        assert f"{result.evaluations} evaluations in" in " ".join(text.split())
    data = json.loads(result.to_json())
    assert data["rows"][0]["layers"] == ["0"]
    assert data["frontier"][0].keys() == {"cost", "metric", "noise", "keeps", "recipes"}
    assert not any(key.startswith("_") for key in data)


def test_layers_that_are_alike_are_one_row_where_there_is_little_room(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(70)))
    result = qp.search(model, data=torch.randn(2, 4), candidates=["int8"], max_drop=1)
    monkeypatch.setenv("COLUMNS", "80")
    assert "* (70)" in str(result)
    assert len(str(result).splitlines()) < 20


def test_a_picture_without_matplotlib_is_an_error_with_the_line_that_installs_it(
    result, monkeypatch, tmp_path
):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'quantpatch\[report\]'"):
        result.picture(tmp_path / "frontier.svg")


def test_a_picture_shows_cost_against_metric(result, tmp_path):
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert result.picture(tmp_path / "frontier.svg") == tmp_path / "frontier.svg"
    assert "<svg" in (tmp_path / "frontier.svg").read_text()
    with pytest.raises(ArgumentError, match="the ending says the kind of picture, one of .*svg"):
        result.picture(tmp_path / "frontier.xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["frontier.svg"]


def test_candidates_may_be_tuned_and_the_layers_that_get_them_have_the_tuned_weights():
    model = build()
    float_weights = {name: p.clone() for name, p in model.named_parameters()}
    candidates = [COARSE, (COARSE, "gptq"), None]
    result = qp.search(model, data=BATCHES, max_drop=0.02, candidates=candidates, progress=False)
    tuned = [row.layers[0] for row in result.rows if row.recipe == "w3a8 + gptq"]
    assert tuned
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            changed = not torch.equal(layer.weight, float_weights[f"{name}.weight"])
            assert changed == (name in tuned)
    # The same noise for the same bits costs less where rounding was learned.
    assert all(row.noise["w3a8 + gptq"] <= row.noise["w3a8"] for row in result.rows)
    with torch.no_grad():
        found, wanted = model(X), build()(X)
    assert 1 - float((found - wanted).square().mean() / wanted.square().mean()) == pytest.approx(
        result.metric
    )
    qp.revert(model)
    assert all(torch.equal(p, float_weights[name]) for name, p in model.named_parameters())


def test_methods_that_change_more_than_layers_are_refused_and_the_model_is_as_it_was():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    before = state(model)
    with pytest.raises(ArgumentError, match=r"change 0\.bias, 0\.weight, and not only"):
        qp.search(model, data=BATCHES, candidates=[("int8", "smoothquant"), None], progress=False)
    assert_same(before, state(model))
    qp.convert(model, "int8")
    qp.tune(model, BATCHES, method="gptq", progress=False)
    with pytest.raises(ArgumentError, match="is tuned already, at 1"):
        qp.search(model, data=BATCHES, candidates=[("w4a8", "gptq"), None], progress=False)


def test_an_evaluation_that_fails_leaves_float_weights_where_candidates_are_tuned():
    model = build()
    before = state(model)
    calls = itertools.count()

    def evaluate(model):
        if next(calls) == 2:  # of a configuration, after two of the float model
            raise KeyboardInterrupt
        return agreement(model)

    with pytest.raises(KeyboardInterrupt):
        candidates = [COARSE, (COARSE, "gptq")]
        qp.search(model, evaluate, data=BATCHES, max_drop=0.5, candidates=candidates, progress=False)
    assert_same(before, state(model))
