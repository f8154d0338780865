"""Ranges from histograms of magnitudes, per tensor or per channel.

A histogram must cost the same whatever comes: any first batch, a later one that is ten thousand times
larger, the same data in other batches or on other processes. So a bin's width is always a power of
two, the smallest at which the bins reach the largest magnitude seen. Widening then merges neighbours,
and every count is exactly what binning all data at once with the final width would have given.
"""

from __future__ import annotations

import abc
import math

import torch
import torch.distributed as dist
from torch import Tensor

from quantpatch.calibrators.base import AllReduce, Calibrator
from quantpatch.calibrators.thresholds import (
    entropy_threshold,
    mse_threshold,
    percentile_threshold,
    sqnr_threshold,
)
from quantpatch.errors import OptionError
from quantpatch.formats import NumberFormat
from quantpatch.kernels import operations as kernels

__all__ = [
    "EntropyCalibrator",
    "HistogramCalibrator",
    "MSECalibrator",
    "PercentileCalibrator",
    "SQNRCalibrator",
]

_CHUNK = 1 << 19  # elements binned at a time on a CPU: the scratch buffers stay in its cache
_MIN_EXPONENT = -126  # of the bin width: the smallest normal float32


class HistogramCalibrator(Calibrator):
    """Histograms of ``|x|``; a subclass says how a histogram gives a range.

    Bin ``j`` counts the values with ``j * width < |x| <= (j + 1) * width``; zeros are in bin 0. The
    width is the smallest power of two at which ``num_bins`` bins reach the largest magnitude seen, so
    between ``num_bins / 2`` and ``num_bins`` bins are in use. Counts are 64-bit and exact, and depend
    on the data alone: not on how it was cut into batches, their order, or the process that saw them.
    (Below ``num_bins * 2**-126`` the width stays at ``2**-126``.) Memory is ``num_bins`` counts for
    each range, however much is collected.

    The range never exceeds the largest magnitude seen, where the last bin in use ends beyond it.

    Args:
        format: The number format that the range is for.
        axis: The axes kept, each position with a histogram and a bin width of its own; None for one.
        num_bins: Number of bins, from 8 to 2**24.

    Raises:
        OptionError: ``num_bins`` is out of range.
    """

    def __init__(
        self, format: NumberFormat, axis: int | tuple[int, ...] | None = None, *, num_bins: int = 2048
    ) -> None:
        # Fewer bins of the largest floats would be so wide that the reciprocal of the width is subnormal.
        if not 8 <= num_bins <= 1 << 24:
            raise OptionError(f"num_bins must be from 8 to 2**24, got {num_bins!r}")
        super().__init__(format, axis)
        self.num_bins = num_bins

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
        return counts, _power_of_two(self._exponent).reshape(shape)

    def _start(self, shape: torch.Size, device: torch.device) -> None:
        channels = shape.numel()
        self._amax = torch.zeros(channels, dtype=torch.float32, device=device)
        # Of a channel that was all zero so far the width is the smallest: any other is reached by widening.
        self._exponent = torch.full((channels,), _MIN_EXPONENT, dtype=torch.int64, device=device)
        self._counts = torch.zeros(channels, self.num_bins, dtype=torch.int64, device=device)

    def _update(self, x: Tensor, amax: Tensor) -> None:
        self._widen(amax.reshape(-1))
        _count(_channels_first(x, amax.shape), self._exponent, self._counts)

    def _range(self) -> Tensor:
        return torch.minimum(self._threshold(self._counts, _power_of_two(self._exponent)), self._amax)

    def _reduce(self, all_reduce: AllReduce) -> None:
        self._widen(all_reduce(self._amax, dist.ReduceOp.MAX))
        self._counts = all_reduce(self._counts, dist.ReduceOp.SUM)

    def _widen(self, amax: Tensor) -> None:
        """Merges neighbouring bins until they reach ``amax``, channel by channel."""
        self._amax = torch.maximum(self._amax, amax)
        exponent = _width_exponent(self._amax, self.num_bins)
        merged = exponent - self._exponent
        if bool(merged.any()):
            bins = torch.arange(self.num_bins, device=merged.device) >> merged[:, None]
            self._counts = torch.zeros_like(self._counts).scatter_add_(1, bins, self._counts)
            self._exponent = exponent


