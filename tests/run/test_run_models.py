"""The models that a script runs: found without being named, calibrated in its own calls, audited in one."""

from __future__ import annotations

import copy
import functools
import threading
import warnings

import pytest
import torch
import torch._dynamo
import torch.utils.checkpoint
from torch import nn

import quantpatch as qp
from quantpatch import quantize_modules
from quantpatch.errors import CalibrationError
from quantpatch.layers.quantizer import named_quantizers
from quantpatch.run.models import WatchedModels, _Eager
from quantpatch.run.settings import RunSettings


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        if x is None:
            raise ValueError("no input")
        return self.second(self.first(x).relu())


@pytest.fixture
def watch():
    watches = []

    def start(calibrate=0, audit=False, rules=()):
        watches.append(WatchedModels(calibrate, audit=audit, rules=rules))
        return watches[-1]

    yield start
    for watched in watches:
        watched.close()


def build(cls=Net, **options):
    torch.manual_seed(0)
    with quantize_modules(**options):
        return cls()


def ranges(model):
    return {name: q.amax for name, q in named_quantizers(model).items()}


def test_zero_points_are_found_in_the_first_calls():
    watches = WatchedModels(1, {"zero_points": True, "existing": "keep"}, audit=False)
    model, x = build(), torch.rand(16, 4) - 0.2
    model(x)
    watches.close()
    assert 40 < model.first.input_quantizer.zero_point < 60
    assert model.second.input_quantizer.format.name == "uint8"  # after the ReLU


def test_the_first_calls_calibrate_in_float_with_gradients_and_the_scripts_own_mode(watch):
    watched = watch(calibrate=2)
    model, modes = build(), []
    model.first.register_forward_hook(lambda module, *_: modes.append(module.training))
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plain.load_state_dict(
        {k.replace("first", "0").replace("second", "2"): v for k, v in qp.float_state_dict(model).items()}
    )
    for scale in (1.0, 3.0):
        x = torch.full((2, 4), scale)
        out = model(x)
        assert torch.equal(out, plain(x))  # float, bit for bit
        out.sum().backward()
        assert model.first.weight.grad is not None
    assert modes == [True, True]
    assert model.first.input_quantizer.amax.item() == 3.0
    assert all(amax is not None for amax in ranges(model).values())
    out = model(torch.full((2, 4), 50.0))
    assert not torch.equal(out, plain(torch.full((2, 4), 50.0)))  # quantized now, and clipped
    assert model.first.input_quantizer.amax.item() == 3.0
    assert watched.notes() == ("Net: 4 of 4 quantizers calibrated in 2 calls",)


def test_calibration_goes_by_the_options_that_were_given():
    model, x = build(), torch.randn(5000, 4)
    qp.calibrate(model, x)
    watched = WatchedModels(
        1, {"method": "percentile", "weight_method": "max", "existing": "overwrite"}, audit=False
    )
    model(x)
    watched.close()
    expected = build()
    qp.calibrate(expected, x, method="percentile", weight_method="max")
    assert all(map(torch.equal, ranges(model).values(), ranges(expected).values()))
    assert model.first.input_quantizer.amax < x.abs().max()
    assert watched.notes() == ("Net: 4 of 4 quantizers calibrated in 1 calls",)


def test_models_that_ran_too_little_or_not_as_a_whole_are_reported_by_name(watch):
    class Branch(Net):
        def forward(self, x):
            return self.first(x)

    watched = watch(calibrate=2, audit=True)
    short, partial, exact = build(), build(Branch), build()
    short(torch.ones(1, 4))
    for model in (partial, exact):
        model(torch.ones(1, 4))
        model(torch.ones(1, 4))
    notes = watched.notes()
    assert any(n.startswith("Net: ran 1 of the 2 calls that calibrate it") for n in notes)
    (unseen,) = [note for note in notes if "saw no data" in note]
    assert unseen.startswith("Branch: 2 of 4 quantizers saw no data")
    assert "second.input_quantizer, second.weight_quantizer" in unseen
    assert "Branch: 2 of 4 quantizers calibrated in 2 calls" in notes
    assert "Net (2): not audited: every call that it ran calibrated it" in notes
    watched.close()
    assert set(ranges(short).values()) == {None}
    assert all(q.quantizing and not q.calibrating for q in named_quantizers(short).values())


