"""``make bench``: every benchmark in one run, beside the peers that are installed; ratios and JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

SUITES = (
    "scope",
    "fake_quant",
    "exactness",
    "calibration",
    "models",
    "attention",
    "compiled",
    "export",
    "lowered",
    "mixed_precision",
    "gpu",
)
PEERS = ("torchao", "nvidia-modelopt", "brevitas", "optimum-quanto")


def installed() -> dict[str, str | None]:
    """Version of each peer; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for peer in PEERS:
        try:
            found[peer] = version(peer)
        except PackageNotFoundError:  # noqa: PERF203
            found[peer] = None
    return found


def table_of(suite: str, rows: list[dict[str, Any]]) -> Table:
    """The rows of a suite, with ratios to its baseline."""
    table = Table(title=suite)
    for heading in ("what", "ours (ms)", "baseline (ms)", "ratio", "aim", "peers"):
        table.add_column(heading, justify="left" if heading in ("what", "peers") else "right")
    for row in rows:
        peers = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["peers"].items()
        )
        table.add_row(
            row["name"],
            *(
                f"{row[k]:.4g}" if isinstance(row[k], (int, float)) else "-"
                for k in ("ours_ms", "baseline_ms", "ratio")
            ),
            str(row["aim"]),
            peers,
        )
    return table


def main() -> None:
    """Runs the suites asked for (default: all)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", default=SUITES, help=f"any of {', '.join(SUITES)}")
    parser.add_argument("--json", type=Path, default=Path(".bench/results.json"))
    options = parser.parse_args()
    console = Console(width=160)
    peers = installed()
    console.print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    for peer, found in peers.items():
        console.print(f"{peer}: {found or 'not installed, not compared with'}")
    results: dict[str, Any] = {"torch": torch.__version__, "peers": peers, "suites": {}}
    for suite in options.suites:
        rows = importlib.import_module(f"benchmarks.{suite}").rows()
        results["suites"][suite] = rows
        console.print(table_of(suite, rows))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2))
    console.print(f"written to {options.json}")


if __name__ == "__main__":
    main()
