"""Ranges from histograms, as pure functions of tensors.

All of them take histograms of magnitudes: bin ``j`` of ``counts`` holds the values between
``j * bin_width`` and ``(j + 1) * bin_width``. Candidates for the range are the upper edges of the
bins, up to that of the last bin with a value in it. They are computed with all at once, for many
histograms at once, in units of one bin, so that the result scales exactly with ``bin_width``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from quantpatch.errors import ArgumentError
from quantpatch.numerics.formats import NumberFormat
from quantpatch.numerics.qparams import QParams

_CHUNK = 1 << 18  # elements of intermediate results at a time: bounds the memory, near a CPU's cache
# Candidates whose figures differ by less than rounding does are equally good.
_KL_TIE = 1e-12
_ERROR_TIE = 1e-9


def entropy_threshold(
    counts: Tensor,
    bin_width: Tensor | float,
    format: NumberFormat,
    *,
    zero_point: int | None = None,
    start_bin: int = 128,
) -> Tensor:
    """The range whose quantized distribution loses the least information (TensorRT's calibration).

    For each candidate, the reference distribution P is that of the bins below it, the values above
    added to its last bin. Q is that of the bins below it alone, quantized: merged into as many levels
    as the format has magnitudes, and each level spread evenly over those of its bins that are not
    empty. The candidate with the least Kullback-Leibler divergence ``sum(P * log(P / Q))`` wins, the
    last one among equals. Bin 0 is first given the count of bin 1, because the many zeros after a ReLU
    cost nothing in any range.

    Source: S. Migacz, "8-bit Inference with TensorRT", GTC 2017; the last minimum and the first bin as
    in NVIDIA's pytorch-quantization. Its levels are ``2**(bits - 1)`` (signed) or ``2**bits``
    (unsigned) equal parts of the candidate, which serves every format whose magnitudes are
    ``0, 1, ..., max``. For others, such as FP8, there is no published rule: here a bin belongs to the
    magnitude that is nearest to its centre.

    Args:
        counts: ``(..., bins)``, of any integer dtype; at least two bins.
        bin_width: Width of the bins, a number or of shape ``(...)``.
        format: The number format to quantize to.
        zero_point: How many of its integers, unsigned then, are not for these magnitudes but for the other
            side of 0.
        start_bin: The smallest candidate, in bins.

    Returns:
        Float32 of shape ``(...)``; 0 where there is no count.
    """
    b = counts.reshape(-1, counts.shape[-1]).to(torch.int64, copy=True)
    top = _top(b)
    b[:, 0] = b[:, 1]
    q = QParams(format, None, zero_point=zero_point)
    candidates = _candidates(start_bin, b.shape[1], b.device)
    starts = _level_starts(candidates, q)  # (candidates, levels + 1)
    # The level of a candidate's last bin: the last one that starts below the candidate.
    last_level = (starts[:, :-1] < candidates[:, None]).sum(1, keepdim=True) - 1

    rows = max(1, _CHUNK // starts.numel())
    step = max(1, _CHUNK // starts.shape[1])
    best = [
        _least_divergence(b[row : row + rows], top[row : row + rows], candidates, starts, last_level, step)
        for row in range(0, len(b), rows)
    ]
    return _edges(torch.cat(best) if best else top, bin_width, counts)


def mse_threshold(
    counts: Tensor,
    bin_width: Tensor | float,
    format: NumberFormat,
    *,
    zero_point: int | None = None,
    start_bin: int = 1,
) -> Tensor:
    """The range with the least expected squared error of quantization.

    The error of a candidate is ``sum(counts * (quantize(centres) - centres) ** 2)``, with the centres
    of the bins quantized to the format (float32 arithmetic, as in fake quantization) and saturated at
    the candidate. The smallest candidate among equals wins.

    Args:
        counts: ``(..., bins)``, of any integer dtype.
        bin_width: Width of the bins, a number or of shape ``(...)``.
        format: The number format to quantize to.
        zero_point: How many of its integers, unsigned then, are not for these magnitudes but for the other
            side of 0.
        start_bin: The smallest candidate, in bins.

    Returns:
        Float32 of shape ``(...)``; 0 where there is no count.
    """
    return sqnr_threshold(
        counts, bin_width, format, zero_point=zero_point, start_bin=start_bin, clip_weight=1.0
    )


def sqnr_threshold(
    counts: Tensor,
    bin_width: Tensor | float,
    format: NumberFormat,
    *,
    zero_point: int | None = None,
    start_bin: int = 1,
    clip_weight: float = 3.0,
) -> Tensor:
    """The range with the best ratio of signal to quantization noise, in which clipping counts more.

    The signal is the same for every candidate, so this is :func:`mse_threshold` but for the weight of
    the noise of the values above the candidate.

    Source: AIMET's ``SqnrEncodingAnalyzer``, whose ``gamma`` of 3 is the default weight here.

    Args:
        counts: ``(..., bins)``, of any integer dtype.
        bin_width: Width of the bins, a number or of shape ``(...)``.
        format: The number format to quantize to.
        zero_point: How many of its integers, unsigned then, are not for these magnitudes but for the other
            side of 0.
        start_bin: The smallest candidate, in bins.
        clip_weight: How much the noise of clipped values counts; 1 gives :func:`mse_threshold`.

    Returns:
        Float32 of shape ``(...)``; 0 where there is no count.
    """
    q = QParams(format, None, zero_point=zero_point)
    every = counts.reshape(-1, counts.shape[-1])
    candidates = _candidates(start_bin, every.shape[1], every.device)
    rows = max(1, 4 * _CHUNK // max(1, every.shape[1]))
    best = [_least_error(b.to(torch.int64), candidates, q, clip_weight) for b in torch.split(every, rows)]
    return _edges(torch.cat(best), bin_width, counts)


def _least_error(b: Tensor, candidates: Tensor, q: QParams, clip_weight: float) -> Tensor:
    """The candidate with the least error for each histogram; ``(rows,)``."""
    top = _top(b)
    # The largest quantized value in float32: the candidate, or a rounding beside it.
    scales = candidates.float() / q.max()
    bounds = (scales * q.max()).double()
    errors = clip_weight * _clipping_error(b, candidates, bounds) + _rounding_error(b, candidates, scales, q)
    errors = errors.masked_fill(candidates > top[:, None], torch.inf)
    least = errors.amin(1, keepdim=True)
    # argmax gives the first of equals.
    first = (errors <= least * (1 + _ERROR_TIE)).to(torch.uint8).argmax(1)
    return torch.minimum(candidates[first], top)


def percentile_threshold(counts: Tensor, bin_width: Tensor | float, *, percentile: float = 99.99) -> Tensor:
    """The smallest edge of a bin below which at least ``percentile`` percent of the values lie.

    Args:
        counts: ``(..., bins)``, of any integer dtype.
        bin_width: Width of the bins, a number or of shape ``(...)``.
        percentile: The percentage, from 0 to 100.

    Returns:
        Float32 of shape ``(...)``; 0 where there is no count.

    Raises:
        ArgumentError: The percentage is out of range.
    """
    if not 0.0 <= percentile <= 100.0:
        raise ArgumentError(f"percentile must be from 0 to 100, got {percentile!r}", percentile=percentile)
    b = counts.reshape(-1, counts.shape[-1])
    below = b.cumsum(1).double()
    # Both sides times 100, so that whole percentages of whole counts are compared exactly.
    edge = (below * 100.0 < below[:, -1:] * percentile).sum(1) + 1
    return _edges(torch.minimum(edge, _top(b)), bin_width, counts)


def _top(b: Tensor) -> Tensor:
    """The upper edge, in bins, of the last bin that is not empty; 0 if all are. ``(rows,)``, int64."""
    edges = torch.arange(1, b.shape[1] + 1, device=b.device)
    return torch.where(b > 0, edges, 0).amax(1)


def _candidates(start_bin: int, bins: int, device: torch.device) -> Tensor:
    """The upper edges to try, in bins."""
    if start_bin < 1:
        raise ArgumentError(f"start_bin must be at least 1, got {start_bin!r}", start_bin=start_bin)
    return torch.arange(min(start_bin, bins), bins + 1, device=device)


def _edges(edge: Tensor, bin_width: Tensor | float, counts: Tensor) -> Tensor:
    """Edges in bins as ranges of the shape that the histograms came in."""
    width = torch.as_tensor(bin_width, dtype=torch.float64, device=counts.device)
    return (edge.reshape(counts.shape[:-1]) * width).to(torch.float32)


@lru_cache(maxsize=64)
def _magnitudes(q: QParams) -> tuple[float, ...]:
    """The numbers of a grid that are not negative, ascending.

    They are found by rounding every bfloat16, which has all numbers of up to 8 significant bits.
    """
    every = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).to(torch.float32)
    grid = q.round_(every.clamp_(max=q.max()))
    return tuple(torch.unique(grid[grid >= 0]).tolist())


def _level_starts(candidates: Tensor, q: QParams) -> Tensor:
    """The bin at which each level of a candidate starts, and at last the candidate itself.

    Returns:
        ``(candidates, levels + 1)``, int64, from 0 to the candidate.
    """
    grid = _magnitudes(q)
    levels = len(grid)
    candidate = candidates[:, None].double()
    # Of exact products, one rounded quotient: it is at a bin's edge or centre only where that is exact.
    if grid == tuple(range(levels)):
        # Bin j lies in level floor(j * levels / candidate).
        starts = candidate * torch.arange(levels + 1, dtype=torch.float64, device=candidates.device) / levels
        return starts.ceil_().to(torch.int64)
    values = torch.tensor(grid, dtype=torch.float64, device=candidates.device)
    between = candidate * (values[1:] + values[:-1]) / (2 * values[-1])
    inner = between.sub_(0.5).ceil_()
    return torch.cat([torch.zeros_like(candidate), inner, candidate], dim=1).to(torch.int64)


def _least_divergence(
    b: Tensor, top: Tensor, candidates: Tensor, starts: Tensor, last_level: Tensor, step: int
) -> Tensor:
    """The candidate with the least divergence for each histogram; ``(rows,)``.

    With ``ref`` the counts of P (N in all), ``new`` those of Q (M in all),

        N * KL = sum(ref * log(ref)) - sum(ref * log(new)) + N * log(M / N),

    where ``new`` is constant on the bins of a level that are not empty. So both sums come from prefix
    sums over the bins, taken at the starts of the levels.
    """
    # Whole numbers, exact in float64 up to 2**53.
    below = _sum_below(b).double()  # values
    filled = _sum_below((b > 0).to(torch.int64)).double()  # bins that are not empty
    within = _sum_below(torch.special.xlogy(b, b.double()))

    total = below[:, -1:]
    inside = below[:, candidates]
    above = total - inside
    last = b[:, candidates - 1]
    reference = within[:, candidates - 1] + torch.special.xlogy(last + above, last + above)

    parts = []
    for edges, level in zip(torch.split(starts, step), torch.split(last_level, step), strict=True):
        values = below[:, edges].diff(dim=2)
        # An empty level adds nothing: its 0 values are multiplied by the logarithm of 1.
        logs = (values / filled[:, edges].diff(dim=2).clamp_min_(1.0)).clamp_min_(1.0).log_()
        cross = torch.linalg.vecdot(values, logs)
        parts.append((cross, logs.gather(2, level.expand(len(b), -1, 1)).squeeze(2)))
    cross = torch.cat([part[0] for part in parts], dim=1)
    last_log = torch.cat([part[1] for part in parts], dim=1)

    n = total.clamp_min(1.0)
    kl = (reference - cross - above * last_log) / n + torch.log(inside.clamp_min(1.0) / n)
    # Clipped values in a bin that Q leaves empty: P is not absolutely continuous with regard to Q.
    kl = kl.masked_fill((last == 0) & (above > 0), torch.inf)
    kl = kl.masked_fill((candidates > top[:, None]), torch.inf)
    equal = kl <= kl.amin(1, keepdim=True) + _KL_TIE
    return torch.minimum(torch.where(equal, candidates, 0).amax(1), top)


def _clipping_error(b: Tensor, candidates: Tensor, bounds: Tensor) -> Tensor:
    """``sum(b[j] * (j + 0.5 - bound) ** 2)`` over the bins from the candidate on; ``(rows, candidates)``.

    Sums of powers of the distance in bins ``m = j - candidate`` are nested sums from the end, exact
    in integers, where a difference of prefix sums would cancel.
    """
    count = _sum_from(b)
    first = _sum_from(count[:, 1:])  # sum(b * m)
    second = _sum_from(first[:, 1:])  # sum(b * m * (m - 1) / 2)
    count, first, second = (part[:, candidates].double() for part in (count, first, second))
    # The bound is the candidate plus a rounding error of float32.
    off = bounds - candidates
    return 2 * second + 2 * first + 0.25 * count - 2 * off * (first + 0.5 * count) + off * off * count


def _sum_below(x: Tensor) -> Tensor:
    """Sums from the start to each position along dimension 1, the empty sum first."""
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))


def _sum_from(x: Tensor) -> Tensor:
    """Sums from each position to the end along dimension 1, the empty sum last."""
    return torch.nn.functional.pad(x.flip(1).cumsum(1).flip(1), (0, 1))


def _rounding_error(b: Tensor, candidates: Tensor, scales: Tensor, q: QParams) -> Tensor:
    """``sum(b * (quantized centre - centre) ** 2)`` over the bins below; ``(rows, candidates)``.

    The quantized centres depend on the candidate alone, so all histograms share them.
    """
    bins = b.shape[1]
    weights = b.double()
    centres = torch.arange(bins, dtype=torch.float32, device=b.device) + 0.5
    step = max(1, _CHUNK // bins)
    errors = torch.empty(step * bins, dtype=torch.float32, device=b.device)
    squares = torch.empty(step * bins, dtype=torch.float64, device=b.device)
    parts = []
    chunks = zip(torch.split(candidates[:, None], step), torch.split(scales[:, None], step), strict=True)
    for candidate, scale in chunks:
        width = int(candidate[-1])
        inside = width - len(candidate)  # bins below every candidate of the chunk, or one fewer
        centre = centres[:width]
        error = errors[: len(candidate) * width].view(-1, width)
        square = squares[: error.numel()].view(-1, width)
        # Subtracting is exact, as a number and its rounding are near each other.
        q.round_(torch.div(centre, scale, out=error)).mul_(scale).sub_(centre)
        error[:, inside:].masked_fill_(centre[inside:] > candidate, 0.0)  # clipped
        parts.append(weights[:, :width] @ square.copy_(error).square_().T)
    return torch.cat(parts, dim=1)
