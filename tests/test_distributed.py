"""Quantized models over real processes: sharded, cut up, saved in pieces, calibrated in groups.

One pair of processes runs everything; the tests look at what each rank brought back.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo import join
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import quantpatch as qp
from quantpatch.calibrators import MaxCalibrator
from quantpatch.errors import ArgumentTypeError, CheckpointError, QuantPatchError
from quantpatch.layers.quantizer import named_quantizers
from quantpatch.numerics.formats import Integer

# Of torch 2.8, about what its own checkpoints do.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")

RANKS = 2
LEARNED = qp.Recipe(
    name="learned",
    input=qp.QuantDescriptor(learn_amax=True),
    weight=qp.QuantDescriptor(axis="channel", narrow_range=True, learn_amax=True),
)
BY_FEATURE = qp.Recipe(name="by feature", input=qp.QuantDescriptor(axis=-1, learn_amax=True))
DATA = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(2))


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def converted(model, recipe):
    qp.convert(model, recipe=recipe)
    return model


def quantized(recipe="int8", *, calibrated=True):
    model = converted(build(), recipe)
    if calibrated:
        for name, quantizer in named_quantizers(model).items():
            weight = model.get_submodule(name.rpartition(".")[0]).weight
            per_channel = weight.detach().abs().amax(1, keepdim=True)
            quantizer.amax = 0.5 if name.endswith("input_quantizer") else per_channel
    return model


def tripled():
    """A float checkpoint."""
    return {key: 3 * tensor for key, tensor in build().state_dict().items()}


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def ranges(model):
    return {name: q.amax for name, q in named_quantizers(model).items()}


def message(function, *arguments, **keywords):
    """What goes wrong, in words."""
    try:
        function(*arguments, **keywords)
    except (QuantPatchError, AttributeError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def gathered(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def fully_sharded(model, mesh):
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class FailsWhilePuttingTogether(MaxCalibrator):
    """On the last rank, when the others wait for its statistics already."""

    def _reduce(self, all_reduce):
        all_reduce(self._amax, dist.ReduceOp.MAX)
        if dist.get_rank() == RANKS - 1:
            raise ZeroDivisionError("in between")
        super()._reduce(all_reduce)


class FailsAtTheRange(MaxCalibrator):
    """On the last rank, when the statistics are together."""

    def _range(self):
        if dist.get_rank() == RANKS - 1:
            raise ZeroDivisionError("at the end")
        return super()._range()


def run_rank(rank, folder):
    warnings.simplefilter("ignore")
    join(rank, folder, RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    found = {}
    sharding(found, rank, mesh, folder)
    tensor_parallel(found, mesh)
    calibration(found, rank)
    replicated(found, rank)
    with_operations(found, rank)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def sharding(found, rank, mesh, folder):
    """FSDP2, and checkpoints in pieces."""
    model = fully_sharded(quantized(LEARNED), mesh)
    steps = optimizer(model)
    for batch in DATA:
        steps.zero_grad()
        model(batch.chunk(RANKS)[rank]).square().mean().backward()
        steps.step()
    found["trained"] = gathered(model)
    if rank == 0:  # nobody else takes part
        found["summary"] = [row.ranges for row in qp.summary(model).rows]
    model.eval()
    with torch.no_grad():
        model(DATA[0])
        halved = {key: t if "_amax" in key else t * 0.5 for key, t in model.state_dict().items()}
        model.load_state_dict(halved)
        found["halved"] = model(DATA[0])
    late = fully_sharded(quantized(LEARNED, calibrated=False), mesh)
    steps = optimizer(late)
    qp.calibrate(late, [DATA[0].chunk(RANKS)[rank]])
    found["calibrated sharded"] = gathered(late)
    late(DATA[1].chunk(RANKS)[rank]).square().mean().backward()
    steps.step()
    found["and trained"] = gathered(late)
    found["learned too late"] = message(
        qp.calibrate, fully_sharded(quantized(BY_FEATURE, calibrated=False), mesh), [DATA[0]]
    )
    qp.calibrate(model, [5 * DATA[0]], existing="overwrite")
    found["recalibrated"] = gathered(model)["0.input_quantizer._amax"]

    dcp.save({"model": model, "optimizer": {}}, checkpoint_id=f"{folder}/learned")
    empty = quantized(LEARNED, calibrated=False)
    found["expected"] = tuple(qp.expect_ranges(empty, f"{folder}/learned").changed)
    empty = fully_sharded(empty, mesh)
    dcp.load({"model": empty}, checkpoint_id=f"{folder}/learned")
    found["loaded"], found["saved"] = gathered(empty), gathered(model)

    whole = StateDictOptions(full_state_dict=True, strict=True)
    set_model_state_dict(model, tripled(), options=whole)
    found["float, sharded"] = {k: t.full_tensor() for k, t in qp.float_state_dict(model).items()}
    found["float, sharded, model"] = gathered(model)
    replicated = nn.parallel.DistributedDataParallel(quantized(LEARNED))
    replicated.load_state_dict({f"module.{key}": t for key, t in tripled().items()}, strict=True)
    found["float, replicated"] = qp.float_state_dict(replicated)


def tensor_parallel(found, mesh):
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for recipe in ("int8", LEARNED, "nvfp4"):
        name = recipe if isinstance(recipe, str) else recipe.name
        model = converted(parallelize_module(build(), mesh, plan), recipe)
        if name != "nvfp4":
            qp.calibrate(model, list(DATA), method="mse")
        output = model(DATA[0])
        output.square().sum().backward()
        gradients = {k: p.grad for k, p in model.named_parameters()}
        gradients = {k: g.full_tensor() if hasattr(g, "full_tensor") else g for k, g in gradients.items()}
        found["parallel", name] = (output.detach() + 0, {k: g.clone() for k, g in gradients.items()})
    found["row-wise"] = message(parallelize_module, quantized(), mesh, plan)
    found["column-wise"] = message(parallelize_module, quantized(LEARNED), mesh, plan)


@qp.hookimpl
def quantpatch_calibrators():
    """This module is registered as a plugin by each rank."""
    return {"between": FailsWhilePuttingTogether, "end": FailsAtTheRange}


def calibration(found, rank):
    qp.registry.register(sys.modules[__name__], "failing")
    for method in ("between", "end"):
        model = quantized(calibrated=False)
        found[method] = message(qp.calibrate, model, [DATA[0]], method=method), ranges(model)
    lone = FailsWhilePuttingTogether(Integer(8))
    lone.collect(DATA[0])
    found["lone"] = message(lone.synchronize)
    known_here = quantized(calibrated=rank == 0)
    found["ranges on one rank"] = message(qp.calibrate, known_here, [DATA[0]])
    found["ranges on one rank then"] = ranges(known_here)
    # Of a pipeline each rank has a stage, and only that.
    model = quantized(calibrated=False)
    stage, batch = (model[:1], DATA[0]) if rank == 0 else (model[1:], DATA[0].new_ones(2, 8))
    found["stages"] = message(qp.calibrate, stage, [batch])
    groups = [dist.new_group([r]) for r in range(RANKS)]
    qp.calibrate(stage, [batch], group=groups[rank])
    found["stage"] = ranges(stage)
    # The ranks of this wrapper exchange buffers in every batch: those without one would be waited for.
    model = nn.parallel.DistributedDataParallel(nn.Sequential(quantized(calibrated=False), nn.BatchNorm1d(4)))
    qp.calibrate(model, [DATA[0]] if rank else [DATA[0], 2 * DATA[1], 3 * DATA[2]])
    found["wrapped"] = ranges(model)["module.0.0.input_quantizer"]


def replicated(found, rank):
    """DistributedDataParallel takes what rank 0 has."""
    for recipe in ("int8", LEARNED):
        model = quantized(recipe, calibrated=rank == 0)
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(DATA[0]).sum().backward()
        known = ranges(model), {name: q.state for name, q in named_quantizers(model).items()}
        found["replicated", getattr(recipe, "name", recipe)] = known
    model = quantized(LEARNED, calibrated=False)
    wrapped = nn.parallel.DistributedDataParallel(model)
    steps = optimizer(wrapped)
    wrapped(DATA[0]).sum().backward()  # every parameter takes part, those of unknown ranges too
    qp.calibrate(wrapped, [DATA[0].chunk(RANKS)[rank]])
    steps.zero_grad()
    wrapped(DATA[1].chunk(RANKS)[rank]).square().mean().backward()
    steps.step()
    found["replicated, calibrated afterwards"] = model.state_dict()


class Multiplying(nn.Module):
    """Products in its forward, one of them with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.fc, self.table = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 4) / 2)

    def forward(self, x):
        return torch.tanh(self.fc(x) @ x.mT) @ x @ self.table


