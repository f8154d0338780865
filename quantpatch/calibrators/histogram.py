"""Ranges from histograms of magnitudes, per tensor or per channel.

A histogram must cost the same whatever comes: any first batch, a later one that is ten thousand times
larger, the same data in other batches or on other processes. So a bin's width is always a power of
two, the smallest at which the bins reach the largest magnitude seen. Widening then merges neighbours,
and every count is exactly what binning all data at once with the final width would have given.

One outlier may be so large that all else is in the first bins. For methods that clip it a second histogram is
kept from then on, which ends where the other values do.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from quantpatch.calibrators.base import AllReduce, Calibrator
from quantpatch.calibrators.bins import (
    MIN_EXPONENT,
    channels_first,
    count,
    merge,
    power_of_two,
    width_exponent,
)
from quantpatch.calibrators.thresholds import (
    entropy_threshold,
    mse_threshold,
    percentile_threshold,
    sqnr_threshold,
)
from quantpatch.errors import ArgumentError
from quantpatch.numerics.formats import NumberFormat

_BINS, _FEWEST_BINS = 2048, 256
_ALL_BINS = 1 << 22  # of all channels


class _Fine(NamedTuple):
    """A histogram whose last bin also holds what is beyond it.

    Attributes:
        counts: ``(channels, bins)``, int64.
        exponent: The widths of bins, as powers of two; ``(channels,)``, int64.
    """

    counts: Tensor
    exponent: Tensor


class HistogramCalibrator(Calibrator):
    """Histograms of ``|x|``; a subclass says how a histogram gives a range.

    Bin ``j`` counts the values with ``j * width < |x| <= (j + 1) * width``; zeros are in bin 0. The
    width is the smallest power of two at which ``num_bins`` bins reach the largest magnitude seen, so
    between ``num_bins / 2`` and ``num_bins`` bins are in use. Counts are 64-bit and exact, and depend
    on the data alone: not on how it was cut into batches, their order, or the process that saw them.
    (Below ``num_bins * 2**-126`` the width stays at ``2**-126``.) Memory is ``num_bins`` counts for
    each range, however much is collected.

    The range never exceeds the largest magnitude seen, where the last bin in use ends beyond it.

    A subclass whose ranges leave out the largest values sets ``_kept_share``. Where that share of the values
    is in the first sixteenth of the bins, a second histogram resolves them; its last bin has what is beyond.

    Args:
        format: The number format that the range is for.
        axis: The axes kept, each position with a histogram and a bin width of its own; None for one.
        num_bins: Number of bins, from 8 to 2**24; default 2048, and of more than 2048 channels fewer, so that
            these have four million bins together, but at least 256 each.

    Raises:
        ArgumentError: ``num_bins`` is out of range.
    """

    #: Which share of the values a range holds at least; None: outliers are never left out.
    _kept_share: float | None = None
    _fine: _Fine | None = None

    def __init__(
        self, format: NumberFormat, axis: int | tuple[int, ...] | None = None, *, num_bins: int | None = None
    ) -> None:
        # Fewer bins of the largest floats would be so wide that the reciprocal of the width is subnormal.
        if num_bins is not None and not 8 <= num_bins <= 1 << 24:
            raise ArgumentError(f"num_bins must be from 8 to 2**24, got {num_bins!r}", num_bins=num_bins)
        super().__init__(format, axis)
        self.num_bins = _BINS if num_bins is None else num_bins
        self._chooses_bins = num_bins is None

    @abc.abstractmethod
    def _threshold(self, counts: Tensor, bin_width: Tensor) -> Tensor:
        """The range that a histogram gives.

        Args:
            counts: ``(channels, num_bins)``, int64; one channel per tensor.
            bin_width: ``(channels,)``, float32.

        Returns:
            ``(channels,)``, float32; may exceed the largest magnitude seen, to which it is cut.
        """

    def histogram(self) -> tuple[Tensor, Tensor]:
        """What was collected, as copies.

        Returns:
            The counts, int64, of the shape of the range followed by ``num_bins``; and the widths of
            the bins, float32, of the shape of the range.

        Raises:
            CalibrationError: No data was seen.
        """
        shape = self._range_shape()
        counts = self._counts.clone().reshape(*shape, self.num_bins)
        return counts, power_of_two(self._exponent).reshape(shape)

    def _start(self, shape: torch.Size, device: torch.device) -> None:
        channels = shape.numel()
        if self._chooses_bins:
            fewer = _ALL_BINS // max(1, channels)
            self.num_bins = min(_BINS, max(_FEWEST_BINS, 1 << fewer.bit_length() - 1 if fewer else 0))
        self._amax = torch.zeros(channels, dtype=torch.float32, device=device)
        # Of a channel that was all zero so far the width is the smallest: any other is reached by widening.
        self._exponent = torch.full((channels,), MIN_EXPONENT, dtype=torch.int64, device=device)
        self._counts = torch.zeros(channels, self.num_bins, dtype=torch.int64, device=device)
        self._fine = None

    def _update(self, x: Tensor, amax: Tensor) -> None:
        before = _Fine(self._counts, self._exponent)  # of the batches before
        self._widen(amax.reshape(-1))
        is_wider = self._counts is not before.counts
        values = channels_first(x, amax.shape)
        count(values, self._exponent, self._counts)
        if not bool(self._is_coarse().any()):
            self._fine = None
            return
        if self._fine is None:
            self._fine = before if is_wider else self._finer(values)
        count(values, self._fine.exponent, self._fine.counts, clamp=True)
        # Batches before it, if it is new: where their values are is not known.
        self._fine.counts[:, -1] += self._counts.sum(1) - self._fine.counts.sum(1)

    def _is_coarse(self) -> Tensor:
        """Of which channels too few bins hold what the range is to hold; ``(channels,)``."""
        if self._kept_share is None or self._kept_share >= 1.0:
            return torch.zeros(1, dtype=torch.bool)
        first = self._counts[:, : max(1, self.num_bins // 16)].sum(1)
        enough = first >= self._kept_share * self._counts.sum(1)
        return enough & (self._exponent > MIN_EXPONENT)

    def _finer(self, values: Tensor) -> _Fine:
        """An empty histogram that ends at twice what the range is to hold of these values."""
        assert self._kept_share is not None
        rank = max(1, math.ceil(self._kept_share * values.shape[1]))
        end = values.abs().float().kthvalue(rank, dim=1).values.to(self._exponent.device)
        exponent = torch.minimum(width_exponent(2 * end, self.num_bins), self._exponent)
        exponent = torch.where(end > 0, exponent, self._exponent)  # of nearly nothing but zeros
        return _Fine(torch.zeros_like(self._counts), exponent)

    def _range(self) -> Tensor:
        found = self._threshold(self._counts, power_of_two(self._exponent))
        if self._fine is not None and self._kept_share is not None:
            counts, exponent = self._fine.counts, self._fine.exponent
            fits = counts[:, :-1].sum(1) >= self._kept_share * counts.sum(1)
            fine = self._threshold(counts, power_of_two(exponent))
            found = torch.where(self._is_coarse() & fits, fine, found)
        return torch.minimum(found, self._amax)

    def _reduce(self, all_reduce: AllReduce) -> None:
        if self._kept_share is not None:  # else no rank has a second one
            self._reduce_fine(all_reduce)
        self._widen(all_reduce(self._amax, dist.ReduceOp.MAX))
        self._counts = all_reduce(self._counts, dist.ReduceOp.SUM)

    def _reduce_fine(self, all_reduce: AllReduce) -> None:
        has_one = torch.tensor(int(self._fine is not None), device=self._counts.device)
        if not bool(all_reduce(has_one, dist.ReduceOp.MAX)):
            return
        own = self._fine or _Fine(self._counts.clone(), self._exponent)
        common = all_reduce(own.exponent, dist.ReduceOp.MAX)
        counts = merge(own.counts, common - own.exponent)
        # What was beyond the last bin stays in the last one.
        moved = own.counts[:, -1:].clone()
        counts.scatter_add_(1, (self.num_bins - 1 >> (common - own.exponent))[:, None], -moved)
        counts[:, -1:] += moved
        self._fine = _Fine(all_reduce(counts, dist.ReduceOp.SUM), common)

    def _widen(self, amax: Tensor) -> None:
        """Merges neighbouring bins until they reach ``amax``, channel by channel, which makes new counts."""
        self._amax = torch.maximum(self._amax, amax)
        exponent = width_exponent(self._amax, self.num_bins)
        merged = exponent - self._exponent
        if not bool(merged.any()):
            return
        self._exponent = exponent
        if bool(self._counts.any()):  # else there is nothing to merge
            self._counts = merge(self._counts, merged)


class _SearchingCalibrator(HistogramCalibrator):
    """A calibrator that tries every range from ``start_bin`` bins on."""

    #: A function of ``thresholds.py``.
    _search: Callable[..., Tensor]

    def __init__(
        self,
        format: NumberFormat,
        axis: int | tuple[int, ...] | None = None,
        *,
        num_bins: int | None = None,
        start_bin: int = 1,
    ) -> None:
        super().__init__(format, axis, num_bins=num_bins)
        if start_bin < 1:  # before the data is collected, not after
            raise ArgumentError(f"start_bin must be at least 1, got {start_bin!r}", start_bin=start_bin)
        self.start_bin = start_bin

    def _threshold(self, counts: Tensor, bin_width: Tensor) -> Tensor:
        return self._search(
            counts, bin_width, self.format, zero_point=self.zero_point, start_bin=self.start_bin
        )


class EntropyCalibrator(_SearchingCalibrator):
    """The range whose quantized distribution is nearest in Kullback-Leibler divergence (TensorRT).

    See :func:`quantpatch.calibrators.thresholds.entropy_threshold`.

    Args:
        format: The number format that the range is for.
        axis: The axes kept; None for one range.
        num_bins: Number of bins.
        start_bin: The smallest candidate, in bins.

    Raises:
        ArgumentError: An option is out of range.
    """

    _kept_share = 0.9999

    def __init__(
        self,
        format: NumberFormat,
        axis: int | tuple[int, ...] | None = None,
        *,
        num_bins: int = 2048,
        start_bin: int = 128,
    ) -> None:
        super().__init__(format, axis, num_bins=num_bins, start_bin=start_bin)

    _search = staticmethod(entropy_threshold)


class MSECalibrator(_SearchingCalibrator):
    """The range with the least mean squared error.

    See :func:`quantpatch.calibrators.thresholds.mse_threshold`.

    Args:
        format: The number format that the range is for.
        axis: The axes kept; None for one range.
        num_bins: Number of bins, see ``HistogramCalibrator``.
        start_bin: The smallest candidate, in bins.

    Raises:
        ArgumentError: An option is out of range.
    """

    _search = staticmethod(mse_threshold)


class SQNRCalibrator(_SearchingCalibrator):
    """The range with the best ratio of signal to quantization noise, clipping counted more.

    See :func:`quantpatch.calibrators.thresholds.sqnr_threshold`.

    Args:
        format: The number format that the range is for.
        axis: The axes kept; None for one range.
        num_bins: Number of bins, see ``HistogramCalibrator``.
        start_bin: The smallest candidate, in bins.
        clip_weight: How much the noise of clipped values counts; 1 gives the range of ``mse``.

    Raises:
        ArgumentError: An option is out of range.
    """

    def __init__(
        self,
        format: NumberFormat,
        axis: int | tuple[int, ...] | None = None,
        *,
        num_bins: int | None = None,
        start_bin: int = 1,
        clip_weight: float = 3.0,
    ) -> None:
        super().__init__(format, axis, num_bins=num_bins, start_bin=start_bin)
        if not 0.0 <= clip_weight < math.inf:
            raise ArgumentError(
                f"clip_weight must be finite and not negative, got {clip_weight!r}", clip_weight=clip_weight
            )
        self.clip_weight = clip_weight
        self._search = functools.partial(sqnr_threshold, clip_weight=clip_weight)


class PercentileCalibrator(HistogramCalibrator):
    """The smallest range that holds a given percentage of the magnitudes.

    See :func:`quantpatch.calibrators.thresholds.percentile_threshold`.

    Args:
        format: The number format that the range is for.
        axis: The axes kept; None for one range.
        num_bins: Number of bins, see ``HistogramCalibrator``.
        percentile: The percentage, above 1 and up to 100, which is the largest magnitude.

    Raises:
        ArgumentError: An option is out of range.
    """

    def __init__(
        self,
        format: NumberFormat,
        axis: int | tuple[int, ...] | None = None,
        *,
        num_bins: int | None = None,
        percentile: float = 99.99,
    ) -> None:
        if not 1.0 < percentile <= 100.0:  # a share of 1 would leave next to nothing of a range
            raise ArgumentError(
                f"percentile is a percentage, such as 99.9, above 1 and up to 100; got {percentile!r}",
                percentile=percentile,
            )
        super().__init__(format, axis, num_bins=num_bins)
        self.percentile = percentile
        self._kept_share = percentile / 100.0

    def _threshold(self, counts: Tensor, bin_width: Tensor) -> Tensor:
        return percentile_threshold(counts, bin_width, percentile=self.percentile)
