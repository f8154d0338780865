"""fit_zero_points: ranges that need less on one side of 0, from calibration to a running file."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import join
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import quantpatch as qp
from quantpatch.errors import ArgumentError, ArgumentTypeError, CalibrationError, CheckpointError, ExportError
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import Integer
from quantpatch.numerics.qparams import QParams, of_longer_side
from quantpatch.quantize.zero_points import fitted_zero_point

X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SKEWED = 3 * X - 0.5  # from -0.5 to 2.5


def calibrated(x: torch.Tensor = X, recipe: Any = "int8") -> nn.Module:
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=recipe):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)).eval()
    qp.calibrate(model, [x], progress=False)
    return model


def fitted() -> nn.Module:
    model = calibrated(SKEWED)
    qp.fit_zero_points(model, [SKEWED])
    return model


# --- What becomes of ranges -------------------------------------------------------------------------------


def test_what_is_never_negative_has_the_zero_point_0_and_its_range() -> None:
    model = calibrated()
    amax = model[0].input_quantizer.amax
    assert qp.fit_zero_points(model, [X]).fitted["0.input_quantizer"] == 0
    quantizer = model[0].input_quantizer
    assert quantizer.format.name == "uint8"
    assert quantizer.zero_point == 0
    assert quantizer.descriptor == qp.QuantDescriptor()
    assert torch.equal(quantizer.amax, amax)
    assert qp.fit_zero_points(model, lambda m: m(X)).fitted == {}


@pytest.mark.parametrize("sign", [1, -1])
def test_the_longer_side_stays_and_the_shorter_one_becomes_as_long_as_the_data(sign: int) -> None:
    x = sign * SKEWED
    model = calibrated(x)
    before = model[0].input_quantizer.amax.item()
    assert before == x.abs().max()
    error = (model[0].input_quantizer(x) - x).square().mean()
    found = qp.fit_zero_points(model, [x]).fitted
    quantizer = model[0].input_quantizer
    q = quantizer.qparams
    assert q.zero_point == found["0.input_quantizer"]
    low, high = quantizer.amax.item() * q.lower_end(), quantizer.amax.item()
    scale = high / q.max()
    assert abs(high - x.max()) <= scale / 2 * 1.001
    assert abs(low - x.min()) <= scale / 2 * 1.001
    gain = 2 * before / (x.max() - x.min())
    assert gain > 1.6
    assert (quantizer(x) - x).square().mean() < error / gain**2 * 1.2


def test_clipping_by_calibration_stays() -> None:
    model = calibrated(SKEWED)
    model[0].input_quantizer.amax = 1.0
    qp.fit_zero_points(model, [SKEWED])
    quantizer = model[0].input_quantizer
    assert quantizer.amax.item() == pytest.approx(1.0, rel=0.01)
    assert quantizer.amax.item() * quantizer.qparams.lower_end() == pytest.approx(
        SKEWED.min().item(), rel=0.01
    )


def test_a_range_that_gains_little_is_left() -> None:
    x = torch.linspace(-0.9, 1.0, 96).reshape(2, 3, 4, 4)
    model = calibrated(x)
    assert "0.input_quantizer" not in qp.fit_zero_points(model, [x]).fitted
    assert model[0].input_quantizer.format.name == "int8"
    assert qp.fit_zero_points(model, [x], least_gain=1.0).fitted["0.input_quantizer"] == 121


def test_fewer_bits_have_zero_points_as_well() -> None:
    recipe = qp.Recipe(name="w8a4", input=qp.QuantDescriptor(format="int4"))
    model = calibrated(SKEWED, recipe)
    assert qp.fit_zero_points(model, [SKEWED]).fitted["0.input_quantizer"] in (2, 3)
    assert model[0].input_quantizer.format.name == "uint4"


def test_what_has_no_zero_point_is_left_alone() -> None:
    x = SKEWED
    recipe = qp.Recipe(name="all", input=qp.QuantDescriptor(axis=1), output=qp.QuantDescriptor(dynamic=True))
    model = calibrated(x, recipe)
    model[2].input_quantizer = qp.TensorQuantizer(qp.QuantDescriptor(format="fp8_e4m3", amax=1.0))
    before = {name: q.descriptor for name, q in qp.layers.quantizer.named_quantizers(model).items()}
    assert qp.fit_zero_points(model, [x]).fitted == {}
    assert {name: q.descriptor for name, q in qp.layers.quantizer.named_quantizers(model).items()} == before
    with pytest.raises(ArgumentError, match="only Integer formats have zero points, and fp8_e4m3 is a Float"):
        model[2].input_quantizer.use_zero_point(3)


def test_a_range_given_in_the_descriptor_moves_with_its_longer_side() -> None:
    recipe = qp.Recipe(name="given", input=qp.QuantDescriptor(amax=2.5))
    model = calibrated(-SKEWED, recipe)
    qp.fit_zero_points(model, [-SKEWED])
    quantizer = model[0].input_quantizer
    assert quantizer.amax.item() * quantizer.qparams.lower_end() == pytest.approx(-2.5, rel=0.01)
    assert quantizer.descriptor == qp.QuantDescriptor(amax=2.5)
    before = copy.deepcopy(model)
    qp.calibrate(model, -SKEWED, zero_points=True, existing="overwrite", progress=False)
    assert_same(model, before)


def test_a_shared_quantizer_is_fitted_to_all_that_it_sees_and_stays_shared() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.a(x) + self.b(x - 1)
            return result

    with qp.quantize_modules():
        model = Two().eval()
    model.b.input_quantizer = model.a.input_quantizer
    x = torch.linspace(0, 4, 40).reshape(10, 4)
    qp.calibrate(model, [x], progress=False)
    assert qp.fit_zero_points(model, [x]).fitted == {"a.input_quantizer": 51}  # -1 to 4
    assert model.b.input_quantizer is model.a.input_quantizer


# --- While calibrating ------------------------------------------------------------------------------------


def uncalibrated(descriptor: qp.QuantDescriptor = qp.QuantDescriptor()) -> nn.Module:  # noqa: B008
    torch.manual_seed(0)
    with qp.quantize_modules(recipe=qp.Recipe(name="r", input=descriptor)):
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)).eval()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    quantizers, others = (
        qp.layers.quantizer.named_quantizers(model),
        qp.layers.quantizer.named_quantizers(other),
    )
    assert {n: q.descriptor for n, q in quantizers.items()} == {n: q.descriptor for n, q in others.items()}
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(
    ("method", "options"), [("max", {}), ("moving_average", {}), ("percentile", {"percentile": 99.0})]
)
def test_one_pass_over_the_data_gives_what_two_give(method: str, options: Any, learn: bool) -> None:
    descriptor, data = qp.QuantDescriptor(learn_amax=learn), [SKEWED, 0.5 * SKEWED]
    two, one, block = (uncalibrated(descriptor) for _ in range(3))
    qp.calibrate(two, data, method=method, progress=False, **options)
    found = qp.fit_zero_points(two, data).fitted
    assert len(set(found.values())) == 2
    qp.calibrate(one, iter(data), method=method, zero_points=True, progress=False, **options)
    assert_same(one, two)
    with qp.calibrating(block, method=method, zero_points=True, **options):
        for x in data:
            block(x)
    assert_same(block, two)


@pytest.mark.parametrize("method", ["mse", "entropy", "sqnr"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.filterwarnings("ignore:.*unsigned numbers saw negative values")  # in the layer after the first
def test_a_threshold_is_that_for_the_integers_that_the_longer_side_gets(sign: int, method: str) -> None:
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    relu = uncalibrated()
    qp.calibrate(relu, x.relu(), method=method, zero_points=True, progress=False)
    known = uncalibrated(qp.QuantDescriptor(unsigned=True))
    qp.calibrate(known, x.relu(), method=method, progress=False)
    assert relu[0].input_quantizer.format.name == "uint8"
    assert relu[0].input_quantizer.amax == known[0].input_quantizer.amax

    x = sign * nn.functional.gelu(3 * x)
    one, two = uncalibrated(), uncalibrated()
    qp.calibrate(one, x, method=method, zero_points=True, progress=False)
    qp.calibrate(two, x, method=method, progress=False)
    qp.fit_zero_points(two, x)
    q, before = one[0].input_quantizer.qparams, two[0].input_quantizer
    calibrator = qp.registry.calibrator(method)(before.format)
    calibrator.zero_point = of_longer_side(before.zero_point, 8)
    calibrator.collect(x.abs())
    longer = one[0].input_quantizer.amax * max(1.0, -q.lower_end())
    assert longer == pytest.approx(calibrator.compute_amax().item(), rel=0.005)
    assert 2 < min(q.zero_point, 255 - q.zero_point) < 20
    if method == "mse":
        error, of_two = ((m[0].input_quantizer(x) - x).square().mean() for m in (one, two))
        assert error < 0.8 * of_two


def test_the_descriptors_own_range_gets_a_zero_point_and_what_saw_no_data_none() -> None:
    given, model = uncalibrated(qp.QuantDescriptor(amax=2.5)), uncalibrated()
    qp.calibrate(given, SKEWED, zero_points=True, progress=False)
    assert given[0].input_quantizer.zero_point > 0
    with pytest.warns(qp.QuantPatchWarning, match=r"saw no data.*2\.input_quantizer"):
        qp.calibrate(model, lambda m: m[0](SKEWED), zero_points=True, strict=False, progress=False)
    assert model[0].input_quantizer.zero_point > 0
    assert (model[2].input_quantizer.format.name, model[2].input_quantizer.amax) == ("int8", None)


class NoRangeForUnsigned(qp.calibrators.MaxCalibrator):
    """It fails where the range for the zero point is looked for, which is the last step."""

    def _range(self) -> torch.Tensor:
        return self._amax * (1.0 if self.zero_point is None else float("nan"))


@pytest.mark.parametrize("fails", ["data", "range"])
def test_nothing_is_set_and_nothing_watches_any_more_when_it_fails(
    fails: str, plugin: Callable[..., Any]
) -> None:
    plugin("mylib", calibrators={"bad": NoRangeForUnsigned})
    model = uncalibrated()

    def data() -> Any:
        yield SKEWED
        if fails == "data":
            raise KeyboardInterrupt

    before = {name: vars(q).copy() for name, q in qp.layers.quantizer.named_quantizers(model).items()}
    hooks = {
        name: dict(q._forward_pre_hooks) for name, q in qp.layers.quantizer.named_quantizers(model).items()
    }
    with pytest.raises(KeyboardInterrupt if fails == "data" else CalibrationError) as caught:
        qp.calibrate(model, data(), method="bad", zero_points=True, progress=False)
    if fails == "range":
        assert "0.input_quantizer: NoRangeForUnsigned gives an invalid range" in str(caught.value)
    for name, quantizer in qp.layers.quantizer.named_quantizers(model).items():
        assert vars(quantizer) == before[name]
        assert dict(quantizer._forward_pre_hooks) == hooks[name]


BOTH_SIDES = 2 * X - 1.2


@pytest.mark.parametrize("way", ["at once", "state_dict", "file", "pickle", "fit_zero_points"])
def test_zero_points_that_were_found_are_found_anew_in_other_data(way: str, tmp_path: Path) -> None:
    model = uncalibrated()
    if way == "fit_zero_points":
        qp.calibrate(model, SKEWED, progress=False)
        qp.fit_zero_points(model, SKEWED)
    else:
        qp.calibrate(model, SKEWED, zero_points=True, progress=False)
    first = model[0].input_quantizer.zero_point
    if way == "state_dict":
        model, before = uncalibrated(), model
        model.load_state_dict(before.state_dict())
    elif way == "file":
        qp.save(model, tmp_path / "m.safetensors")
        model = qp.load(uncalibrated(), tmp_path / "m.safetensors")
    elif way == "pickle":
        model = pickle.loads(pickle.dumps(model))
    for data in (BOTH_SIDES, X - 0.5, SKEWED):  # the second needs none
        fresh = uncalibrated()
        qp.calibrate(fresh, data, zero_points=True, progress=False)
        qp.calibrate(model, data, zero_points=True, existing="overwrite", progress=False)
        assert_same(model, fresh)
    assert model[0].input_quantizer.zero_point == first


def test_without_being_asked_for_they_stay_with_new_ranges() -> None:
    model = uncalibrated()
    qp.calibrate(model, SKEWED, zero_points=True, progress=False)
    zero_point = model[0].input_quantizer.zero_point
    assert zero_point
    qp.calibrate(model, BOTH_SIDES, existing="overwrite", progress=False)
    assert model[0].input_quantizer.zero_point == zero_point


def test_a_zero_point_that_a_descriptor_asks_for_stays() -> None:
    model = uncalibrated(qp.QuantDescriptor(unsigned=True, zero_point=37))
    for existing in ("error", "overwrite"):
        qp.calibrate(model, SKEWED, zero_points=True, existing=existing, progress=False)
        assert model[0].input_quantizer.zero_point == 37


@pytest.mark.parametrize("learn", [False, True])
def test_found_ones_are_back_with_their_ranges_where_no_others_are_found(learn: bool) -> None:
    model = uncalibrated(qp.QuantDescriptor(learn_amax=learn))
    qp.calibrate(model, SKEWED, zero_points=True, progress=False)
    before = copy.deepcopy(model)
    with pytest.raises(CalibrationError):
        qp.calibrate(model, X * torch.nan, zero_points=True, existing="overwrite", progress=False)
    assert_same(model, before)
    with pytest.warns(qp.QuantPatchWarning, match=r"saw no data.*2\.input_quantizer"):
        qp.calibrate(
            model,
            lambda m: m[0](BOTH_SIDES),
            zero_points=True,
            existing="overwrite",
            strict=False,
            progress=False,
        )
    assert model[0].input_quantizer.zero_point != before[0].input_quantizer.zero_point
    assert_same(model[2], before[2])


def test_a_zero_point_with_a_range_that_is_none_changes_nothing() -> None:
    quantizer = qp.TensorQuantizer(qp.QuantDescriptor())
    quantizer.amax = 1.0
    with pytest.raises(qp.errors.RangeError):
        quantizer.use_zero_point(3, -1.0)
    assert (quantizer.format.name, quantizer.amax) == ("int8", 1.0)


# --- Data -------------------------------------------------------------------------------------------------


def test_data_that_reaches_nothing_or_is_not_finite() -> None:
    with pytest.raises(CalibrationError, match="no batch"):
        qp.fit_zero_points(calibrated(), [])
    with pytest.raises(CalibrationError, match="reached none"):
        qp.fit_zero_points(calibrated(), lambda model: None)
    with pytest.raises(ArgumentTypeError):
        qp.fit_zero_points(calibrated(), 3)  # type: ignore[arg-type]
    model = calibrated()
    with pytest.raises(CalibrationError, match=r"0\.input_quantizer.* saw NaN or infinity") as caught:
        qp.fit_zero_points(model, [X, torch.full_like(X, torch.nan), X])
    assert "0.input_quantizer" in caught.value.quantizers
    assert model[0].input_quantizer.format.name == "int8"
    with pytest.raises(ArgumentTypeError, match="takes a model"):
        qp.fit_zero_points(nn.Conv2d, [X])  # type: ignore[arg-type]


def test_batches_of_each_kind() -> None:
    for batch in ((X,), {"input": X}, X):
        assert "0.input_quantizer" in qp.fit_zero_points(calibrated(), [batch]).fitted
    assert "0.input_quantizer" in qp.fit_zero_points(calibrated(), X).fitted


def run_rank(rank: int, folder: str) -> None:
    join(rank, folder, 2)
    model = calibrated(SKEWED)
    found = dict(qp.fit_zero_points(model, [SKEWED.clamp_min(0) if rank else SKEWED]).fitted)
    try:
        qp.fit_zero_points(calibrated(SKEWED), [SKEWED] if rank else [])
    except CalibrationError as error:
        found["error"] = str(error)
    model = uncalibrated()
    qp.calibrate(
        model, [SKEWED.clamp_min(0) if rank else SKEWED], method="mse", zero_points=True, progress=False
    )
    found["calibrated"] = model.state_dict()
    try:
        qp.calibrate(uncalibrated(), [SKEWED], zero_points=bool(rank), progress=False)
    except CalibrationError as error:
        found["only one looks for them"] = str(error)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_every_rank_has_the_zero_point_of_the_data_of_all(by_ranks: Callable[..., list[Any]]) -> None:
    first, second = by_ranks(run_rank, 2)
    assert "no batch" in first.pop("error")
    assert "rank 0 failed" in second.pop("error")
    alone = calibrated(SKEWED)
    expected = qp.fit_zero_points(alone, [SKEWED, SKEWED.clamp_min(0)]).fitted
    for found in (first, second):
        assert "looks for the zero points of other quantizers" in found.pop("only one looks for them")
    alone = uncalibrated()
    qp.calibrate(alone, [SKEWED, SKEWED.clamp_min(0)], method="mse", zero_points=True, progress=False)
    for state in (first.pop("calibrated"), second.pop("calibrated")):
        assert state.keys() == alone.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in alone.state_dict().items())
    assert first == second
    assert first["0.input_quantizer"] == expected["0.input_quantizer"] > 0


# --- Afterwards -------------------------------------------------------------------------------------------


def test_reports_name_it() -> None:
    model = fitted()
    name = f"uint8, zero_point={model[0].input_quantizer.zero_point}"
    for text in (repr(model), str(qp.summary(model))):
        assert name in text


@pytest.mark.parametrize("learn", [False, True])
def test_training_goes_on(learn: bool) -> None:
    recipe = qp.Recipe(name="r", input=qp.QuantDescriptor(learn_amax=learn))
    model = calibrated(SKEWED, recipe)
    parameter = model[0].input_quantizer.amax
    found = qp.fit_zero_points(model, [SKEWED]).fitted
    assert found["0.input_quantizer"] > 0
    assert (model[0].input_quantizer.amax is parameter) or not learn  # an optimizer may hold it
    target = SKEWED[:, :2].square()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    model.train()
    losses = []
    ranges = []
    for _ in range(30):
        loss = (model(SKEWED) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        ranges.append(model[0].input_quantizer.amax.item())
    assert losses[-1] < 0.9 * losses[0]
    assert (len(set(ranges)) > 1) is learn
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_state_has_the_zero_point_and_gives_it_to_what_loads_it() -> None:
    model = fitted()
    expected = model(SKEWED)
    state = model.state_dict()
    zero_point = model[0].input_quantizer.zero_point
    assert state["0.input_quantizer._zero_point"] == zero_point
    with qp.quantize_modules():
        fresh = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)).eval()
    for other in (fresh, calibrated(SKEWED), calibrated(X)):
        other.load_state_dict(state, strict=True)
        assert other[0].input_quantizer.descriptor == model[0].input_quantizer.descriptor
        assert torch.equal(other(SKEWED), expected)
        assert other.state_dict().keys() == state.keys()
    with pytest.raises(
        RuntimeError, match=rf"has the zero point {zero_point}, and the checkpoint's range is"
    ):
        model.load_state_dict(calibrated(SKEWED).state_dict())
    blocks = qp.TensorQuantizer(qp.QuantDescriptor(format="fp8_e4m3"))
    with pytest.raises(RuntimeError, match="the checkpoint has 7; .*only Integer formats have zero points"):
        blocks.load_state_dict({"_amax": torch.tensor(1.0), "_zero_point": torch.tensor(7)})
    four = qp.TensorQuantizer(qp.QuantDescriptor(num_bits=4))
    with pytest.raises(RuntimeError, match="from 0 to 14"):
        four.load_state_dict({"_amax": torch.tensor(1.0), "_zero_point": torch.tensor(70)})
    model.load_state_dict(qp.float_state_dict(model), strict=True)  # says nothing of ranges
    nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)).load_state_dict(
        qp.float_state_dict(model), strict=True
    )


def test_integers_from_0_on_are_loaded_as_such() -> None:
    model = calibrated()
    qp.fit_zero_points(model, [X])
    state = model.state_dict()
    assert state["0.input_quantizer._zero_point"] == 0
    signed = calibrated(-X)
    signed.load_state_dict(state, strict=True)
    assert signed[0].input_quantizer.format.name == "uint8"
    assert torch.equal(signed(X), model(X))
    # A range without a word on the zero point, as other toolkits save it.
    del state["0.input_quantizer._zero_point"]
    model.load_state_dict(state, strict=True)
    with qp.quantize_modules(recipe="fp8"):
        floats = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(RuntimeError, match="_zero_point: the checkpoint has 0; .*fp8_e4m3 is a Float"):
        floats.load_state_dict(model.state_dict())


@pytest.mark.parametrize("decay", [0.9, 0.9999])
@pytest.mark.parametrize("average_of", [get_ema_multi_avg_fn, get_ema_avg_fn])
def test_an_average_of_models_with_buffers_keeps_it(decay: float, average_of: Any) -> None:
    model = calibrated(SKEWED)
    for zero_point in (3, 57, 113, 251):
        model[0].input_quantizer.use_zero_point(zero_point, 2.0)
        kind = "multi_avg_fn" if average_of is get_ema_multi_avg_fn else "avg_fn"
        average = AveragedModel(model, use_buffers=True, **{kind: average_of(decay)})
        for _ in range(4):
            average.update_parameters(model)
        assert average.module[0].input_quantizer.zero_point == zero_point
        expected, averaged = model[0].input_quantizer(SKEWED), average.module[0].input_quantizer
        for function in (
            averaged,
            torch.func.vmap(averaged),
        ):  # one computes with a number, one with a tensor
            torch.testing.assert_close(function(SKEWED), expected)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("by", ["calibrate", "fit_zero_points"])
def test_an_average_that_was_made_before_it_was_found_is_named(by: str) -> None:
    gc.collect()
    model = calibrated(SKEWED)
    average = AveragedModel(model)
    find = {
        "calibrate": lambda: qp.calibrate(model, [SKEWED], zero_points=True, existing="overwrite"),
        "fit_zero_points": lambda: qp.fit_zero_points(model, [SKEWED]),
    }[by]
    with pytest.warns(qp.QuantPatchWarning, match="before the ranges or zero points of 0.input_quantizer"):
        find()
    del average
    average = AveragedModel(model)
    qp.calibrate(model, [SKEWED], zero_points=True, existing="overwrite")
    del average


@pytest.mark.parametrize("damaged", [[300.0], [float("nan")], [1.0, 2.0]])
def test_one_that_cannot_be_is_refused_by_name(damaged: list[float], tmp_path: Path) -> None:
    model = fitted()
    model[0].input_quantizer._buffers["_zero_point"] = torch.tensor(damaged)
    with pytest.raises(RuntimeError, match=r"0\.input_quantizer\._zero_point: the checkpoint has"):
        calibrated(SKEWED).load_state_dict(model.state_dict())
    model[0].input_quantizer._buffers["_zero_point"] = torch.tensor(42.0)
    qp.save(model, tmp_path / "m.safetensors")
    tensors, notes = load_file(tmp_path / "m.safetensors"), metadata(tmp_path / "m.safetensors")
    tensors["0.input_quantizer._zero_point"] = torch.tensor(damaged)
    save_file(tensors, tmp_path / "m.safetensors", notes)
    with pytest.raises(CheckpointError, match=r"0\.input_quantizer: (a|the) zero point "):
        qp.load(calibrated(SKEWED), tmp_path / "m.safetensors")


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_copies_casts_and_files_keep_it(tmp_path: Path) -> None:
    model = fitted()
    expected = model(SKEWED)
    zero_point = model[0].input_quantizer.zero_point
    assert zero_point
    qp.save(model, tmp_path / "m.safetensors", packed=True)

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)).eval()

    loaded = qp.load(build, tmp_path / "m.safetensors").eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert other[0].input_quantizer.format.name == "uint8"
        assert other[0].input_quantizer.zero_point == zero_point
        assert torch.equal(other(SKEWED), expected)
    moved = copy.deepcopy(model).half().float()
    assert moved[0].input_quantizer.amax == model[0].input_quantizer.amax
    assert moved.state_dict()["0.input_quantizer._zero_point"] == zero_point
    emptied = copy.deepcopy(model).to_empty(device="cpu")
    assert emptied.state_dict()["0.input_quantizer._zero_point"] == model[0].input_quantizer.zero_point
    model[0].input_quantizer.amax = None
    assert model[0].input_quantizer.state_dict()["_amax"].isnan()


def test_calibrating_again_keeps_the_zero_point() -> None:
    model = fitted()
    zero_point, amax = model[0].input_quantizer.zero_point, model[0].input_quantizer.amax.clone()
    qp.calibrate(model, [2 * SKEWED], existing="overwrite", progress=False)
    assert model[0].input_quantizer.zero_point == zero_point
    assert model[0].input_quantizer.amax == pytest.approx(2 * amax.item(), rel=0.01)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_it_compiles_in_one_graph_and_exports() -> None:
    model = fitted()
    expected = model(SKEWED)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(SKEWED), expected)
    program = torch.export.export(model, (SKEWED,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(SKEWED), expected)


# --- In ONNX ----------------------------------------------------------------------------------------------


class Joined(nn.Module):
    """What meets: values that are not negative, small ones of both signs, a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.b = nn.ConvTranspose2d(3, 8, 1)
        self.cat = qp.layers.Cat(1)
        self.c = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.Hardswish())
        self.add = qp.layers.Add()
        self.product = qp.layers.MatMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        c = self.c(self.cat([a, 0.3 * self.b(x)]))
        y = self.add(a, c)
        result: torch.Tensor = self.product(y, c.transpose(2, 3))
        return result


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_of_zero_points_computes_the_same_integers_in_onnxruntime(bits: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    recipe = qp.Recipe(name="r", input=qp.QuantDescriptor(num_bits=bits))
    with qp.quantize_modules(recipe=recipe):
        model = Joined().eval()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    qp.prepare(model, x)
    qp.calibrate(model, [x], method="mse", zero_points=True, progress=False)
    every = qp.layers.quantizer.named_quantizers(model)
    found = {name: q.zero_point for name, q in every.items() if q.zero_point is not None}
    assert len(set(found.values()) - {0}) >= 2
    report = qp.export_onnx(model, x, tmp_path / "m.onnx")
    assert report.comparison is not None
    assert report.comparison.mismatching == 0
    assert report.comparison.differing_share < 1e-3
    assert report.comparison.integers > 10_000
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    zeros = {int(constants[n.input[2]]) for n in graph.node if n.op_type == "QuantizeLinear"}
    assert set(found.values()) <= zeros | {128}
    if bits == 8:
        refused = tmp_path / "trt.onnx"
        with pytest.raises(
            ExportError, match=r"its integers have the zero point \d+, and those of tensorrt.*fit_zero_points"
        ) as e:
            qp.export_onnx(model, x, refused, runtime="tensorrt")
        assert set(found) <= set(e.value.quantizers)
        assert not refused.exists()


def test_weights_with_a_zero_point_are_not_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    recipe = qp.Recipe(name="r", weight=qp.QuantDescriptor(unsigned=True, zero_point=100))
    with pytest.raises(ExportError, match="exported for activations only"):
        qp.export_onnx(calibrated(recipe=recipe), X, tmp_path / "m.onnx")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_range_of_0_gives_the_zero_point_in_the_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = qp.TensorQuantizer(qp.QuantDescriptor(unsigned=True, zero_point=37))
    model.amax = 0.0
    report = qp.export_onnx(model, torch.randn(50), tmp_path / "m.onnx")
    assert report.comparison is not None
    assert (report.comparison.mismatching, report.comparison.largest_difference) == (0, 0)


def test_quantizers_that_differ_in_a_zero_point_alone_do_not_stand_in_for_each_other() -> None:
    first, second = (qp.TensorQuantizer(qp.QuantDescriptor(amax=1.0)) for _ in range(2))
    assert first.agrees_with(second)
    first.use_zero_point(37)
    assert not first.agrees_with(second)
    second.use_zero_point(38)
    assert not first.agrees_with(second)
    second.use_zero_point(37)
    assert first.agrees_with(second)


def test_a_zero_point_needs_a_range_to_stand_beside() -> None:
    quantizer = qp.TensorQuantizer(qp.QuantDescriptor(axis=1))
    with pytest.raises(qp.errors.RangeError, match="no range yet"):
        quantizer.use_zero_point(3)
    assert quantizer.zero_point is None
    assert quantizer.format.name == "int8"


def test_one_that_was_found_gives_way_to_what_the_descriptor_says() -> None:
    for descriptor, own in (
        (qp.QuantDescriptor(narrow_range=True), None),
        (qp.QuantDescriptor(unsigned=True, zero_point=5), 5),
    ):
        quantizer = qp.TensorQuantizer(descriptor)
        quantizer.amax = 1.0
        name = quantizer.format.name
        quantizer.use_zero_point(37)
        assert quantizer.zero_point_is_found
        assert (quantizer.format.name, quantizer.descriptor) == ("uint8", descriptor)
        quantizer.forget_zero_point()
        assert not quantizer.zero_point_is_found
        assert (quantizer.zero_point, quantizer.format.name) == (own, name)


@given(
    low=st.one_of(st.just(0.0), st.floats(-1e6, -1e-6)),
    high=st.one_of(st.just(0.0), st.floats(1e-6, 1e6)),
    bits=st.integers(2, 8),
)
def test_a_fitted_range_reaches_both_ends_within_half_a_step_and_has_the_steps_for_them(low, high, bits):
    zero_point, amax = fitted_zero_point(low, high, bits)
    q = QParams(Integer(bits), None, zero_point=zero_point)
    scale = amax / q.max()
    assert q.max() * scale >= high - 0.5001 * scale
    assert q.min() * scale <= low + 0.5001 * scale
    # One step more than the interval has, where that lies below 0 alone.
    assert scale <= (high - low) / (2**bits - 2) * 1.0001
    if high - low:
        ends = torch.tensor([low, high])
        error = fake_quantize(ends, torch.tensor(amax), Integer(bits), zero_point=zero_point) - ends
        assert error.abs().max() <= 0.501 * scale


def test_the_usual_cases():
    assert fitted_zero_point(0.0, 7.0, 8) == (0, 7.0)
    assert fitted_zero_point(-1.0, 1.0, 8)[0] == 128  # of two that are as good the even one
    assert fitted_zero_point(-85.0, 170.0, 8) == (85, 170.0)
    assert fitted_zero_point(-254.0, 0.0, 8) == (254, 1.0)
    assert fitted_zero_point(0.0, 0.0, 8) == (0, 0.0)


def test_what_got_a_zero_point_and_what_did_not_is_reported_with_the_reason():
    model = calibrated()
    report = qp.fit_zero_points(model, [X])
    names = {name for name in dict(model.named_modules()) if name.endswith("input_quantizer")}
    assert report.fitted.keys() | report.skipped.keys() == names
    again = qp.fit_zero_points(calibrated(2 * X - 1), [2 * X - 1])
    assert again.skipped["0.input_quantizer"] == "its symmetric range is as good"
    assert "zero points" in str(report)