def multiplying():
    torch.manual_seed(0)
    model = Multiplying()
    qp.convert(model, recipe=LEARNED, operations="products")
    qp.calibrate(model, [DATA[0]])
    return model


def with_operations(found, rank):
    model = multiplying()
    wrapped = nn.parallel.DistributedDataParallel(model)
    steps = optimizer(wrapped)
    wrapped(DATA[1].chunk(RANKS)[rank]).square().mean().backward()
    steps.step()
    found["operations"] = model.state_dict()


@pytest.fixture(scope="module")
def ranks(by_ranks):
    """What each rank found."""
    return by_ranks(run_rank, RANKS)


# --- Sharded ----------------------------------------------------------------------------------------------

FLOAT_MODELS_TOO = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="torch 2.8 trains float models otherwise, too, where CPUs shard them"
)


@pytest.fixture(scope="module")
def trained_alone():
    """What the sharded model was trained to, by one process that averages the gradients of the halves."""
    model = quantized(LEARNED)
    steps = optimizer(model)
    for batch in DATA:
        steps.zero_grad()
        for half in batch.chunk(RANKS):
            (model(half).square().mean() / RANKS).backward()
        steps.step()
    return model


@FLOAT_MODELS_TOO
def test_learned_ranges_train_under_fsdp2_as_in_one_process(ranks, trained_alone):
    expected = trained_alone.state_dict()
    before = quantized(LEARNED).state_dict()
    state = ranks[0]["trained"]  # torch gathers it there
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, msg=lambda m, key=key: f"{key}: {m}")
        assert not torch.equal(value, before[key]), key


