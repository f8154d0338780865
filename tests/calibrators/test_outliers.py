"""Histograms of data with outliers: ranges of what a method keeps, as if the outliers were near."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import quantpatch as qp
from quantpatch.calibrators import (
    Calibrator,
    EntropyCalibrator,
    HistogramCalibrator,
    MSECalibrator,
    PercentileCalibrator,
)
from quantpatch.numerics.fake_quant import fake_quantize
from quantpatch.numerics.formats import Integer

# Both in torch's operations and in kernels of our own.
pytestmark = pytest.mark.parametrize("kernels", [False, True], ids=["operations", "kernels"], indirect=True)

INT8 = Integer(8)


def normal(seed: int = 0, count: int = 60_000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def with_outliers(x: Tensor, *outliers: float) -> Tensor:
    x = x.clone()
    x[torch.arange(len(outliers)) * 7 + 3] = torch.tensor(outliers)
    return x


def range_of(calibrator: Calibrator, *batches: Tensor) -> float:
    for x in batches:
        calibrator.collect(x)
    return calibrator.compute_amax().item()


def percentile_of(percentile: float, *batches: Tensor) -> float:
    values = torch.cat([x.flatten() for x in batches]).abs().sort().values
    return values[math.ceil(round(percentile * len(values) / 100, 6)) - 1].item()


@pytest.mark.parametrize("outlier", [60.0, 1e3, -1e6, 3e38])
@pytest.mark.parametrize("percentile", [90.0, 99.9, 99.99])
def test_a_percentile_is_that_of_the_data_whatever_the_outlier(percentile: float, outlier: float) -> None:
    x = with_outliers(normal(), outlier)
    found = range_of(PercentileCalibrator(INT8, percentile=percentile), x)
    assert found == pytest.approx(percentile_of(percentile, x), rel=0.02)


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_so_it_is_in_whichever_batch_the_outlier_comes(position: int) -> None:
    batches = [normal(seed, 20_000) * (1 + 0.2 * seed) for seed in range(4)]
    batches[position] = with_outliers(batches[position], 1e5, -1e6)
    found = range_of(PercentileCalibrator(INT8, percentile=99.9), *batches)
    assert found == pytest.approx(percentile_of(99.9, *batches), rel=0.02)


def test_outliers_that_belong_to_the_share_are_kept() -> None:
    x = with_outliers(normal(), *[1e4] * 20)
    assert range_of(PercentileCalibrator(INT8, percentile=99.99), x) == pytest.approx(1e4, rel=1e-3)
    assert range_of(PercentileCalibrator(INT8, percentile=99.9), x) < 4.0
    assert range_of(PercentileCalibrator(INT8, percentile=100.0), x) == 1e4


def test_channels_have_their_own_outliers() -> None:
    x = torch.stack([normal(0), with_outliers(normal(1), 1e6), torch.zeros(60_000), normal(3) * 1e-3])
    calibrator = PercentileCalibrator(INT8, 0, percentile=99.9)
    calibrator.collect(x)
    found = calibrator.compute_amax().flatten()
    for channel in (0, 1, 3):
        assert found[channel].item() == pytest.approx(percentile_of(99.9, x[channel]), rel=0.02)
    assert found[2] == 0.0


def test_nearly_nothing_but_zeros_still_gets_a_range_that_can_be_used() -> None:
    x = torch.zeros(100_000)
    x[5] = 1.0
    assert 1e-4 < range_of(PercentileCalibrator(INT8), x) < 1e-2


def test_values_that_grow_beyond_the_second_histogram_are_not_lost() -> None:
    batches = [with_outliers(normal(), 1e6), *(500 * normal(seed) for seed in (1, 2, 3))]
    found = range_of(PercentileCalibrator(INT8, percentile=99.0), *batches)
    assert found == pytest.approx(percentile_of(99.0, *batches), abs=1e6 / 1024)


def test_entropy_takes_the_range_that_it_takes_without_the_outlier() -> None:
    without = range_of(EntropyCalibrator(INT8), normal())
    assert range_of(EntropyCalibrator(INT8), with_outliers(normal(), 1e6)) == pytest.approx(without, rel=0.15)


def test_mse_clips_an_outlier_where_that_errs_less() -> None:
    x = with_outliers(normal(count=1_000_000), 60.0)
    found = range_of(MSECalibrator(INT8), x)

    def error(amax: float) -> float:
        quantizer = qp.TensorQuantizer(qp.QuantDescriptor(amax=amax))
        return (quantizer(x) - x).square().mean().item()

    assert error(found) <= 1.02 * min(error(amax) for amax in torch.linspace(3, 60, 60).tolist())


class TwoRanks:
    """Statistics of two calibrators put together, as ``synchronize`` does it: both reduce, step by step."""

    def __init__(self, *calibrators: HistogramCalibrator) -> None:
        self.calibrators = calibrators

    def reduce(self) -> None:
        import threading

        barrier, given, errors = threading.Barrier(2), [None, None], []

        def reducing(rank: int) -> Callable[[Tensor, object], Tensor]:
            def all_reduce(tensor: Tensor, how: object) -> Tensor:
                given[rank] = tensor
                barrier.wait(30)
                both = torch.stack(list(given))
                result = both.sum(0) if "SUM" in str(how) else both.amax(0)
                barrier.wait(30)
                return result

            return all_reduce

        def run(rank: int) -> None:
            try:
                self.calibrators[rank]._reduce(reducing(rank))
            except Exception as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors


@pytest.mark.parametrize("outliers", [(1e6, None), (None, 1e6), (1e6, 1e5), (None, None)], ids=str)
def test_ranks_find_the_same_whichever_saw_the_outlier(outliers: tuple[float | None, float | None]) -> None:
    batches = [normal(0), 1.7 * normal(1)]
    batches = [x if o is None else with_outliers(x, o) for x, o in zip(batches, outliers, strict=True)]
    calibrators = [PercentileCalibrator(INT8, percentile=99.9) for _ in batches]
    for calibrator, x in zip(calibrators, batches, strict=True):
        calibrator.collect(x)
    TwoRanks(*calibrators).reduce()
    first, second = (calibrator.compute_amax().item() for calibrator in calibrators)
    assert first == second == pytest.approx(percentile_of(99.9, *batches), rel=0.02)


def test_many_channels_take_little_memory_and_few_bins() -> None:
    weight = torch.randn(9000, 24, generator=torch.Generator().manual_seed(0))
    calibrator, exact = MSECalibrator(INT8, 0), MSECalibrator(INT8, 0, num_bins=2048)
    calibrator.collect(weight)
    assert calibrator.num_bins == 256
    assert calibrator.histogram()[0].shape == (9000, 1, 256)
    exact.collect(weight[:64])
    assert exact.num_bins == 2048
    found, expected = calibrator.compute_amax()[:64], exact.compute_amax()
    errors = [
        (fake_quantize(weight[:64], amax, INT8, axis=0) - weight[:64]).square().sum()
        for amax in (found, expected)
    ]
    assert errors[0] < 1.1 * errors[1]
    for count in (1, 2048, 2049, 4097):
        few = MSECalibrator(INT8, 0)
        few.collect(torch.ones(count, 2))
        assert few.num_bins == {1: 2048, 2048: 2048, 2049: 1024, 4097: 512}[count]
