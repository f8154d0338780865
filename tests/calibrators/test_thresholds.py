"""Thresholds against plain reference loops: one candidate after the other, one bin after the other."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpatch.calibrators import (
    entropy_threshold,
    mse_threshold,
    percentile_threshold,
    sqnr_threshold,
    thresholds,
)
from quantpatch.numerics.formats import BUILTIN_FORMATS, Integer, NumberFormat
from quantpatch.numerics.qparams import QParams

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m / 8 * 2.0**-6 for m in range(8)] + [
    (1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)
]


# The reference implementations.


def last_bin(counts: list[int]) -> int:
    """The upper edge of the last bin that is not empty; candidates end there."""
    return max((j + 1 for j, count in enumerate(counts) if count), default=0)


def integer_level(levels: int):
    """TensorRT's levels: equal parts of the candidate."""
    return lambda bin_, candidate: bin_ * levels // candidate


def nearest_level(magnitudes: list[float]):
    """The magnitude that is nearest to the bin's centre, the larger of two that are equally near."""
    exact = [Fraction(m) for m in magnitudes]

    def level(bin_: int, candidate: int) -> int:
        value = Fraction(2 * bin_ + 1, 2 * candidate) * exact[-1]
        return min(range(len(exact)), key=lambda k: (abs(value - exact[k]), -k))

    return level


def reference_divergence(counts: list[int], candidate: int, level) -> float:
    """KL(P || Q) of one candidate, as TensorRT's calibration defines P and Q."""
    below, above = counts[:candidate], sum(counts[candidate:])
    p = [float(count) for count in below]
    p[-1] += above

    members: dict[int, list[int]] = {}
    for j in range(candidate):
        if below[j]:
            members.setdefault(level(j, candidate), []).append(j)
    q = [0.0] * candidate
    for bins in members.values():
        for j in bins:
            q[j] = sum(below[k] for k in bins) / len(bins)

    if any(pj and not qj for pj, qj in zip(p, q, strict=True)):
        return math.inf
    total_p, total_q = math.fsum(p), math.fsum(q)
    return math.fsum(
        pj / total_p * math.log((pj / total_p) / (qj / total_q)) for pj, qj in zip(p, q, strict=True) if pj
    )


def reference_entropy(counts: list[int], width: float, level, start_bin: int) -> float:
    top = last_bin(counts)
    counts = [counts[1], *counts[1:]]
    best, edge = math.inf, top
    divergences = {}
    if sum(counts):
        for candidate in range(min(start_bin, top), top + 1):
            divergences[candidate] = reference_divergence(counts, candidate, level)
        best = min(divergences.values())
        edge = max(c for c, divergence in divergences.items() if divergence <= best + 1e-12)
    return edge * width


def reference_sqnr(
    counts: list[int], width: float, format: NumberFormat, start_bin: int, clip_weight: float
) -> float:
    top = last_bin(counts)
    weights = np.array(counts, dtype=np.float64)
    centres = (torch.arange(len(counts)) + 0.5) * width
    errors = {}
    for candidate in range(min(start_bin, top), top + 1):
        if candidate == 0:
            continue
        amax = candidate * width
        scale = torch.tensor(amax, dtype=torch.float32) / format.max
        quantized = format.round_(centres / scale) * scale
        squares = (quantized.double() - centres.double()).numpy() ** 2
        clipped = centres.numpy() > amax
        errors[candidate] = float(
            (weights * squares)[~clipped].sum() + clip_weight * (weights * squares)[clipped].sum()
        )
    least = min(errors.values(), default=0.0)
    return min((c for c, error in errors.items() if error <= least * (1 + 1e-9)), default=0) * width


def reference_percentile(counts: list[int], width: float, percentile: float) -> float:
    if not sum(counts):
        return 0.0
    below = 0
    for j, count in enumerate(counts):
        below += count
        if below * 100.0 >= percentile * sum(counts):
            return (j + 1) * width
    raise AssertionError


# The histograms they are compared on.


def histograms(max_bins: int = 96) -> st.SearchStrategy[list[int]]:
    count = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 10**6), st.integers(0, 10**10))
    return st.lists(count, min_size=2, max_size=max_bins)