def test_a_float_checkpoint_loads_strictly_into_a_sharded_and_a_replicated_model_and_comes_out(ranks):
    for found in ranks:
        for how in ("sharded", "replicated"):
            prefix = "module." if how == "replicated" else ""
            state = {key.removeprefix(prefix): t for key, t in found[f"float, {how}"].items()}
            assert state.keys() == tripled().keys()
            assert all(torch.equal(state[key], tensor) for key, tensor in tripled().items())
    expected, state = ranks[0]["recalibrated"], ranks[0]["float, sharded, model"]
    torch.testing.assert_close(state["0.input_quantizer._amax"], expected)  # ranges stay


def test_a_sharded_model_can_be_summed_up_by_one_rank(ranks):
    assert ranks[0]["summary"] == [1, 8, 1, 4]


@FLOAT_MODELS_TOO
def test_every_change_of_a_weight_is_seen_under_fsdp2(ranks, trained_alone):
    model = copy.deepcopy(trained_alone).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(0.5)
            layer.bias.mul_(0.5)
        expected = model(DATA[0])
    for found in ranks:
        torch.testing.assert_close(found["halved"], expected)


@pytest.fixture(scope="module")
def calibrated_and_trained_alone():
    """A model whose ranges are found after its optimizer is made, in one process: found, and trained."""
    model = quantized(LEARNED, calibrated=False)
    steps = optimizer(model)
    qp.calibrate(model, [DATA[0]])
    calibrated = copy.deepcopy(model.state_dict())
    for half in DATA[1].chunk(RANKS):
        (model(half).square().mean() / RANKS).backward()
    steps.step()
    return calibrated, model.state_dict()


