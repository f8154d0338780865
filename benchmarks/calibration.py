"""How long calibration takes: collecting histograms, and computing thresholds from them.

Run ``python -m benchmarks.calibration``. One thread; the functions that are compared take turns in one
process, and the medians of their times are shown, because times differ more between runs than within one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.ao.quantization import HistogramObserver

from benchmarks.timing import medians
from quantpatch.calibrators import (
    EntropyCalibrator,
    entropy_threshold,
    mse_threshold,
    percentile_threshold,
    sqnr_threshold,
)
from quantpatch.numerics.formats import Integer

INT8 = Integer(8)
SHAPE = (32, 64, 56, 56)
BATCHES = 20
BINS = 2048


def modelopt_histogram() -> Any | None:
    """The class of modelopt's calibrator, where modelopt is installed."""
    try:
        from modelopt.torch.quantization.calib import HistogramCalibrator
    except ImportError:
        return None
    return HistogramCalibrator


def collecting(name: str, batches: list[torch.Tensor]) -> dict[str, Any]:
    """Histograms of 20 batches, to a pass of ``aminmax`` over each."""

    def ours() -> None:
        calibrator = EntropyCalibrator(INT8, num_bins=BINS)
        for x in batches:
            calibrator.collect(x)

    def baseline() -> None:
        for x in batches:
            torch.aminmax(x)

    def torch_ao() -> None:
        observer = HistogramObserver(bins=BINS)
        for x in batches:
            observer(x)

    functions = {"ours": ours, "baseline": baseline, "torch.ao": torch_ao}
    modelopt = modelopt_histogram()
    if modelopt is not None:

        def collect_modelopt() -> None:
            calibrator = modelopt(num_bits=8, axis=None, unsigned=False, num_bins=BINS)
            for x in batches:
                calibrator.collect(x)

        functions["modelopt"] = collect_modelopt
    ms = medians(functions, repeats=7, warmup=1)
    ours_ms, baseline_ms = ms.pop("ours"), ms.pop("baseline")
    return {
        "name": f"histograms of {len(batches)} batches {SHAPE}, {name}, to aminmax",
        "ours_ms": ours_ms,
        "baseline_ms": baseline_ms,
        "ratio": ours_ms / baseline_ms,
        "aim": 7.0,
        "peers": {peer: peer_ms / baseline_ms for peer, peer_ms in ms.items()},
    }


def thresholds() -> list[dict[str, Any]]:
    """Thresholds of one histogram of 2048 bins. There is no baseline: aims and peers are milliseconds."""
    x = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    counts, width = torch.histc(x.abs(), BINS).long(), x.abs().max() / BINS
    functions: dict[str, Callable[[], Any]] = {
        "entropy": lambda: entropy_threshold(counts, width, INT8),
        "mse": lambda: mse_threshold(counts, width, INT8),
        "sqnr": lambda: sqnr_threshold(counts, width, INT8),
        "percentile": lambda: percentile_threshold(counts, width),
    }
    ms = medians(functions, repeats=31)
    peers: dict[str, dict[str, float]] = {name: {} for name in functions}

    observer = HistogramObserver(bins=BINS)
    observer(x)
    peers["mse"]["torch.ao (ms)"] = medians({"search": observer.calculate_qparams}, repeats=3)["search"]
    modelopt = modelopt_histogram()
    if modelopt is not None:
        calibrator = modelopt(num_bits=8, axis=None, unsigned=False, num_bins=BINS)
        calibrator.collect(x)
        for name in ("entropy", "mse", "percentile"):
            run = {name: lambda name=name: calibrator.compute_amax(name)}
            peers[name]["modelopt (ms)"] = medians(run, repeats=1, warmup=0)[name]
    return [
        {
            "name": f"{name} threshold, {BINS} bins",
            "ours_ms": ms[name],
            "baseline_ms": None,
            "ratio": None,
            "aim": "5 ms",
            "peers": peers[name],
        }
        for name in functions
    ]


def rows() -> list[dict[str, Any]]:
    """The rows of the table; a ratio is to the baseline, as are the aim and the peers beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Four tensors take turns: no cache holds one until it comes again.
        dense = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        rectified = [x.relu() for x in dense]
        return [
            collecting("dense", dense * (BATCHES // 4)),
            collecting("after a ReLU", rectified * (BATCHES // 4)),
            *thresholds(),
        ]
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    """Prints the table."""
    for row in rows():
        ratio = "" if row["ratio"] is None else f", {row['ratio']:.2f} times the baseline"
        peers = ", ".join(f"{peer} {value:.1f}" for peer, value in row["peers"].items()) or "no peer"
        print(f"{row['name']}: {row['ours_ms']:.2f} ms{ratio} (aim {row['aim']}; {peers})")


if __name__ == "__main__":
    main()