def test_the_audit_is_that_of_the_scripts_own_call(watch):
    watched = watch(calibrate=1, audit=True)
    model, calls = build(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    model.second.input_quantizer.disable()
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
    assert len(calls) == 3  # nothing was run in between
    (audit,) = watched.audits()
    assert "Net: 66.7% of 96 multiply-accumulates quantized" in audit
    assert "input_quantizer of QuantLinear is switched off" in " ".join(audit.split())


def test_only_what_is_called_from_outside_is_a_model(watch):
    watched = watch(audit=True)
    outer = nn.Sequential(build(), nn.ReLU())
    outer(torch.ones(1, 4))
    nn.Linear(4, 4)(torch.ones(1, 4))  # float
    nn.CrossEntropyLoss()(torch.ones(1, 2), torch.tensor([1]))
    assert [audit.split(":")[0].strip() for audit in watched.audits()] == ["Sequential"]


def test_parts_that_backward_computes_again_are_no_models(watch):
    class Checkpointed(Net):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    watched = watch(calibrate=1, audit=True)
    model = build(Checkpointed)
    for _ in range(2):
        model(torch.ones(1, 4, requires_grad=True)).sum().backward()
        assert None not in ranges(model).values()  # known at once, used from the next call on
    assert watched.notes() == ("Checkpointed: 4 of 4 quantizers calibrated in 1 calls",)
    assert len(watched.audits()) == 1


def test_a_call_that_fails_ends_the_calibration_and_is_reported(watch):
    watched = watch(calibrate=2, audit=True)
    model = build()
    model(torch.ones(1, 4))
    with pytest.raises(ValueError, match="no input"):
        model(None)
    assert watched.notes() == ("Net: calibration given up, since a call failed: ValueError: no input",)
    assert set(ranges(model).values()) == {None}
    assert all(q.quantizing and not q.calibrating for q in named_quantizers(model).values())
    try:
        raise RuntimeError("handled by the script")
    except RuntimeError:
        other = build()
        other(torch.ones(1, 4))
        other(torch.ones(1, 4))
    assert "Net (2): 4 of 4 quantizers calibrated in 2 calls" in watched.notes()


def test_data_that_is_not_finite_is_an_error_that_is_reported(watch):
    watched = watch(calibrate=1)
    model = build()
    with pytest.raises(CalibrationError):
        model(torch.full((1, 4), torch.nan))
    (note,) = watched.notes()
    assert "first.input_quantizer" in note


def test_ranges_that_are_known_are_kept_and_a_model_without_need_of_any_says_so(watch):
    watched = watch(calibrate=1)
    model = build()
    for quantizer in named_quantizers(model).values():
        quantizer.amax = torch.tensor(2.0)
    model(torch.ones(1, 4))
    assert all(amax.item() == 2.0 for amax in ranges(model).values())
    assert watched.notes() == ("Net: nothing to calibrate: its quantizers are dynamic, off, or have ranges",)


def test_a_model_without_need_of_ranges_is_audited_at_once_and_not_said_to_stay_float(watch):
    watched = watch(calibrate=8, audit=True)
    build(recipe="mxfp8")(torch.ones(1, 4))
    assert watched.notes() == ("Net: nothing to calibrate: its quantizers are dynamic, off, or have ranges",)
    (audit,) = watched.audits()
    assert "100.0%" in audit


def test_a_script_that_calibrates_its_models_itself_has_them_audited_afterwards(watch):
    watched = watch(audit=True)
    model = build()
    qp.calibrate(model, [torch.ones(1, 4), torch.ones(1, 4)])
    assert watched.audits() == ()
    model(torch.ones(1, 4))
    (audit,) = watched.audits()
    assert "100.0%" in audit


def test_a_copy_made_while_a_model_is_calibrated_does_not_stay_float(watch):
    watch(calibrate=2)
    model, x = build(), torch.randn(4, 4)
    model(x)
    early = copy.deepcopy(model)  # without ranges: a model of its own, which its own calls calibrate
    model(x)
    late = copy.deepcopy(model)  # as for an average of the weights
    for _ in range(3):
        expected = model(x)
        assert torch.equal(late(x), expected)
        found = early(x)
    assert torch.equal(found, expected)


def test_a_compiled_model_is_seen_and_runs_eagerly_where_it_is_looked_at(watch):
    watched = watch(calibrate=1, audit=True)
    model, graphs = build(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    seen = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*global hooks")  # torch says that they are called once more
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(3):
            compiled(torch.ones(2, 4))
            seen.append(len(graphs))
    assert seen == [0, 0, 1]
    assert watched.notes() == ("Net: 4 of 4 quantizers calibrated in 1 calls",)
    assert "Net: 100.0%" in watched.audits()[0]


def test_what_is_compiled_is_compiled_again_when_the_last_thread_has_been_looked_at():
    stances = []
    first, second = _Eager(), _Eager()
    for step in (first.__enter__, second.__enter__, first.__exit__, second.__exit__):
        step()
        stances.append(torch._dynamo.eval_frame._stance.stance)
    assert stances == ["force_eager", "force_eager", "force_eager", "default"]


def test_threads_do_not_disturb_each_other(watch):
    watched = watch(calibrate=2, audit=True)
    models = [build() for _ in range(4)]
    barrier, failed = threading.Barrier(4), []

    def run(model):
        try:
            barrier.wait()
            for _ in range(3):
                model(torch.ones(2, 4))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert (
        len([note for note in watched.notes() if note.endswith("4 of 4 quantizers calibrated in 2 calls")])
        == 4
    )
    assert len(watched.audits()) == 4


def test_the_rules_of_a_recipe_go_by_the_names_in_each_model(watch):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Linear(4, 2)

        def forward(self, x):
            return self.only(x)

    watched = watch(rules={"first": None, "second.input_quantizer": qp.QuantDescriptor(num_bits=4)})
    model, other = build(), build(Other)
    for each in (model, other):
        each(torch.ones(1, 4))
    assert model.first.weight_quantizer.disabled
    assert model.second.input_quantizer.descriptor.num_bits == 4
    (note,) = watched.notes()
    assert note.startswith("Other: the rules of the recipe were not applied: ")
    assert "first" in note


def test_closing_leaves_no_hook(watch):
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    before = [len(h) for h in hooks]
    watched = watch(calibrate=1, audit=True)
    model = build()
    assert [len(h) for h in hooks] == [n + 1 for n in before]
    watched.close()
    model(torch.ones(1, 4))
    assert [len(h) for h in hooks] == before
    assert watched.notes() == ()


class Root(Net):
    def forward(self, x):
        return super().forward(x) @ torch.eye(2)


def test_operations_come_with_the_first_call_which_says_what_was_float_in_it():
    settings = RunSettings(block={"operations": {"*": ["matmul"]}})
    watched = WatchedModels(1, audit=True, operations=settings.quantize_operations)
    try:
        model, x = build(Root), torch.randn(3, 4)
        for _ in range(3):
            model(x)
        assert model.matmul_0_left_quantizer.amax is not None
        assert "Root: in the first call the operations in Root.forward were float" in watched.notes()
        assert "100.0%" in watched.audits()[0]
    finally:
        watched.close()


def test_operations_come_before_their_ranges_are_loaded_into_a_model_that_has_not_run():
    load = nn.Module.load_state_dict
    settings = RunSettings(block={"operations": "products"})
    watched = WatchedModels(0, audit=True, operations=settings.quantize_operations)
    try:
        trained, model, x = build(Root), build(Root), torch.randn(3, 4)
        settings.quantize_operations(trained)
        qp.calibrate(trained, [x])
        model.load_state_dict(build(Root).state_dict())  # of a model without: it has nothing to say of them
        assert type(model) is Root
        model.load_state_dict(trained.state_dict())
        assert torch.equal(model(x), trained(x))
        assert not any("were float" in note for note in watched.notes())
    finally:
        watched.close()
    assert nn.Module.load_state_dict is load


def test_closing_gives_back_what_another_library_had_made_of_loading(monkeypatch):
    @functools.wraps(nn.Module.load_state_dict)
    def of_another(model, *args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(nn.Module, "load_state_dict", of_another)
    settings = RunSettings(block={"operations": "products"})
    WatchedModels(0, audit=True, operations=settings.quantize_operations).close()
    assert nn.Module.load_state_dict is of_another