def sampled_histogram(kind: str, bins: int = 2048) -> torch.Tensor:
    random = np.random.default_rng(len(kind))
    samples = {
        "normal": random.normal(size=200_000),
        "relu": np.maximum(random.normal(size=200_000), 0),
        "laplace": random.laplace(size=200_000),
        "outliers": np.concatenate([random.normal(size=200_000), random.normal(size=20) * 30]),
        "uniform": random.uniform(size=200_000),
        "two modes": np.concatenate([random.normal(size=100_000), random.normal(40, 2, size=1000)]),
        "few values": random.choice([0.0, 0.1, 0.5, 1.0], size=1000),
    }[kind]
    magnitudes = np.abs(samples)
    return torch.from_numpy(np.histogram(magnitudes, bins, (0, magnitudes.max()))[0])


KINDS = ["normal", "relu", "laplace", "outliers", "uniform", "two modes", "few values"]
widths = st.sampled_from([1.0, 0.25, 2.0**-20, 2.0**30])
start_bins = st.integers(1, 128)


# Entropy.


@settings(max_examples=150, deadline=None)
@given(histograms(), widths, start_bins, st.sampled_from(["int2", "int4", "int8", "uint3", "int4_narrow"]))
def test_entropy_equals_the_reference_loop_for_integers(counts, width, start_bin, name):
    format = BUILTIN_FORMATS[name]
    expected = reference_entropy(counts, width, integer_level(int(format.max) + 1), start_bin)
    assert entropy_threshold(torch.tensor(counts), width, format, start_bin=start_bin).item() == expected


@settings(max_examples=50, deadline=None)
@given(histograms(48), start_bins, st.sampled_from([("fp4_e2m1", FP4), ("fp8_e4m3", E4M3)]))
def test_entropy_equals_the_reference_loop_for_floating_point(counts, start_bin, format):
    name, magnitudes = format
    expected = reference_entropy(counts, 1.0, nearest_level(magnitudes), start_bin)
    actual = entropy_threshold(torch.tensor(counts), 1.0, BUILTIN_FORMATS[name], start_bin=start_bin)
    assert actual.item() == expected


@pytest.mark.parametrize(("name", "magnitudes"), [("fp4_e2m1", FP4), ("fp8_e4m3", E4M3)])
@pytest.mark.parametrize("candidate", [1, 2, 12, 48, 129, 300])
def test_every_bin_lies_in_the_level_nearest_to_its_centre(name, magnitudes, candidate):
    starts = thresholds._level_starts(torch.tensor([candidate]), QParams(BUILTIN_FORMATS[name], None))[0]
    assert starts[0] == 0
    assert starts[-1] == candidate
    found = torch.searchsorted(starts[:-1].contiguous(), torch.arange(candidate), right=True) - 1
    level = nearest_level(magnitudes)
    assert found.tolist() == [level(j, candidate) for j in range(candidate)]


@pytest.mark.parametrize("kind", KINDS)
def test_entropy_equals_the_reference_loop_on_512_bins(kind):
    counts = sampled_histogram(kind, 512)
    expected = reference_entropy(counts.tolist(), 0.5, integer_level(16), 48)
    assert entropy_threshold(counts, 0.5, Integer(5), start_bin=48).item() == expected


@pytest.mark.parametrize("kind", ["outliers", "two modes", "few values"])
def test_entropy_equals_the_reference_loop_on_2048_bins(kind):
    counts = sampled_histogram(kind)
    expected = reference_entropy(counts.tolist(), 1.0, integer_level(128), 128)
    assert entropy_threshold(counts, 1.0, Integer(8)).item() == expected


def test_entropy_clips_outliers_that_the_maximum_keeps():
    counts = sampled_histogram("outliers")
    assert entropy_threshold(counts, 1.0, Integer(4)).item() < 0.5 * len(counts)


def test_entropy_levels_follow_the_format():
    counts = sampled_histogram("laplace")
    ranges = [entropy_threshold(counts, 1.0, Integer(bits)).item() for bits in (4, 8)]
    assert ranges[0] < ranges[1]


