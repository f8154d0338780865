"""Histograms of magnitudes, and the ranges that follow from them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pytorch_quantization._descriptor import Axis, NumBits
from pytorch_quantization.calib.calibrator import _Calibrator
from pytorch_quantization.calib.thresholds import METHODS, amax_of
from pytorch_quantization.utils.quantized_weights import joined, quantized_weights
from pytorch_quantization.utils.reduce_amax import kept_to_reduced

__all__ = ["HistogramCalibrator", "calibrate_weights"]

# A later batch may be a million times larger than the first, to whose range the width of the bins fits.
# From this many times the first number on, neighbouring bins are merged instead of adding more.
_MOST_GROWTH = 64
_MOST_BINS = 1 << 20  # of all weights' histograms at a time


class HistogramCalibrator(_Calibrator):
    """One histogram of ``|x|`` for the whole tensor.

    The first batch fixes the width of the bins; larger values later add bins of that width.

    Args:
        num_bits: As of :class:`_Calibrator`.
        axis: Only None.
        unsigned: As of :class:`_Calibrator`.
        num_bins: Number of bins for the first batch.
        grow_method: Of no effect; the toolkit deprecated it.
        skip_zeros: Whether zeros are not counted.
        torch_hist: Whether ``_calib_hist`` and ``_calib_bin_edges`` are tensors, else numpy arrays. The
            counts are the same.

    Raises:
        NotImplementedError: An axis is given.
    """

    def __init__(
        self,
        num_bits: NumBits = 8,
        axis: Axis = None,
        unsigned: bool = False,
        num_bins: int = 2048,
        grow_method: str | None = None,
        skip_zeros: bool = False,
        torch_hist: bool = True,
    ) -> None:
        super().__init__(num_bits, axis, unsigned)
        if axis is not None:
            raise NotImplementedError(f"a histogram is of the whole tensor; axis={axis} is not possible")
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, got {num_bins}")
        if grow_method is not None:
            warnings.warn(f"grow_method={grow_method!r} has no effect", DeprecationWarning, stacklevel=2)
        self._first_num_bins = num_bins
        self._skip_zeros = skip_zeros
        self._torch_hist = torch_hist
        self.reset()

    def reset(self) -> None:
        """Forgets what was collected."""
        self._num_bins = self._first_num_bins
        self._width = 0.0  # of a bin; 0 as long as there were only zeros
        self._calib_hist: Any = None
        self._calib_bin_edges: Any = None

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Takes in one tensor, of integers too.

        Raises:
            ValueError: It holds NaN or infinity.
        """
        x = x.detach().float().abs().flatten()
        if self._skip_zeros:
            x = x[x != 0]
        if not x.numel():
            return
        largest = x.max().item()
        if not math.isfinite(largest):
            raise ValueError("the tensor to calibrate with holds NaN or infinity")
        counts = self._counts(x.device)
        if not self._width:
            self._width = largest / self._num_bins
        else:
            counts = self._grow(counts, largest)
        edges = torch.arange(self._num_bins + 1, dtype=torch.float64, device=x.device)
        edges = edges.mul_(self._width).float()
        if largest:
            counts = counts + _count(x[None], edges[None], torch.tensor([[self._width]], device=x.device))[0]
        else:
            counts[0] += x.numel()  # they belong to the first bin, however wide it will be
        self._calib_hist = counts if self._torch_hist else counts.cpu().numpy()
        self._calib_bin_edges = edges if self._torch_hist else edges.cpu().numpy()

    def _counts(self, device: torch.device) -> Tensor:
        """The counts so far as a tensor."""
        if self._calib_hist is None:
            return torch.zeros(self._num_bins, dtype=torch.int64, device=device)
        return torch.as_tensor(self._calib_hist, device=device).clone()

    def _grow(self, counts: Tensor, largest: float) -> Tensor:
        """Makes room for ``largest``."""
        while largest > self._width * self._first_num_bins * _MOST_GROWTH:
            if len(counts) % 2:
                counts = nn.functional.pad(counts, (0, 1))
            counts = counts.view(-1, 2).sum(1)
            self._width *= 2
        # An upper end that float32 rounds to the largest value is high enough.
        needed = max(1, math.ceil(np.nextafter(np.float32(largest), np.float32(0)) / self._width))
        self._num_bins = max(len(counts), needed)
        return nn.functional.pad(counts, (0, self._num_bins - len(counts)))

    def compute_amax(
        self, method: str, *, stride: int = 1, start_bin: int = 128, percentile: float = 99.99
    ) -> Tensor | None:
        """The range that a method chooses.

        Args:
            method: ``"entropy"``, ``"mse"`` or ``"percentile"``.
            stride: Distance of the candidates in bins, of entropy and mse.
            start_bin: The first candidate, of entropy and mse.
            percentile: The percentage of values within the range, of percentile.

        Returns:
            A 0-dim tensor, or None if nothing was collected.

        Raises:
            TypeError: There is no such method.
            ValueError: The percentile is not from 0 to 100.
        """
        _check(method, METHODS, percentile)
        if self._calib_hist is None:
            return None
        counts = torch.as_tensor(self._calib_hist).cpu().numpy()
        edges = torch.as_tensor(self._calib_bin_edges).double().cpu().numpy()
        amax = amax_of(
            counts,
            edges,
            method,
            self._num_bits,
            self._unsigned,
            stride=stride,
            start_bin=start_bin,
            percentile=percentile,
        )
        device = self._calib_hist.device if isinstance(self._calib_hist, Tensor) else None
        return torch.tensor(amax, dtype=torch.float32, device=device)