class EntropyCalibrator(HistogramCalibrator):
    """The range whose quantized distribution is nearest in Kullback-Leibler divergence (TensorRT).

    See :func:`quantpatch.calibrators.thresholds.entropy_threshold`.

    Args:
        format: The number format that the range is for.
        axis: The axes kept; None for one range.
        num_bins: Number of bins.
        start_bin: The smallest candidate, in bins.

    Raises:
        OptionError: An option is out of range.
    """

    def __init__(
        self,
        format: NumberFormat,
        axis: int | tuple[int, ...] | None = None,
        *,
        num_bins: int = 2048,
        start_bin: int = 128,
    ) -> None:
        super().__init__(format, axis, num_bins=num_bins)
        self.start_bin = _checked_start_bin(start_bin)

    def _threshold(self, counts: Tensor, bin_width: Tensor) -> Tensor:
        return entropy_threshold(counts, bin_width, self.format, start_bin=self.start_bin)


class MSECalibrator(HistogramCalibrator):
    """The range with the least mean squared error.

    See :func:`quantpatch.calibrators.thresholds.mse_threshold`.

    Args:
        format: The number format that the range is for.
        axis: The axes kept; None for one range.
        num_bins: Number of bins.
        start_bin: The smallest candidate, in bins.

    Raises:
        OptionError: An option is out of range.
    """

    def __init__(
        self,
        format: NumberFormat,
        axis: int | tuple[int, ...] | None = None,
        *,
        num_bins: int = 2048,
        start_bin: int = 1,
    ) -> None:
        super().__init__(format, axis, num_bins=num_bins)
        self.start_bin = _checked_start_bin(start_bin)

    def _threshold(self, counts: Tensor, bin_width: Tensor) -> Tensor:
        return mse_threshold(counts, bin_width, self.format, start_bin=self.start_bin)


class SQNRCalibrator(HistogramCalibrator):
    """The range with the best ratio of signal to quantization noise, clipping counted more.

    See :func:`quantpatch.calibrators.thresholds.sqnr_threshold`.

    Args:
        format: The number format that the range is for.
        axis: The axes kept; None for one range.
        num_bins: Number of bins.
        start_bin: The smallest candidate, in bins.
        clip_weight: How much the noise of clipped values counts; 1 gives the range of ``mse``.

    Raises:
        OptionError: An option is out of range.
    """

    def __init__(
        self,
        format: NumberFormat,
        axis: int | tuple[int, ...] | None = None,
        *,
        num_bins: int = 2048,
        start_bin: int = 1,
        clip_weight: float = 3.0,
    ) -> None:
        super().__init__(format, axis, num_bins=num_bins)
        self.start_bin = _checked_start_bin(start_bin)
        if not 0.0 <= clip_weight < math.inf:
            raise OptionError(f"clip_weight must be finite and not negative, got {clip_weight!r}")
        self.clip_weight = clip_weight

    def _threshold(self, counts: Tensor, bin_width: Tensor) -> Tensor:
        return sqnr_threshold(
            counts, bin_width, self.format, start_bin=self.start_bin, clip_weight=self.clip_weight
        )


class PercentileCalibrator(HistogramCalibrator):
    """The smallest range that holds a given percentage of the magnitudes.

    See :func:`quantpatch.calibrators.thresholds.percentile_threshold`.

    Args:
        format: The number format that the range is for.
        axis: The axes kept; None for one range.
        num_bins: Number of bins.
        percentile: The percentage, above 1 and up to 100, which is the largest magnitude.

    Raises:
        OptionError: An option is out of range.
    """

    def __init__(
        self,
        format: NumberFormat,
        axis: int | tuple[int, ...] | None = None,
        *,
        num_bins: int = 2048,
        percentile: float = 99.99,
    ) -> None:
        if not 1.0 < percentile <= 100.0:  # a share of 1 would leave next to nothing of a range
            raise OptionError(
                f"percentile is a percentage, such as 99.9, above 1 and up to 100; got {percentile!r}"
            )
        super().__init__(format, axis, num_bins=num_bins)
        self.percentile = percentile

    def _threshold(self, counts: Tensor, bin_width: Tensor) -> Tensor:
        return percentile_threshold(counts, bin_width, percentile=self.percentile)