def test_entropy_does_not_look_at_bin_zero():
    counts = sampled_histogram("normal")
    more_zeros = counts.clone()
    more_zeros[0] = 10**9
    assert torch.equal(
        entropy_threshold(counts, 1.0, Integer(8)), entropy_threshold(more_zeros, 1.0, Integer(8))
    )


# Mean squared error and SQNR.


@settings(max_examples=150, deadline=None)
@given(
    histograms(),
    widths,
    start_bins,
    st.sampled_from([n for n, f in BUILTIN_FORMATS.items() if f.block_size is None]),
    st.sampled_from([1.0, 3.0, 0.5]),
)
def test_sqnr_equals_the_reference_loop(counts, width, start_bin, name, clip_weight):
    format = BUILTIN_FORMATS[name]
    actual = sqnr_threshold(torch.tensor(counts), width, format, start_bin=start_bin, clip_weight=clip_weight)
    assert actual.item() == reference_sqnr(counts, width, format, start_bin, clip_weight)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in KINDS for name in ("int8", "fp4_e2m1")),
        *(("laplace", name) for name in ("uint8", "int4", "fp8_e4m3", "fp8_e5m2")),
    ],
)
def test_mse_equals_the_reference_loop_on_2048_bins(kind, name):
    counts, format = sampled_histogram(kind), BUILTIN_FORMATS[name]
    expected = reference_sqnr(counts.tolist(), 2.0**-8, format, 1, 1.0)
    assert mse_threshold(counts, 2.0**-8, format).item() == expected


def test_mse_equals_the_best_of_real_data_quantized_with_every_candidate():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(3)).abs()
    width = values.max().item() / 256
    counts = torch.histc(values, 256, 0, values.max().item()).long()
    chosen = mse_threshold(counts, width, Integer(3)).item()

    def error(amax: float) -> float:
        return float((Integer(3).round_(values / (amax / 3)) * (amax / 3) - values).square().sum())

    best = min(error(i * width) for i in range(1, 257))
    assert error(chosen) <= best * 1.001


def test_sqnr_clips_less_the_more_clipping_weighs():
    counts = sampled_histogram("laplace")
    ranges = [sqnr_threshold(counts, 1.0, Integer(4), clip_weight=w).item() for w in (1.0, 3.0, 100.0)]
    assert ranges == sorted(ranges)
    assert ranges[0] < ranges[1] < ranges[2]
    assert ranges[0] == mse_threshold(counts, 1.0, Integer(4)).item()


def test_the_clipping_error_does_not_cancel():
    counts = torch.tensor([[10**9, 3, 0, 7, 10**10, 1, 0, 2], [0, 0, 0, 0, 0, 0, 0, 0]])
    candidates = torch.arange(1, 9)
    bounds = candidates * (1 + 1e-7)
    distance = (torch.arange(8) + 0.5).double()[None, :] - bounds[:, None]
    clipped = torch.arange(8)[None, :] >= candidates[:, None]
    expected = counts.double() @ (distance.square() * clipped).T
    actual = thresholds._clipping_error(counts, candidates, bounds)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


# Percentile.


@settings(max_examples=150, deadline=None)
@given(histograms(), widths, st.one_of(st.integers(0, 100).map(float), st.floats(0, 100)))
def test_percentile_equals_the_reference_loop(counts, width, percentile):
    actual = percentile_threshold(torch.tensor(counts), width, percentile=percentile)
    assert actual.item() == reference_percentile(counts, width, percentile)


def test_percentile_is_the_smallest_edge_that_holds_enough():
    counts = torch.tensor([50, 25, 24, 1, 0])
    edges = [percentile_threshold(counts, 1.0, percentile=p).item() for p in (50, 50.01, 75, 99, 99.5, 100)]
    assert edges == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("percentile", [-0.1, 100.1, math.nan])
def test_a_percentile_out_of_range_is_an_error(percentile):
    with pytest.raises(ValueError, match="from 0 to 100"):
        percentile_threshold(torch.tensor([1, 2]), 1.0, percentile=percentile)


# What holds for all.

