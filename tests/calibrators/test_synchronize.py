"""Statistics over real processes: every rank ends with those of the whole data."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from gloo import join

from quantpatch.calibrators import (
    BUILTIN_CALIBRATORS,
    Calibrator,
    HistogramCalibrator,
)
from quantpatch.errors import CalibrationError
from quantpatch.numerics.formats import Integer

RANKS = 2
KINDS = ("max", "moving_average", "entropy")  # one of each kind of statistics
AXES = (None, 0)


def data(case: str) -> list[list[torch.Tensor]]:
    """The batches of each rank."""
    generator = torch.Generator().manual_seed(5)
    x = [torch.randn(3, 400, generator=generator) ** 3 for _ in range(4)]
    return {
        "like data": [x[:2], x[2:]],
        "another scale and number": [x[:1], [0.001 * x[1], 1000 * x[2], x[3]]],
        "zeros on one rank": [[torch.zeros(3, 10)], x],
        "no data on the first rank": [[], x],
        "no data on the last rank": [x, [torch.empty(3, 0)]],
        "no data anywhere": [[], []],
    }[case]


CASES = (
    "like data",
    "another scale and number",
    "zeros on one rank",
    "no data on the first rank",
    "no data on the last rank",
    "no data anywhere",
)


def statistics(calibrator: Calibrator) -> dict[str, object]:
    if not calibrator.saw_data:
        return {"saw_data": False}
    found: dict[str, object] = {"saw_data": True, "amax": calibrator.compute_amax()}
    if isinstance(calibrator, HistogramCalibrator):
        found["counts"], found["bin_width"] = calibrator.histogram()
    return found


def collected(kind: str, axis: int | None, batches: list[torch.Tensor]) -> Calibrator:
    calibrator = BUILTIN_CALIBRATORS[kind](Integer(8), axis)
    for x in batches:
        calibrator.collect(x)
    return calibrator


def run_rank(rank: int, folder: str) -> None:
    join(rank, folder, RANKS)
    results: dict[object, object] = {}
    for kind in KINDS:
        for axis in AXES:
            for case in CASES:
                calibrator = collected(kind, axis, data(case)[rank])
                with torch.inference_mode():
                    calibrator.synchronize()
                results[kind, axis, case] = statistics(calibrator)
    # More data after the statistics were put together, and a group of one.
    calibrator = collected("percentile", None, data("like data")[rank])
    own = [dist.new_group([r]) for r in range(RANKS)][rank]
    calibrator.synchronize(own)
    results["own group"] = statistics(calibrator)
    calibrator.synchronize()
    calibrator.collect(1e6 * torch.ones(3, 4))
    results["more data"] = statistics(calibrator)
    calibrator = collected("moving_average", None, [torch.ones(2)] if rank else [])
    calibrator.synchronize()
    calibrator.collect(torch.tensor(2.0))
    results["a rank goes on"] = calibrator.compute_amax().item()
    try:
        collected("max", 0, [torch.ones(3 + rank, 2)]).synchronize()
    except CalibrationError as error:
        results["error"] = str(error)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(by_ranks):
    """What each rank found."""
    return by_ranks(run_rank, RANKS)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(actual[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("kind", ["max", "entropy"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
def test_every_rank_has_what_one_process_that_saw_everything_has(ranks, kind, axis, case):
    alone = statistics(collected(kind, axis, [x for batches in data(case) for x in batches]))
    for results in ranks:
        assert_same(results[kind, axis, case], alone)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
def test_moving_averages_are_averaged_by_their_numbers_of_batches(ranks, axis, case):
    counts = [sum(x.numel() > 0 for x in batches) for batches in data(case)]
    averages = [
        statistics(collected("moving_average", axis, batches)).get("amax", torch.tensor(0.0))
        for batches in data(case)
    ]
    for results in ranks:
        found = results["moving_average", axis, case]
        assert found["saw_data"] == (sum(counts) > 0)
        if found["saw_data"]:
            expected = sum(c * a for c, a in zip(counts, averages, strict=True)) / sum(counts)
            torch.testing.assert_close(found["amax"], expected)
    assert_same(ranks[0]["moving_average", axis, case], ranks[1]["moving_average", axis, case])


def test_a_group_of_one_leaves_the_statistics_alone(ranks):
    for rank, results in enumerate(ranks):
        assert_same(results["own group"], statistics(collected("percentile", None, data("like data")[rank])))


def test_data_collected_afterwards_is_added_to_that_of_all_ranks(ranks):
    everything = [x for batches in data("like data") for x in batches]
    alone = statistics(collected("percentile", None, [*everything, 1e6 * torch.ones(3, 4)]))
    for results in ranks:
        assert_same(results["more data"], alone)


def test_ranks_with_other_channels_are_an_error_on_every_rank(ranks):
    for results in ranks:
        assert "(3, 1), (4, 1)" in results["error"]


def test_a_moving_average_goes_on_from_that_of_all_ranks(ranks):
    for results in ranks:
        assert results["a rank goes on"] == pytest.approx(1.01)
