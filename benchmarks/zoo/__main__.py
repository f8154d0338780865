"""Measures models of timm, transformers and others, prints a table, and exits with 1 if one failed."""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.zoo import architectures, packages, timm_families
from benchmarks.zoo.measure import Row, measure

_COLLECTIONS = {"timm": timm_families, "transformers": architectures, "packages": packages}


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Ends what takes longer with a TimeoutError."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again, where something catches the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table_of(rows: list[Row]) -> Table:
    """A line for each model."""
    table = Table(title=f"{len(rows)} models, small or the smallest of their family, random weights")
    for heading in ("family", "model"):
        table.add_column(heading, overflow="fold")
    for heading in (
        "MACs quantized",
        "with operations",
        "converted",
        "float: off by",
        "calibrated: off by",
        "file: off by",
        "integers differ",
        "left",
        "s",
    ):
        table.add_column(heading, justify="right")
    table.add_column("notes", overflow="fold", ratio=1)
    for row in rows:
        said = [row.failure] if row.failure else [*row.float_products, *row.notes]
        table.add_row(
            row.family,
            row.model,
            "-" if row.share is None else f"{row.share:.1%}",
            "-" if row.with_operations is None else f"{row.with_operations:.2%}",
            "-" if row.converted is None else f"{row.converted:.2%}",
            "-" if row.exact is None else f"{row.exact:.1e}{' (*)' * (row.rounded is not None)}",
            "-" if row.error is None else f"{row.error:.3f}",
            "-" if row.file is None else f"{row.file:.1e}",
            row.integers or "-",
            str(len(row.skipped)),
            f"{row.seconds:.0f}",
            "; ".join(text if len(text) < 160 else f"{text[:160]} …" for text in said),
            style="red" if row.failed else None,
        )
    return table


def summary_of(rows: list[Row]) -> list[str]:
    """What it comes to, a line each."""
    built = [row for row in rows if not row.unbuilt]
    failed = [row.family for row in built if row.failed]
    shares = [(row.family, row.with_operations) for row in built if row.with_operations is not None]
    below = [f"{family} {share:.2%}" for family, share in shares if share < 0.995]
    lines = [f"below 99.5 % with operations: {len(below)} of {len(shares)} ({', '.join(below) or 'none'})"]
    if rounded := [f"{row.family} {row.rounded:.1e}" for row in built if row.rounded is not None]:
        lines.append(f"(*) in float64; in float32, of which these make more: {', '.join(rounded)}")
    if files := sorted(row.file for row in built if row.file is not None):
        lines.append(
            f"{len(files)} files: off the model by {files[len(files) // 2]:.1e} (median), {files[-1]:.1e}"
        )
    if unexported := [f"{row.family} ({row.unexported[:120]})" for row in built if row.unexported]:
        lines.append(f"not exported: {len(unexported)}: {', '.join(unexported)}")
    if unbuilt := [f"{row.family} ({row.unbuilt[:60]})" for row in rows if row.unbuilt]:
        lines.append(f"float models that did not build or run: {len(unbuilt)}: {', '.join(unbuilt)}")
    exact = max((row.exact for row in built if row.exact is not None), default=0)
    lines.append(
        f"{len(built) - len(failed)} of {len(built)} models hold; in float off by at most {exact:.1e}"
        f"{'; failed: ' + ', '.join(failed) if failed else ''}"
    )
    return lines


def main() -> None:
    """Measures what is asked for (default: everything)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("models", nargs="*", help="timm, transformers, timm:resnet, transformers:bert ...")
    parser.add_argument("--no-export", action="store_true", help="write no ONNX files, which takes longest")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for a model")
    parser.add_argument("--json", type=Path, help="a file to add a line to for each model")
    options = parser.parse_args()
    rows = []
    asked = [name.partition(":") for name in options.models or _COLLECTIONS]
    todo = [
        (collection, family)
        for collection, _, only in asked
        for family in ([only] if only else _COLLECTIONS[collection].names())
    ]
    for collection, family in track(todo, console=Console(stderr=True)):
        row = Row(collection, family)
        rows.append(row)
        with _at_most(options.timeout):
            measure(row, _COLLECTIONS[collection].subject, export=not options.no_export)
        gc.collect()
        if options.json is not None:
            with options.json.open("a") as file:
                print(json.dumps(attrs.asdict(row)), file=file)
    console = Console(width=None if sys.stdout.isatty() else 200)
    for name in _COLLECTIONS:
        if of_it := [row for row in rows if row.collection == name]:
            console.print(table_of(of_it))
            for line in summary_of(of_it):
                console.print(f"{name}: {line}")
    sys.exit(any(row.failed for row in rows))


if __name__ == "__main__":
    main()
