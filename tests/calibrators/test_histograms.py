"""What histograms hold: every value, in the bin of its magnitude, however it came in."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpatch.calibrators import (
    BUILTIN_CALIBRATORS,
    EntropyCalibrator,
    HistogramCalibrator,
    MSECalibrator,
    PercentileCalibrator,
    SQNRCalibrator,
    bins,
    entropy_threshold,
    mse_threshold,
    percentile_threshold,
    sqnr_threshold,
)
from quantpatch.errors import CalibrationError
from quantpatch.numerics.formats import Integer

INT8 = Integer(8)
HISTOGRAMS = [kind for kind in BUILTIN_CALIBRATORS.values() if issubclass(kind, HistogramCalibrator)]


def collected(data, axis=None, num_bins=16):
    calibrator = PercentileCalibrator(INT8, axis, num_bins=num_bins)
    for x in data:
        calibrator.collect(x)
    return calibrator


def reference_histogram(values: list[float], num_bins: int) -> tuple[list[int], float]:
    """Bins ``(j * width, (j + 1) * width]``, zeros in the first; the smallest power of two as width."""
    width = 2.0**-126  # all arithmetic is exact: float32 values in Python's float64
    while num_bins * width < max(abs(v) for v in values):
        width *= 2
    counts = [0] * num_bins
    for v in values:
        counts[max(math.ceil(abs(v) / width) - 1, 0)] += 1
    return counts, width


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
usual = st.floats(-1000, 1000, width=32)
edges = st.sampled_from(
    [
        2.0**127,
        1.7014120374287884e38,
        3.4028234663852886e38,
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        2.0,
        3.0,
        16.0,
        1 + 2**-23,
        1 - 2**-24,
        1e-45,
        2.0**-126,
    ]
)
values = st.lists(st.one_of(finite, usual, edges), min_size=1, max_size=40)


@settings(max_examples=250, deadline=None)
@given(values, st.sampled_from([8, 9, 16, 100]))
def test_every_value_is_counted_in_its_bin(values, num_bins):
    counts, width = collected([torch.tensor(values)], num_bins=num_bins).histogram()
    expected, expected_width = reference_histogram(values, num_bins)
    assert width.item() == expected_width
    assert counts.tolist() == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(values, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_counts_depend_on_neither_the_batches_nor_their_order(data, random):
    whole = collected([torch.tensor([v for batch in data for v in batch])])
    random.shuffle(data)
    parts = collected([torch.tensor(batch) for batch in data])
    for a, b in zip(whole.histogram(), parts.histogram(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.compute_amax(), parts.compute_amax())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.one_of(usual, edges), min_size=4, max_size=4), min_size=1, max_size=6))
def test_each_channel_has_the_histogram_it_would_have_alone(rows):
    x = torch.tensor(rows)
    counts, width = collected([x[:1], x], axis=1).histogram()
    assert counts.shape == (1, 4, 16)
    assert width.shape == (1, 4)
    for c in range(4):
        alone, alone_width = collected([x[:1, c], x[:, c]]).histogram()
        assert torch.equal(counts[0, c], alone)
        assert torch.equal(width[0, c], alone_width)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("axis", [None, 0, 1, (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_show(chunk, axis, dtype, monkeypatch):
    x = torch.randn(5, 13, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = collected([x], axis).histogram()
    monkeypatch.setattr(bins, "_CHUNK", chunk)
    for a, b in zip(collected([x], axis).histogram(), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_bins", [2**13, 2**14, 2**15, 2**16, 2**17])
@pytest.mark.parametrize("axis", [None, 0])
def test_indices_of_many_bins_do_not_overflow(num_bins, axis):
    x = torch.rand(12, 50, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1.0
    counts, width = collected([x], axis, num_bins=num_bins).histogram()
    index = np.maximum(np.ceil(x.double().numpy() * num_bins) - 1, 0).astype(np.int64)
    expected = np.stack([np.bincount(row, minlength=num_bins) for row in index])
    assert bool((width == 1 / num_bins).all())
    assert np.array_equal(
        counts.numpy().reshape(-1, num_bins), expected.sum(0)[None] if axis is None else expected
    )


def test_a_batch_ten_thousand_times_larger_widens_the_bins_and_loses_nothing():
    x = torch.linspace(-1, 1, 1001)
    calibrator = collected([x])
    size = calibrator.histogram()[0].numel()
    calibrator.collect(1e4 * x)
    counts, width = calibrator.histogram()
    assert counts.numel() == size
    assert counts.sum() == 2002
    assert width.item() * 16 >= 1e4
    assert torch.equal(counts, collected([torch.cat([x, 1e4 * x])]).histogram()[0])


def test_a_later_batch_that_is_smaller_changes_no_width():
    x = torch.linspace(-1, 1, 101)
    calibrator = collected([x])
    width = calibrator.histogram()[1]
    calibrator.collect(x / 1e4)
    counts, same = calibrator.histogram()
    assert torch.equal(width, same)
    assert counts[0] >= 101


@pytest.mark.parametrize("kind", HISTOGRAMS)
def test_an_all_zero_first_batch_fixes_no_range(kind):
    x = torch.linspace(0.1, 1, 50)
    calibrator = kind(INT8)
    calibrator.collect(torch.zeros(7))
    assert calibrator.compute_amax().item() == 0.0
    calibrator.collect(x)
    counts, width = calibrator.histogram()
    assert counts[0] == 7
    assert counts.sum() == 57
    assert width.item() == 2.0**-11
    assert 0 < calibrator.compute_amax().item() <= 1


def test_counts_are_exact_beyond_what_float32_holds():
    x = torch.ones(1, dtype=torch.float16)
    calibrator = collected([x.expand(2**24), x.expand(3)])
    assert calibrator.histogram()[0].max().item() == 2**24 + 3


def test_a_zero_channel_among_others_stays_zero():
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    for kind in HISTOGRAMS:
        calibrator = kind(INT8, 0)
        calibrator.collect(x)
        amax = calibrator.compute_amax().flatten()
        assert amax[1] == 0
        assert bool((amax[[0, 2]] > 0).all())


@pytest.mark.parametrize("kind", HISTOGRAMS)
@settings(max_examples=30, deadline=None)
@given(values=values)
def test_the_range_is_at_most_the_largest_magnitude(kind, values):
    calibrator = kind(INT8, num_bins=64)
    x = torch.tensor(values)
    calibrator.collect(x)
    amax = calibrator.compute_amax()
    assert 0 <= amax <= x.abs().max()
    assert (amax == 0) == (not x.any())


def test_percentile_100_is_the_maximum_exactly():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    calibrator = PercentileCalibrator(INT8, percentile=100.0)
    calibrator.collect(x)
    assert torch.equal(calibrator.compute_amax(), x.abs().max())


def test_the_range_of_the_percentile_holds_that_share_of_the_values():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    calibrator = PercentileCalibrator(INT8, percentile=99.0)
    calibrator.collect(x)
    assert 0.99 <= (x.abs() <= calibrator.compute_amax()).double().mean().item() < 0.991


@pytest.mark.parametrize(
    ("calibrator", "threshold"),
    [
        (
            EntropyCalibrator(INT8, num_bins=256, start_bin=30),
            lambda c, w: entropy_threshold(c, w, INT8, start_bin=30),
        ),
        (MSECalibrator(INT8, num_bins=256, start_bin=5), lambda c, w: mse_threshold(c, w, INT8, start_bin=5)),
        (
            SQNRCalibrator(INT8, num_bins=256, clip_weight=9.0),
            lambda c, w: sqnr_threshold(c, w, INT8, clip_weight=9.0),
        ),
        (
            PercentileCalibrator(INT8, num_bins=256, percentile=90.0),
            lambda c, w: percentile_threshold(c, w, percentile=90.0),
        ),
    ],
)
def test_a_calibrator_hands_its_histogram_and_options_to_its_threshold(calibrator, threshold):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3
    calibrator.reset()
    calibrator.collect(x)
    assert torch.equal(calibrator.compute_amax(), threshold(*calibrator.histogram()))


def test_the_histogram_handed_out_is_a_copy():
    calibrator = collected([torch.ones(5)])
    counts, width = calibrator.histogram()
    counts.zero_()
    width.zero_()
    assert calibrator.histogram()[0].sum() == 5
    assert calibrator.histogram()[1] > 0


def test_there_is_no_histogram_without_data():
    with pytest.raises(CalibrationError, match="saw no data"):
        PercentileCalibrator(INT8).histogram()


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        (MSECalibrator, "num_bins", 0),
        (MSECalibrator, "num_bins", 7),
        (MSECalibrator, "num_bins", 2**24 + 1),
        (PercentileCalibrator, "percentile", -1.0),
        (PercentileCalibrator, "percentile", 0.999),  # meant as a share
        (PercentileCalibrator, "percentile", 1.0),
        (PercentileCalibrator, "percentile", 100.5),
        (PercentileCalibrator, "percentile", math.nan),
        (EntropyCalibrator, "start_bin", 0),
        (MSECalibrator, "start_bin", -3),
        (SQNRCalibrator, "start_bin", 0),
        (SQNRCalibrator, "clip_weight", -1.0),
        (SQNRCalibrator, "clip_weight", math.inf),
        (SQNRCalibrator, "clip_weight", math.nan),
    ],
)
def test_an_option_out_of_range_is_an_error_before_data_is_collected(kind, option, value):
    with pytest.raises(ValueError, match=option):
        kind(INT8, **{option: value})
