"""``calibrate`` and ``calibrating``: all ranges or none, and every state as before."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
from gloo import join
from torch import nn

import quantpatch as qp
from quantpatch.calibrators import MaxCalibrator
from quantpatch.errors import (
    ArgumentError,
    CalibrationError,
    InputError,
    PluginError,
    QuantPatchWarning,
    UnknownNameError,
)
from quantpatch.layers.quantizer import named_quantizers


def build():
    torch.manual_seed(0)
    with qp.quantize_modules():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 4)
        )


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x, *, twice=False):
        y = self.used(x)
        return self.used(y) if twice else y


def two_branches():
    with qp.quantize_modules():
        return TwoBranches()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)]


def ranges(model):
    return {name: q.amax for name, q in named_quantizers(model).items()}


def states(model):
    return {
        name: (q.state, q.calibrating, q.quantizing, q.calibrator)
        for name, q in named_quantizers(model).items()
    }


def test_input_range_is_the_largest_magnitude_of_all_batches(batches):
    model = build()
    qp.calibrate(model, batches)
    assert model[0].input_quantizer.amax == torch.cat(batches).abs().max()


def test_weight_range_is_the_largest_magnitude_of_each_output_channel(batches):
    model = build()
    qp.calibrate(model, batches)
    expected = model[0].weight.detach().abs().amax((1, 2, 3), keepdim=True)
    assert torch.equal(model[0].weight_quantizer.amax, expected)


def test_later_layers_see_the_float_activations_of_the_layers_before(batches):
    model = build()
    twin = copy.deepcopy(model).eval()
    for quantizer in named_quantizers(twin).values():
        quantizer.disable()
    qp.calibrate(model, batches)
    with torch.no_grad():
        hidden = torch.cat([twin[:5](batch) for batch in batches])
    assert model[5].input_quantizer.amax == hidden.abs().max()


def test_quantizers_with_ranges_of_their_own_let_the_data_pass_in_float_too(batches):
    model = build()
    model[0].input_quantizer = qp.TensorQuantizer(qp.QuantDescriptor(num_bits=2, amax=0.1))
    model[0].weight_quantizer = qp.TensorQuantizer(qp.QuantDescriptor(num_bits=2, dynamic=True))
    float_twin = build()
    qp.calibrate(model, batches)
    qp.calibrate(float_twin, batches)
    assert model[5].input_quantizer.amax == float_twin[5].input_quantizer.amax
    assert [model[0].input_quantizer.state, model[0].weight_quantizer.state] == ["calibrated", "dynamic"]


def test_batch_norm_statistics_do_not_move_and_training_modes_come_back_module_by_module(batches):
    model = build().train()
    model[1].eval()
    before = model[1].running_mean.clone()
    qp.calibrate(model, batches)
    assert torch.equal(model[1].running_mean, before)
    assert model.training
    assert model[0].training
    assert not model[1].training


def test_ranges_are_calibrated_and_quantizing_afterwards(batches):
    model = build()
    qp.calibrate(model, batches)
    assert {q.state for q in named_quantizers(model).values()} == {"calibrated"}


@pytest.mark.parametrize("method", ["max", "moving_average", "entropy", "mse", "percentile", "sqnr"])
def test_every_built_in_method_gives_a_range_within_the_data(method, batches):
    model = build()
    qp.calibrate(model, batches, method=method)
    amax = model[0].input_quantizer.amax
    assert 0 < amax <= torch.cat(batches).abs().max() * (1 + 1 / 1024)


def test_options_reach_the_calibrators_of_activations_only(batches):
    model = build()
    qp.calibrate(model, batches, method="percentile", percentile=50.0)
    values = torch.cat(batches).abs()
    assert model[0].input_quantizer.amax == pytest.approx(values.median().item(), rel=0.01)
    assert torch.equal(
        model[0].weight_quantizer.amax, model[0].weight.detach().abs().amax((1, 2, 3), keepdim=True)
    )


def test_a_batch_may_be_a_tuple_of_arguments_or_a_dict_of_keywords():
    model = two_branches()
    x = torch.randn(2, 4)
    with pytest.warns(QuantPatchWarning, match="unused"):
        qp.calibrate(model, [(x,), {"x": 3 * x}], strict=False)
    assert model.used.input_quantizer.amax == (3 * x).abs().max()


def test_a_bare_tensor_is_one_batch(batches):
    model = build()
    qp.calibrate(model, batches[0])
    assert model[0].input_quantizer.amax == batches[0].abs().max()


def test_a_callable_gets_the_model_and_runs_it_without_gradients(batches):
    model = build()
    seen = []

    def run(given):
        seen.append((given is model, torch.is_grad_enabled(), given.training))
        given(batches[0])

    qp.calibrate(model, run)
    assert seen == [(True, False, False)]
    assert model[0].input_quantizer.amax == batches[0].abs().max()


def test_the_block_leaves_the_loop_to_the_user(batches):
    model = build()
    with qp.calibrating(model, method="max"):
        for batch in batches:
            model(batch)
    assert model[0].input_quantizer.amax == torch.cat(batches).abs().max()


def assert_untouched(model, before, modes):
    assert states(model) == before
    assert all(amax is None for amax in ranges(model).values())
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_nothing_is_set_and_everything_is_restored_when_the_data_source_raises(error, where, batches):
    model = build()
    model[1].eval()
    before, modes = states(model), [m.training for m in model.modules()]

    def source():
        if where == "last":
            yield from batches
        raise error("disk")

    with pytest.raises(error, match="disk"):
        qp.calibrate(model, source())
    assert_untouched(model, before, modes)


@pytest.mark.parametrize("stage", ["iter", "function", "block"])
def test_whatever_fails_while_data_is_given_sets_nothing_and_restores_everything(stage, batches):
    model = build()
    before, modes = states(model), [m.training for m in model.modules()]

    class Source:
        def __iter__(self):
            raise KeyError("disk")

    def run(given):
        given(batches[0])
        raise KeyError("disk")

    def in_block():
        with qp.calibrating(model):
            run(model)

    with pytest.raises(KeyError, match="disk"):
        in_block() if stage == "block" else qp.calibrate(model, Source() if stage == "iter" else run)
    assert_untouched(model, before, modes)


TERMINALS = [(True, True, True), (True, False, False), (False, True, False)]


@pytest.mark.parametrize(("terminal", "progress", "shown"), TERMINALS)
def test_progress_is_shown_on_a_terminal(terminal, progress, shown, batches, capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    qp.calibrate(build(), batches, progress=progress)
    printed = capsys.readouterr().err
    assert "Calibrating" in printed if shown else printed == ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_an_error_that_names_the_quantizer(bad, batches):
    model = build()
    before, modes = states(model), [m.training for m in model.modules()]
    batches[1][0, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match=r"0\.input_quantizer.*batch 2") as caught:
        qp.calibrate(model, batches)
    assert caught.value.quantizers == ("0.input_quantizer",)
    assert_untouched(model, before, modes)


def test_only_zeros_are_an_error_that_names_the_quantizer():
    model = build()
    before, modes = states(model), [m.training for m in model.modules()]
    with pytest.raises(CalibrationError, match="only zeros: 0.input_quantizer") as caught:
        qp.calibrate(model, [torch.zeros(2, 3, 8, 8)])
    assert caught.value.quantizers == ("0.input_quantizer",)
    assert_untouched(model, before, modes)


def test_a_weight_that_is_all_zero_is_fine(batches):
    model = build()
    nn.init.zeros_(model[5].weight)
    qp.calibrate(model, batches)
    assert not model[5].weight_quantizer.amax.any()
    assert torch.isfinite(model(batches[0])).all()


def test_layers_that_saw_no_data_are_an_error_that_names_them():
    model = two_branches()
    with pytest.raises(CalibrationError) as caught:
        qp.calibrate(model, [torch.randn(2, 4)])
    assert caught.value.quantizers == ("unused.input_quantizer", "unused.weight_quantizer")
    assert model.used.input_quantizer.amax is None
    assert "qp.configure(model, {'unused': None})" in str(caught.value)
    qp.configure(model, {"unused": None})
    qp.calibrate(model, [torch.randn(2, 4)])


def test_not_strict_sets_the_others_and_warns_of_those_without_data():
    model = two_branches()
    with pytest.warns(QuantPatchWarning, match=r"unused\.input_quantizer, unused\.weight_quantizer"):
        qp.calibrate(model, [torch.randn(2, 4)], strict=False)
    assert model.used.input_quantizer.amax is not None
    assert model.unused.input_quantizer.state == "dynamic (not calibrated)"


@pytest.mark.parametrize("as_block", [False, True])
def test_the_warning_points_at_the_line_that_calibrates(as_block):
    model = two_branches()

    def in_block():
        with qp.calibrating(model, strict=False):
            model(torch.randn(2, 4))

    with pytest.warns(QuantPatchWarning) as caught:
        in_block() if as_block else qp.calibrate(model, [torch.randn(2, 4)], strict=False)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    "options", [{}, {"strict": False}, {"existing": "overwrite"}, {"existing": "keep"}], ids=str
)
@pytest.mark.parametrize("recipe", ["mxfp8", "mxfp4", "nvfp4", "int4-weight-only"])
def test_formats_without_ranges_go_through_the_same_script_and_it_is_said(recipe, options, caplog):
    with qp.quantize_modules(recipe=recipe):
        model = nn.Sequential(nn.Linear(32, 2))
    before, ran = copy.deepcopy(model.state_dict()), []
    qp.calibrate(model, lambda m: ran.append(m), **options)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("quantpatch", "WARNING")
    count = len([q for q in model.modules() if isinstance(q, qp.TensorQuantizer)])
    assert (
        f"nothing to calibrate in the quantizers of Sequential ({count} of {count}: takes" in record.message
    )
    assert ran == []
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    with qp.calibrating(model, **options):
        assert model(torch.randn(2, 32)).shape == (2, 2)


def test_where_no_range_is_missing_nothing_is_done_and_it_is_said(batches, caplog):
    model = build()
    model[0].input_quantizer.disable()
    qp.calibrate(model, batches)
    before = copy.deepcopy(model.state_dict())
    qp.calibrate(model, [100 * x for x in batches], existing="keep")
    assert "5: has a range already; 1 of 5: is disabled" in caplog.records[0].message.replace("4 of 5", "5")
    for key, value in model.state_dict().items():  # that of the quantizer which is off is NaN
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_formats_without_ranges_are_distinguished_from_models_without_quantizers():
    with pytest.raises(CalibrationError, match="holds no quantizer"):
        qp.calibrate(nn.Sequential(nn.Linear(32, 2)), [torch.randn(2, 32)])


@pytest.mark.parametrize("learn_amax", [False, True])
def test_a_model_calibrated_in_inference_mode_trains(learn_amax):
    with qp.quantize_modules(recipe=qp.Recipe(name="r", input=qp.QuantDescriptor(learn_amax=learn_amax))):
        model, again = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 2))
    x = torch.randn(2, 4)
    with torch.inference_mode():
        qp.calibrate(model, [x])
        again.load_state_dict(model.state_dict())
    for each in (model, again):
        each(x).sum().backward()
        assert each[0].weight.grad.any()


def test_learned_ranges_are_calibrated_before_the_model_is_distributed(tmp_path):
    """Where data shows their shape they would be parameters that nobody averages over the ranks."""
    recipe = qp.Recipe(name="learned", input=qp.QuantDescriptor(axis=1, learn_amax=True))
    with qp.quantize_modules(recipe=recipe):
        model = nn.Sequential(nn.Linear(4, 2))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(CalibrationError, match="then wrap it") as caught:
            qp.calibrate(wrapped, [torch.randn(2, 4)])
        assert caught.value.quantizers == ("module.0.input_quantizer",)
        with pytest.warns(qp.QuantPatchWarning, match="after DistributedDataParallel took the model"):
            qp.calibrate(model, [torch.randn(2, 4)])
        qp.calibrate(nn.parallel.DistributedDataParallel(model), [torch.randn(2, 4)], existing="overwrite")
    finally:
        dist.destroy_process_group()


def test_empty_data_is_an_error_and_sets_nothing():
    model = build()
    with pytest.raises(CalibrationError, match="no batch"):
        qp.calibrate(model, [])
    assert all(amax is None for amax in ranges(model).values())


def test_empty_batches_are_no_data():
    model = two_branches()
    with pytest.raises(CalibrationError, match="saw no data"):
        qp.calibrate(model, [torch.randn(0, 4)])


def test_a_second_calibration_is_an_error_that_says_how_to_ask_for_it(batches):
    model = build()
    qp.calibrate(model, batches[:1])
    first = model[0].input_quantizer.amax.clone()
    with pytest.raises(CalibrationError, match="existing='overwrite'"):
        qp.calibrate(model, [10 * batches[0]])
    assert model[0].input_quantizer.amax == first
    qp.calibrate(model, [10 * batches[0]], existing="overwrite")
    assert model[0].input_quantizer.amax == 10 * first


@pytest.mark.parametrize("zero_points", [False, True])
def test_only_missing_ranges_are_found_and_the_others_stay(batches, zero_points):
    model = build()
    qp.calibrate(model, batches)
    qp.configure(model, {"5": "int4"})
    with pytest.raises(CalibrationError, match="existing='keep' to find the ranges of the 2 others, or exi"):
        qp.calibrate(model, batches)
    before = copy.deepcopy(model[0])
    fresh = copy.deepcopy(model)
    qp.calibrate(fresh, [10 * x for x in batches], zero_points=zero_points, existing="overwrite")
    qp.calibrate(model, [10 * x for x in batches], zero_points=zero_points, existing="keep")
    assert model[0].input_quantizer.descriptor == before.input_quantizer.descriptor
    assert all(map(torch.equal, model[0].state_dict().values(), before.state_dict().values()))
    assert model[5].input_quantizer.descriptor == fresh[5].input_quantizer.descriptor
    assert all(map(torch.equal, model[5].state_dict().values(), fresh[5].state_dict().values()))
    with pytest.raises(CalibrationError, match=r"5 quantizers have a range already.*existing=.overwrite"):
        qp.calibrate(model, batches)


def test_what_becomes_of_known_ranges_is_one_of_three_words(batches):
    model = build()
    before = states(model)
    with pytest.raises(ArgumentError, match="existing='missing': expected 'error', .*'keep' .*'overwrite'"):
        qp.calibrate(model, batches, existing="missing")
    assert states(model) == before


def test_ranges_of_layers_that_do_not_run_stay_when_the_others_are_overwritten():
    model = two_branches()
    qp.calibrate(model, lambda m: (m.used(torch.ones(1, 4)), m.unused(torch.ones(1, 4))))
    with pytest.warns(QuantPatchWarning, match="They stay as they are"):
        qp.calibrate(model, [3 * torch.ones(1, 4)], existing="overwrite", strict=False)
    assert (model.used.input_quantizer.amax, model.unused.input_quantizer.amax) == (3.0, 1.0)


def test_where_a_layer_ran_without_one_of_its_inputs_the_rule_to_leave_it_float_names_that_alone():
    with qp.quantize_modules():
        model = nn.Sequential(nn.LSTMCell(4, 4))
    with pytest.raises(CalibrationError, match=r"no format takes: 0\.hidden_quantizer") as caught:
        qp.calibrate(model, [torch.randn(2, 4)])
    assert "qp.configure(model, {'0.hidden_quantizer': None})" in str(caught.value)
    qp.configure(model, {"0.hidden_quantizer": None})
    qp.calibrate(model, [torch.randn(2, 4)])


def test_overwrite_keeps_the_old_ranges_if_it_fails(batches):
    model = build()
    qp.calibrate(model, batches)
    before = {name: amax.clone() for name, amax in ranges(model).items()}
    with pytest.raises(CalibrationError):
        qp.calibrate(model, [torch.full((1, 3, 8, 8), torch.nan)], existing="overwrite")
    assert all(torch.equal(amax, before[name]) for name, amax in ranges(model).items())


def test_calibrating_inside_calibrating_is_an_error(batches):
    model = build()
    with (
        pytest.raises(CalibrationError, match="being calibrated already"),
        qp.calibrating(model),
        qp.calibrating(model),
    ):
        pass
    assert {q.state for q in named_quantizers(model).values()} == {"dynamic (not calibrated)"}


def test_an_unknown_method_is_an_error_with_near_misses(batches):
    model = build()
    with pytest.raises(UnknownNameError, match="Did you mean 'entropy'"):
        qp.calibrate(model, batches, method="entropi")
    assert states(model) == states(build())


def test_an_option_that_the_method_does_not_have_is_an_error_that_lists_those_it_has(batches):
    model = build()
    with pytest.raises(CalibrationError, match="'percentile' has no option 'percent'.*num_bins, percentile"):
        qp.calibrate(model, batches, method="percentile", percent=99.0)
    assert states(model) == states(build())


def test_a_float_model_is_an_error_that_says_what_to_write():
    with pytest.raises(CalibrationError, match="with quantize_modules"):
        qp.calibrate(nn.Linear(2, 2), [torch.randn(1, 2)])


def test_data_parallel_is_refused():
    with pytest.raises(CalibrationError, match=r"model\.module"):
        qp.calibrate(nn.DataParallel(build()), [])


def test_a_pair_of_input_and_label_is_explained(batches):
    model = build()
    with pytest.raises(InputError, match=r"\(input for input, \*_ in data\)"):
        qp.calibrate(model, [(batches[0], torch.zeros(4))])


def test_disabled_quantizers_and_given_ranges_are_left_alone(batches):
    recipe = qp.Recipe(name="fixed", input=qp.QuantDescriptor(amax=7.0))
    with qp.quantize_modules(recipe=recipe):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight_quantizer.disable()
    qp.calibrate(model, [torch.randn(2, 4)])
    assert model[0].input_quantizer.amax == 7.0
    assert model[0].weight_quantizer.amax is not None
    assert model[1].weight_quantizer.amax is None


def test_scale_amax_scales_the_range_once():
    recipe = qp.Recipe(name="half", input=qp.QuantDescriptor(scale_amax=0.5))
    with qp.quantize_modules(recipe=recipe):
        model = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    qp.calibrate(model, [x])
    qp.calibrate(model, [x], existing="overwrite")
    assert model.input_quantizer.amax == 0.5 * x.abs().max()


def test_a_shared_layer_is_calibrated_over_all_its_calls():
    model = two_branches()
    x = torch.randn(2, 4)
    model.unused = nn.Identity()
    qp.calibrate(model, [{"x": x, "twice": True}])
    with torch.no_grad():
        second = nn.functional.linear(x, model.used.weight, model.used.bias)
    assert model.used.input_quantizer.amax == torch.cat([x, second]).abs().max()


def test_a_compiled_model_is_calibrated_without_compiling(batches):
    model = build()

    def refuse(graph, inputs):
        raise AssertionError("compiled")

    qp.calibrate(torch.compile(model, backend=refuse), batches)
    assert model[0].input_quantizer.amax is not None


FAULTS = {  # what the other rank raises, and rank 1 itself, of whose data, model or call something is wrong
    "data": ("rank 1 failed: CalibrationError: 0.input_quantizer: 96", "Error: 0.input_quantizer: 96 of"),
    "source": ("rank 1 failed: ZeroDivisionError: division by zero. No range", "ZeroDivisionError: "),
    "start": ("rank 1 failed: UnknownNameError: unknown cal", "UnknownNameError: unknown calibrator"),
    "model": ("only one of them has 2.input_quantizer.", "only one of them has 2.input_quantizer."),
}


def calibrated_by(rank, world, method="max", fault=""):
    """The ranges of a model that a rank of several calibrates, or what is raised."""
    torch.manual_seed(0)
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    data = torch.randn(8, 16, 6, generator=torch.Generator().manual_seed(2))
    batches = list(data[rank::world])
    if rank == 1 and fault == "data":
        batches[2] = torch.full((16, 6), torch.nan)
    if rank == 1 and fault == "source":
        batches = (1 / 0 for _ in range(3))
    if rank == 1 and fault == "model":
        model[2].input_quantizer.disable()
    if rank == 1 and fault == "start":
        method = "entropi"
    try:
        qp.calibrate(model, batches, method=method)
    except Exception as error:
        assert {q.amax for q in named_quantizers(model).values()} == {None}
        assert model.training
        assert model[0].input_quantizer.state == "dynamic (not calibrated)"
        return f"{type(error).__name__}: {error}"
    return [q.amax.flatten() for q in named_quantizers(model).values()]


def run_rank(rank, folder):
    join(rank, folder, 2)
    found = {method: calibrated_by(rank, 2, method) for method in ("max", "percentile")}
    found |= {fault: calibrated_by(rank, 2, fault=fault) for fault in FAULTS}
    found["afterwards"] = calibrated_by(rank, 2)
    if rank == 0:
        found["gone"] = calibrated_by(rank, 2)
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(by_ranks):
    return by_ranks(run_rank, 2)


@pytest.mark.parametrize("method", ["max", "percentile"])
def test_two_processes_get_the_ranges_of_one_that_saw_everything(method, ranks):
    alone, first, second = calibrated_by(0, 1, method), *(found[method] for found in ranks)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, alone, first))


def test_if_one_rank_fails_all_raise_and_name_it_and_the_next_calibration_works(ranks):
    zero, one = ranks
    for fault, (on_the_others, on_itself) in FAULTS.items():
        assert zero[fault].startswith("CalibrationError: rank 1 ")
        assert on_the_others in zero[fault]
        assert on_itself in one[fault]
    for found in ranks:
        assert all(map(torch.equal, found["afterwards"], found["max"]))


def test_a_rank_that_is_gone_leaves_nobody_waiting(ranks):
    assert "another rank is gone" in ranks[0]["gone"]


# --- Calibrators of plugins -----------------------------------------------------------------------


class HalfOfMax(MaxCalibrator):
    def _range(self):
        return super()._range() / 2


def test_a_plugins_calibrator_is_found_by_its_name(plugin):
    plugin("mylib", calibrators={"half_of_max": HalfOfMax})
    with qp.quantize_modules():
        layer = nn.Linear(4, 3)
    x = torch.randn(8, 4)
    qp.calibrate(layer, x, method="half_of_max")
    assert torch.equal(layer.input_quantizer.amax, x.abs().max() / 2)
    assert torch.equal(layer.weight_quantizer.amax, layer.weight.detach().abs().amax(1, keepdim=True))


CALIBRATORS = """
    import quantpatch
    from quantpatch.calibrators import PercentileCalibrator
    class Share(PercentileCalibrator):
        def __init__(self, format, axis=None, *, share=0.5):
            super().__init__(format, axis, percentile=100 * share)
    @quantpatch.hookimpl
    def quantpatch_calibrators():
        return {"share": Share}