def _checked_start_bin(start_bin: int) -> int:
    """Complains before the data is collected, not after."""
    if start_bin < 1:
        raise OptionError(f"start_bin must be at least 1, got {start_bin!r}")
    return start_bin


def _width_exponent(amax: Tensor, num_bins: int) -> Tensor:
    """The smallest ``k`` with ``num_bins * 2**k >= amax``; int64."""
    mantissa, exponent = torch.frexp(amax.double() / num_bins)  # mantissa in [0.5, 1), or 0
    exponent = exponent.to(torch.int64) - (mantissa == 0.5).to(torch.int64)
    return torch.where(amax > 0, exponent, _MIN_EXPONENT).clamp_min_(_MIN_EXPONENT)


def _power_of_two(exponent: Tensor) -> Tensor:
    """``2**exponent`` in float32, from its bits: exact, as no ``pow`` promises to be."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def _channels_first(x: Tensor, shape: torch.Size) -> Tensor:
    """``x`` as ``(channels, values of a channel)``, copied only where its memory asks for it."""
    if shape.numel() == 1:
        # Order does not matter to a histogram: take the values as they lie, channels_last too.
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        return x.permute(order).reshape(1, -1)
    kept = [axis for axis, size in enumerate(shape) if size != 1]
    others = [axis for axis in range(x.dim()) if axis not in kept]
    return x.permute(kept + others).reshape(shape.numel(), -1)


def _count(x: Tensor, exponent: Tensor, counts: Tensor) -> None:
    """Adds to ``counts (channels, bins)`` those of the finite ``x (channels, values)``.

    The index of a bin is ``ceil(|x| / width) - 1``, and 0 for 0. As ``width`` is a power of two, the
    quotient is exact; multiplying by the float just below ``1 / width`` instead rounds to the float
    just below the quotient, whose integer part is that index. So no pass over the data goes into
    ``ceil``, and ``|.|`` is left to the integers, which are half as wide.

    A CPU waits for a count to be written before it raises it again, and after a ReLU half of the values are
    in one bin. So of two neighbours one is counted in a second histogram: as one integer of twice the width
    the indices of both take the second's offset in one operation.
    """
    channels, bins = counts.shape
    below = (((127 - exponent) << 23) - 1).to(torch.int32).view(torch.float32)[:, None]
    if kernels.count(x, below.view(-1), counts):
        return
    chunk = _CHUNK if x.device.type == "cpu" else 1 << 26
    length = min(chunk, x.shape[1])
    rows = max(1, min(chunk // length, (1 << 20) // bins, channels))
    size = rows * bins
    dtype = torch.int16 if size <= 1 << 15 else torch.int32 if size < 1 << 31 else torch.int64
    halves = 2 if size <= 1 << 14 and x.device.type == "cpu" else 1
    scratch = torch.empty(rows, length, dtype=torch.float32, device=x.device)
    indices = torch.empty(rows, length, dtype=dtype, device=x.device)
    first = torch.arange(0, size, bins, dtype=dtype, device=x.device)[:, None]  # index of each row
    for row in range(0, channels, rows):
        some = slice(row, row + rows)
        factor, target = below[some], counts[some]
        for part in torch.split(x[some], length, dim=1):
            n, m = part.shape
            # Rows of a narrower part are packed, so that bincount can take them as one.
            scaled = scratch.view(-1)[: n * m].view(n, m)
            index = indices.view(-1)[: n * m].view(n, m)
            if part.dtype == torch.float32:
                torch.mul(part, factor, out=scaled)
            else:
                scaled.copy_(part).mul_(factor)
            index.copy_(scaled).abs_()
            if n > 1:
                index.add_(first[:n])
            flat = index.view(-1)
            if halves > 1:
                flat[: flat.numel() & ~1].view(torch.int32).add_(n * bins << 16)
            for half in torch.bincount(flat, minlength=halves * n * bins).view(halves, n, bins):
                target.add_(half)