def test_ranges_are_calibrated_again_under_fsdp2(ranks):
    torch.testing.assert_close(ranks[0]["recalibrated"], 5 * DATA[0].abs().max().reshape(1))


@FLOAT_MODELS_TOO
def test_learned_ranges_are_calibrated_and_trained_when_they_are_sharded_already(
    ranks, calibrated_and_trained_alone
):
    calibrated, trained = calibrated_and_trained_alone
    for how, expected in (("calibrated sharded", calibrated), ("and trained", trained)):
        for key, value in expected.items():
            torch.testing.assert_close(ranks[0][how][key], value, msg=f"{how}: {key}")


def test_learned_ranges_whose_shape_data_shows_come_too_late_for_fsdp2(ranks):
    for found in ranks:
        assert "too late for fully_shard to average their gradients: 0.input_qu" in found["learned too late"]


@pytest.mark.parametrize("recipe", ["int8", "learned"])
def test_ranges_that_are_known_on_rank_0_alone_are_those_of_all_ranks_when_the_model_is_replicated(
    ranks, recipe
):
    first, others = ranks[0]["replicated", recipe], ranks[1]["replicated", recipe]
    assert first[1] == others[1]
    assert set(first[1].values()) == {"learned" if recipe == "learned" else "calibrated"}
    for name, amax in first[0].items():
        assert torch.equal(amax, others[0][name]), name


def test_learned_ranges_are_calibrated_and_trained_in_a_model_that_is_replicated_already(
    ranks, calibrated_and_trained_alone
):
    for found in ranks:
        for key, value in calibrated_and_trained_alone[1].items():
            torch.testing.assert_close(found["replicated, calibrated afterwards"][key], value, msg=key)


def test_learned_ranges_of_operations_train_in_a_replicated_model_as_alone(ranks):
    model = multiplying()
    assert len(model.quantizers()) == 6
    before, steps = copy.deepcopy(model.state_dict()), optimizer(model)
    for half in DATA[1].chunk(RANKS):
        (model(half).square().mean() / RANKS).backward()
    steps.step()
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for found in ranks:
        for key, value in model.state_dict().items():
            torch.testing.assert_close(found["operations"][key], value, msg=key)


def test_a_distributed_checkpoint_brings_its_ranges_where_they_are_expected(ranks):
    for found in ranks:
        assert found["expected"] == tuple(ranges(quantized(LEARNED)))
    assert ranks[0]["saved"].keys() == ranks[0]["loaded"].keys()
    for key, value in ranks[0]["saved"].items():
        assert torch.equal(ranks[0]["loaded"][key], value), key


# --- Cut up -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["int8", LEARNED, "nvfp4"], ids=["int8", "learned", "nvfp4"])
def test_layers_quantized_after_parallelize_module_compute_what_one_process_does(ranks, recipe):
    model = converted(build(), recipe)
    if recipe != "nvfp4":
        qp.calibrate(model, list(DATA), method="mse")
    output = model(DATA[0])
    output.square().sum().backward()
    for found in ranks:
        theirs, gradients = found["parallel", getattr(recipe, "name", recipe)]
        torch.testing.assert_close(theirs, output.detach())
        assert gradients.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("how", ["row-wise", "column-wise"])
def test_parallelize_module_of_quantized_layers_says_what_to_write(ranks, how):
    for found in ranks:
        assert "`parallelize_module(model, mesh, plan); qp.convert(model)`" in found[how]


# --- Calibrated -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["between", "end"])
def test_a_rank_that_fails_while_the_others_wait_makes_all_raise_and_sets_no_range(ranks, where):
    for found, error in zip(
        ranks, ("CalibrationError: rank 1 failed: Zero", "ZeroDivisionError: "), strict=True
    ):
        told, left = found[where]
        assert told.startswith(error)
        assert set(left.values()) == {None}