"""


def test_the_calibrator_of_an_installed_distribution_is_found_by_its_name(install, tmp_path):
    install("shares", textwrap.dedent(CALIBRATORS))
    code = """
        import torch, quantpatch as qp
        with qp.quantize_modules():
            layer = torch.nn.Linear(4, 3)
        x = torch.arange(1.0, 401).reshape(100, 4)
        qp.calibrate(layer, x, method="share", share=0.25)
        print(layer.input_quantizer.amax.item())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(100, rel=0.01)


def test_a_calibrator_under_a_name_that_is_taken_names_both_plugins(plugin):
    plugin("mylib", calibrators={"max": HalfOfMax})
    with pytest.raises(
        PluginError, match="plugin 'mylib' returned 'max' .* 'quantpatch.builtin' has already"
    ):
        qp.registry.calibrator("max")


class LastIsNone(MaxCalibrator):
    """The range of the weight that has three channels is none."""

    def _range(self):
        return -self._amax if self._amax.shape == (3, 1) else self._amax


def test_a_calibrator_that_gives_no_range_sets_none_on_any_quantizer(plugin):
    plugin("mylib", calibrators={"last_is_none": LastIsNone})
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    before, modes = states(model), [m.training for m in model.modules()]
    with pytest.raises(
        CalibrationError, match=r"1\.weight_quantizer: LastIsNone gives .*not negative"
    ) as caught:
        qp.calibrate(model, torch.randn(8, 4), weight_method="last_is_none")
    assert caught.value.quantizers == ("1.weight_quantizer",)
    assert_untouched(model, before, modes)


