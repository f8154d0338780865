"""Times that can be compared on a noisy machine: interleaved, medians, one thread, one process."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["medians"]


def medians(runs: Mapping[str, Callable[[], Any]], repeats: int = 15, warmup: int = 2) -> dict[str, float]:
    """Median time in ms of each callable.

    Each is called once a round, in an order that is drawn anew, so that noise and what another leaves in
    caches and allocators hit all alike. Results are freed when the clock has stopped.
    """
    for run in runs.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, drawn = list(runs), random.Random(0)
    for _ in range(repeats):
        drawn.shuffle(order)
        for name in order:
            start = time.perf_counter()
            result = runs[name]()
            times[name].append(time.perf_counter() - start)
            del result
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}