def test_a_rank_that_fails_in_synchronize_makes_all_raise(ranks):
    assert ranks[0]["lone"].startswith("CalibrationError: rank 1 failed: ZeroDivisionError: in between")
    assert ranks[1]["lone"] == "ZeroDivisionError: in between"


def test_ranges_that_only_one_rank_has_are_an_error_on_all(ranks):
    assert "4 quantizers have a range already" in ranks[0]["ranges on one rank"]
    assert "rank 0 failed: CalibrationError: 4 quantizers have a range" in ranks[1]["ranges on one rank"]
    assert ranks[0]["ranges on one rank then"]["0.input_quantizer"] == 0.5
    assert set(ranks[1]["ranges on one rank then"].values()) == {None}


def test_stages_of_a_pipeline_are_calibrated_by_the_group_that_has_them(ranks):
    for found in ranks:
        assert "stages of a pipeline, pass group=" in found["stages"]
    assert ranks[0]["stage"]["0.input_quantizer"] == DATA[0].abs().max()
    assert ranks[1]["stage"]["2.input_quantizer"] == 1.0


def test_a_model_that_is_wrapped_is_calibrated_with_another_number_of_batches_on_each_rank(ranks):
    expected = torch.stack([DATA[0], 2 * DATA[1], 3 * DATA[2]]).abs().max()
    assert [found["wrapped"] for found in ranks] == [expected, expected]


# --- Room for ranges --------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_process():
    """A block in which torch.distributed.checkpoint need not tell that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is ")
        yield


@pytest.fixture
def saved(tmp_path):
    """Writes a distributed checkpoint, from this process alone; returns its folder."""

    def write(**content):
        with one_process():
            dcp.save(content, checkpoint_id=tmp_path / "saved")
        return tmp_path / "saved"

    return write


@pytest.mark.parametrize("given", ["model", "dictionary", "dictionary, not loaded"])
def test_a_distributed_checkpoint_fills_ranges_that_are_not_known_yet(saved, given):
    folder, model = saved(model=quantized()), quantized(calibrated=False)
    assert set(ranges(model).values()) == {None}
    state = {"model": model if given == "model" else model.state_dict()}  # torch's guides show both
    with one_process():
        dcp.load(state, checkpoint_id=folder)
    if given == "dictionary":
        model.load_state_dict(state["model"])
    assert torch.equal(model(DATA[0]), quantized()(DATA[0]))


def by_feature(*, calibrated=True):
    """A model with ranges whose shapes data shows."""
    model = quantized(BY_FEATURE, calibrated=False)
    if calibrated:
        qp.calibrate(model, [DATA[0]])
    return model


def test_without_room_for_them_no_range_is_loaded_and_with_it_all_are(saved):
    folder, model = saved(model=by_feature()), by_feature(calibrated=False)
    with one_process(), pytest.raises(RuntimeError) as caught:
        dcp.load({"model": model}, checkpoint_id=folder)
    for name in ("0.input_quantizer", "2.input_quantizer"):
        assert f"{name}._amax: the checkpoint has it" in str(caught.value)
    assert "Call qp.expect_ranges(model, checkpoint) before" in str(caught.value)
    assert tuple(qp.expect_ranges(model, folder).changed) == tuple(ranges(model))
    with one_process():
        dcp.load({"model": model}, checkpoint_id=folder)
    assert torch.equal(model(DATA[0]), by_feature()(DATA[0]))


def test_ranges_are_expected_of_a_state_dict_too():
    model, trained = by_feature(calibrated=False), by_feature()
    before = dict(model.named_parameters())
    assert tuple(qp.expect_ranges(model, trained.state_dict()).changed) == tuple(ranges(model))
    parameters = dict(model.named_parameters())
    assert parameters["0.input_quantizer._amax"].shape == (1, 6)
    assert all(parameters[name] is parameter for name, parameter in before.items())
    model.load_state_dict(trained.state_dict())
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    for wrong in (3, [trained], trained):
        with pytest.raises(ArgumentTypeError, match=rf"or a state_dict, not {type(wrong).__name__}"):
            qp.expect_ranges(model, wrong)
    with pytest.raises(CheckpointError, match="holds no ranges"):
        qp.expect_ranges(by_feature(calibrated=False), build().state_dict())


def test_an_optimizer_that_misses_expected_ranges_is_named():
    model, trained = by_feature(calibrated=False), by_feature()
    late = optimizer(model)
    with pytest.warns(qp.QuantPatchWarning, match=r"0\.input_quantizer, 2\.input_quantizer .* after SGD was"):
        qp.expect_ranges(model, trained.state_dict())
    late.add_param_group({"params": [model[0].input_quantizer.held, model[2].input_quantizer.held]})
    assert len(late.param_groups[1]["params"]) == 2


class State:
    """What torch's guides hand to the functions of its checkpoints: more than a model."""

    def __init__(self, model):
        self.model = model

    def state_dict(self):
        return {"weights": get_model_state_dict(self.model), "step": 3}

    def load_state_dict(self, state):
        set_model_state_dict(self.model, state["weights"])


