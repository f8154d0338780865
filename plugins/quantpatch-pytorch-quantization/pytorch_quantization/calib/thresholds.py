"""Ranges from a histogram of magnitudes, as functions of numpy arrays.

``counts[i]`` is the number of values between ``edges[i]`` and ``edges[i + 1]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pytorch_quantization._descriptor import NumBits
from pytorch_quantization.tensor_quant import bound_of, fake_tensor_quant, scaled_e4m3

__all__ = ["METHODS", "amax_of"]

METHODS = ("entropy", "mse", "percentile")

Array = np.ndarray[Any, Any]

_TIE = 1e-12  # divergences that differ by less than rounding does are equal
_CHUNK = 1 << 20  # elements of intermediate results


def amax_of(
    counts: Array,
    edges: Array,
    method: str,
    num_bits: NumBits,
    unsigned: bool,
    *,
    stride: int = 1,
    start_bin: int = 128,
    percentile: float = 99.99,
) -> float:
    """The range that one of ``METHODS`` chooses."""
    if method == "percentile":
        return _percentile_amax(counts, edges, percentile)
    search = _entropy_amax if method == "entropy" else _mse_amax
    return search(counts, edges, num_bits, unsigned, stride=stride, start_bin=start_bin)


def _percentile_amax(counts: Array, edges: Array, percentile: float) -> float:
    """Upper edge of the first bin up to which there is the given percentage of all values."""
    below = np.cumsum(counts)
    reached = np.searchsorted(below, percentile / 100 * below[-1])
    return float(edges[min(int(reached), len(counts) - 1) + 1])


def _mse_amax(
    counts: Array, edges: Array, num_bits: NumBits, unsigned: bool, *, stride: int, start_bin: int
) -> float:
    """The centre of a bin for which quantizing the centres of all bins has the least squared error."""
    centres = torch.from_numpy((edges[1:] + edges[:-1]) / 2)
    weights = torch.from_numpy(np.asarray(counts, dtype=np.float64))
    candidates = centres[min(start_bin, len(centres) - 1) :: stride]
    errors = []
    for amax in torch.split(candidates[:, None], max(1, _CHUNK // len(centres))):
        x = centres.expand(len(amax), -1)
        if isinstance(num_bits, tuple):
            rounded = scaled_e4m3(x, amax)
        else:
            rounded = fake_tensor_quant(x, amax, num_bits, unsigned)
        errors.append((rounded - x).square() @ weights)
    return float(candidates[torch.cat(errors).argmin()])


def _entropy_amax(
    counts: Array, edges: Array, num_bits: NumBits, unsigned: bool, *, stride: int, start_bin: int
) -> float:
    """The bin's upper edge for which the quantized distribution is nearest in Kullback-Leibler divergence.

    For a candidate of ``n`` bins the reference P is those bins, the last one with all that lies above it.
    Q is the same bins (without what lies above) merged into as many equal levels as the format has
    magnitudes, each level spread evenly over those of its bins that are not empty. The last of equally
    good candidates is taken. As in TensorRT, the first bin counts as many as the second: zeros, of which
    there are many after a ReLU, fit every range.
    """
    levels = int(bound_of(num_bits, unsigned)) + 1 if isinstance(num_bits, int) else 128
    counts = np.asarray(counts, dtype=np.float64).copy()
    if len(counts) > 1:
        counts[0] = counts[1]
    total = counts.sum()
    values_below = np.concatenate([[0.0], np.cumsum(counts)])
    filled_below = np.concatenate([[0], np.cumsum(counts > 0)])
    start = min(start_bin, len(counts))
    best, best_divergence = len(counts), np.inf
    for n in range(start, len(counts) + 1, stride):
        # Bin j is in level floor(j * levels / n): the first bin of level k is ceil(k * n / levels).
        starts = -(-np.arange(levels + 1) * n // levels)
        merged = np.diff(values_below[starts])
        spread = merged / np.maximum(np.diff(filled_below[starts]), 1)
        q = np.repeat(spread, np.diff(starts)) * (counts[:n] > 0)
        p = counts[:n].copy()
        p[-1] += total - values_below[n]
        divergence = _divergence(p, q)
        if divergence <= best_divergence + _TIE:
            best, best_divergence = n, min(divergence, best_divergence)
    return float(edges[best])


def _divergence(p: Array, q: Array) -> float:
    """``sum(P * log(P / Q))`` of two lists of counts; infinite where Q leaves out what P has."""
    some = p > 0
    if not some.any() or (q[some] <= 0).any():
        return np.inf
    return float(np.sum(p[some] * np.log(p[some] / q[some])) / p.sum() + np.log(q.sum() / p.sum()))