@pytest.mark.parametrize("returned", [{"mine": 3}, {"mine": nn.Linear}, [HalfOfMax]])
def test_what_is_not_a_calibrator_is_refused_as_its_plugins_fault(plugin, returned):
    plugin("mylib", calibrators=returned)
    with pytest.raises(PluginError, match="plugin 'mylib' returned .*quantpatch_calibrators"):
        qp.registry.calibrator("mine")


def test_quantizers_that_are_replaced_while_they_are_calibrated_are_an_error():
    with qp.quantize_modules():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with (
        pytest.raises(CalibrationError, match=r"2 quantizers were replaced .*0\.input_quantizer"),
        qp.calibrating(model),
    ):
        model(torch.randn(4, 2))
        qp.configure(model, {"0": "int4"})
    assert all(
        q.amax is None and q.quantizing and not q.calibrating for q in named_quantizers(model).values()
    )


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.fft.fft(self.layer(x))
        return (y @ y.mT).abs()


@pytest.mark.filterwarnings("ignore:.*multiplies tensors of complex64")
def test_quantizers_of_the_model_itself_without_data_are_left_float_by_their_names() -> None:
    with qp.quantize_modules(operations="products"):
        model = Spectrum()
    batches = [torch.randn(3, 4)]
    with pytest.raises(CalibrationError, match="that no format takes") as caught:
        qp.calibrate(model, batches, progress=False)
    assert "{'matmul_0_left_quantizer': None, 'matmul_0_right_quantizer': None}" in str(caught.value)
    qp.configure(model, {"matmul_0_left_quantizer": None, "matmul_0_right_quantizer": None})
    qp.calibrate(model, batches, progress=False)
    assert model.layer.input_quantizer.amax is not None