def test_ranges_are_passed_over_in_silence_only_where_the_checkpoint_has_none_of_this_model(saved):
    folder = saved(model=State(build()), ema=State(quantized()), other=State(quantized()))
    model = quantized(calibrated=False)
    with one_process():
        dcp.load({"model": State(model)}, checkpoint_id=folder)  # a float one
        assert set(ranges(model).values()) == {None}
        dcp.load({"model": State(quantized())}, checkpoint_id=folder)
        dcp.load({"ema": State(model)}, checkpoint_id=folder)
        assert torch.equal(model(DATA[0]), quantized()(DATA[0]))
        dcp.load({"other": State(quantized())}, checkpoint_id=folder)


@pytest.mark.parametrize("whole", [True, False])
def test_zero_points_are_expected_with_their_ranges(saved, whole):
    original = quantized()
    skewed = DATA[0].clamp_min(-0.3)
    assert qp.fit_zero_points(original, [skewed]).fitted["0.input_quantizer"] > 0
    folder, model = saved(model=original), quantized(calibrated=False)
    qp.expect_ranges(model, folder)
    model.half().float()  # room stays room
    state = {"model": model if whole else model.state_dict()}
    with one_process():
        dcp.load(state, checkpoint_id=folder)
    if not whole:
        model.load_state_dict(state["model"])
    assert model[0].input_quantizer.descriptor == original[0].input_quantizer.descriptor
    assert torch.equal(model[0](skewed), original[0](skewed))


def test_expected_ranges_that_do_not_fit_are_an_error_and_nothing_changes(saved, tmp_path):
    folder = saved(model=quantized(), ema=quantized())
    fresh = quantized(calibrated=False)
    cases = [
        (build(), "model.", "0.input_quantizer: there is no quantizer here"),
        (quantized(LEARNED, calibrated=False), "model.", r"its shape is \(\) there and \(1,\) here"),
        (fresh, None, "pass prefix='model.' or prefix='ema.'"),
        (quantized(calibrated=False)[:1], "other.", "holds no ranges"),
        (
            nn.Sequential(nn.Linear(3, 3), nn.Linear(2, 2), nn.ReLU(), nn.Linear(3, 3)),
            None,
            "does not hold the weights",
        ),
    ]
    for model, prefix, expected in cases:
        before = {key: tensor.shape for key, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=expected):
            qp.expect_ranges(model, folder, prefix=prefix)
        assert {key: tensor.shape for key, tensor in model.state_dict().items()} == before
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        qp.expect_ranges(fresh, tmp_path / "nowhere")


def test_quantizers_that_the_checkpoint_has_no_range_for_are_named(saved):
    half = quantized()
    del half[2]._modules["input_quantizer"]
    model = quantized(calibrated=False)
    with pytest.warns(qp.QuantPatchWarning, match=r"no range for 2\.input_quantizer: they go on"):
        qp.expect_ranges(model, saved(model=half))