ALL = {
    "entropy": lambda c, w: entropy_threshold(c, w, Integer(5)),
    "entropy fp4": lambda c, w: entropy_threshold(c, w, BUILTIN_FORMATS["fp4_e2m1"]),
    "mse": lambda c, w: mse_threshold(c, w, Integer(5)),
    "sqnr": lambda c, w: sqnr_threshold(c, w, Integer(5)),
    "percentile": lambda c, w: percentile_threshold(c, w, percentile=99.0),
}
every_threshold = pytest.mark.parametrize("threshold", ALL.values(), ids=ALL.keys())


@every_threshold
def test_a_batch_of_histograms_gives_what_each_gives_alone(threshold, monkeypatch):
    counts = torch.stack([sampled_histogram(kind, 300) for kind in KINDS] + [torch.zeros(300).long()])
    counts = counts.reshape(2, 4, 300)
    width = torch.linspace(0.1, 2.0, 8).reshape(2, 4)
    together = threshold(counts, width)
    alone = [threshold(c, w) for c, w in zip(counts.reshape(8, 300), width.reshape(8), strict=True)]
    assert together.dtype == torch.float32
    assert torch.equal(together, torch.stack(alone).reshape(2, 4))
    monkeypatch.setattr(thresholds, "_CHUNK", 7)
    assert torch.equal(threshold(counts, width), together)


@every_threshold
def test_a_histogram_without_counts_gives_zero(threshold):
    assert threshold(torch.zeros(40, dtype=torch.int64), 1.0).item() == 0.0


@every_threshold
def test_no_histogram_gives_no_range(threshold):
    assert threshold(torch.zeros(0, 40, dtype=torch.int64), 1.0).shape == (0,)


@every_threshold
def test_the_range_reaches_no_further_than_the_last_bin_in_use(threshold):
    counts = torch.zeros(400, dtype=torch.int64)
    counts[:150] = torch.arange(150, 0, -1)
    assert 0 < threshold(counts, 1.0).item() <= 150


@pytest.mark.parametrize(
    ("threshold", "counts", "bits"),
    [(entropy_threshold, [5, 4, 2, 5, 1, 0, 0, 0], 2), (mse_threshold, [1, 3, 4, 0, 0, 0, 0, 0], 3)],
)
def test_candidates_beyond_the_last_bin_in_use_do_not_compete(threshold, counts, bits):
    used = counts[: last_bin(counts)]
    expected = threshold(torch.tensor(used), 1.0, Integer(bits), start_bin=2)
    assert expected.item() < len(used)
    assert torch.equal(threshold(torch.tensor(counts), 1.0, Integer(bits), start_bin=2), expected)


@every_threshold
def test_the_histogram_is_left_alone(threshold):
    counts = sampled_histogram("normal", 200)
    before = counts.clone()
    threshold(counts, 1.0)
    assert torch.equal(counts, before)


@every_threshold
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_counts_of_any_integer_dtype_are_taken(threshold, dtype):
    counts = sampled_histogram("normal", 200).clamp_max(200)
    assert torch.equal(threshold(counts.to(dtype), 1.0), threshold(counts, 1.0))


@every_threshold
def test_the_default_dtype_does_not_matter(threshold):
    counts = sampled_histogram("laplace", 256)
    expected = threshold(counts, 0.1)
    torch.set_default_dtype(torch.float64)
    try:
        actual = threshold(counts, 0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("threshold", [entropy_threshold, mse_threshold, sqnr_threshold])
def test_a_start_bin_below_one_is_an_error(threshold):
    with pytest.raises(ValueError, match="start_bin must be at least 1"):
        threshold(torch.tensor([1, 2]), 1.0, Integer(8), start_bin=0)


@pytest.mark.parametrize(("name", "magnitudes"), [("fp4_e2m1", FP4), ("fp8_e4m3", E4M3)])
def test_the_magnitudes_of_a_format_are_found(name, magnitudes):
    assert list(thresholds._magnitudes(QParams(BUILTIN_FORMATS[name], None))) == magnitudes


@pytest.mark.parametrize("name", ["int2", "int8", "uint8", "uint2", "int8_narrow"])
def test_the_magnitudes_of_integers_are_all_up_to_the_largest(name):
    format = BUILTIN_FORMATS[name]
    assert thresholds._magnitudes(QParams(format, None)) == tuple(range(int(format.max) + 1))
