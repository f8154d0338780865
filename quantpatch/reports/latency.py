"""How long something quantized takes, beside the same in float."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs

# A call itself takes some 10 us; below that many ms, and so near, it is not known which is faster.
_MEASURABLE, _NOISE = 0.05, 1.1


@attrs.frozen
class BesideFloat:
    """Two latencies, of which one is to be the smaller.

    Attributes:
        ms: Of what is quantized, a median.
        float_ms: Of the same in float.
    """

    ms: float
    float_ms: float

    @property
    def ratio(self) -> float:
        """Latency to that in float; below 1 is faster."""
        return self.ms / self.float_ms

    @property
    def is_slower(self) -> bool:
        """Whether it is slower than float, by more than what a few runs leave open."""
        return max(self.ms, self.float_ms) >= _MEASURABLE and self.ratio > _NOISE


def medians(
    calls: Sequence[Callable[[], Any]], *, seconds: float = 0.5, least: int = 5, most: int = 50
) -> list[float]:
    """Medians of the times that functions take, in ms, run in turn: a busy machine slows all of them.

    Args:
        calls: The functions; each is called once before.
        seconds: After how many, for each function, no other round begins.
        least: How many rounds there are at least.
        most: The same at most.
    """
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for call in calls:
        call()
    for done in range(most):
        if done >= least and time.perf_counter() - start > seconds * len(calls):
            break
        for call, taken in zip(calls, times, strict=True):
            before = time.perf_counter()
            call()
            taken.append(time.perf_counter() - before)
    return [1e3 * statistics.median(taken) for taken in times]