def _check(method: str, methods: tuple[str, ...], percentile: float) -> None:
    if method not in methods:
        raise TypeError(f"unknown calibration method {method!r}: expected one of {', '.join(methods)}")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in the range from 0 to 100, got {percentile!r}")


def _count(x: Tensor, edges: Tensor, width: Tensor) -> Tensor:
    """How many values of each row of ``x`` lie in each ``[edges[i], edges[i + 1])`` of its row of edges.

    The last bin has its upper edge too.
    """
    rows, bins = len(edges), edges.shape[1] - 1
    index = (x.double() / width).long().clamp_(max=bins - 1)
    # The edges are rounded: next to one the quotient may be off by a bin.
    index -= (x < edges.gather(1, index)).long()
    index += (x >= edges.gather(1, index + 1)).long()
    index.clamp_(0, bins - 1).add_(torch.arange(rows, device=x.device)[:, None] * bins)
    return torch.bincount(index.flatten(), minlength=rows * bins).view(rows, bins)


@torch.no_grad()
def calibrate_weights(
    model: nn.Module,
    method: str = "percentile",
    perchannel: bool = True,
    percentile: float = 99.99,
    num_bins: int = 2048,
) -> None:
    """Sets the range of every weight quantizer, from the weights.

    Args:
        model: A model with quantized layers.
        method: ``"max"``, ``"percentile"``, ``"mse"`` or ``"entropy"``.
        perchannel: Whether each index along the axes that a quantizer keeps gets a range of its own, else
            one number is the range of the whole weight.
        percentile: For ``"percentile"``.
        num_bins: Number of bins of the histograms.

    Raises:
        TypeError: There is no such method.
    """
    _check(method, ("max", *METHODS), percentile)
    for quantizer, parts in quantized_weights(model):
        weight = joined(parts)
        reduced = kept_to_reduced(quantizer.axis, weight.dim())
        kept = (
            [] if reduced is None or not perchannel else [d for d in range(weight.dim()) if d not in reduced]
        )
        shape = (
            torch.Size(n if d in kept else 1 for d, n in enumerate(weight.shape)) if kept else torch.Size()
        )
        rows = weight.reshape(1, -1)
        if kept:
            rows = weight.permute(*kept, *(reduced or ())).reshape(shape.numel(), -1)
        amax = rows.float().abs().amax(1)
        if method != "max":
            settings = method, quantizer.num_bits, quantizer.unsigned
            for some in torch.split(torch.arange(len(rows)), max(1, _MOST_BINS // num_bins)):
                amax[some] = _ranges(rows[some].float().abs(), amax[some], num_bins, settings, percentile)
        quantizer._hold_amax(amax.view(shape))


def _ranges(
    rows: Tensor, amax: Tensor, num_bins: int, settings: tuple[str, NumBits, bool], percentile: float
) -> Tensor:
    """The range that a method chooses for each row of magnitudes; ``amax`` has the largest of each."""
    empty = amax == 0
    width = (amax.double() / num_bins).masked_fill(empty, 1.0)[:, None]
    edges = torch.arange(num_bins + 1, dtype=torch.float64, device=rows.device) * width
    counts = _count(rows, edges.float(), width).cpu().numpy()
    chosen = [
        amax_of(row, ends, *settings, percentile=percentile)
        for row, ends in zip(counts, edges.float().double().cpu().numpy(), strict=True)
    ]
    return torch.tensor(chosen, dtype=torch.float32, device=rows.device).masked_fill(empty, 0.0)
