"""What a block costs: entering and leaving it, and building layers inside, outside and beside it.

Run ``python -m benchmarks.scope``. The functions that are compared take turns in one process.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import nn

from benchmarks.timing import medians
from quantpatch import quantize_modules

SWAPS = 15
BLOCKS = 20
LAYERS = 1000


def enter_and_leave() -> None:
    for _ in range(BLOCKS):
        with quantize_modules():
            pass


def nested() -> None:
    with quantize_modules():
        for _ in range(BLOCKS):
            with quantize_modules():
                pass


def swap_names() -> None:
    """The usual way: other classes under the names in torch.nn, for a while."""
    names = [name for name, value in vars(nn).items() if isinstance(value, type)][:SWAPS]
    for _ in range(BLOCKS):
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(mock.patch.object(nn, name, nn.Identity))


def build() -> None:
    for _ in range(LAYERS):
        nn.Linear(8, 8)


def build_inside() -> None:
    with quantize_modules():
        build()


@contextlib.contextmanager
def open_elsewhere() -> Iterator[None]:
    """A block that is open in another thread."""
    opened, close = threading.Event(), threading.Event()

    def hold() -> None:
        with quantize_modules():
            opened.set()
            close.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    opened.wait()
    try:
        yield
    finally:
        close.set()
        thread.join()


def build_beside() -> None:
    with open_elsewhere():
        build()


def rows() -> list[dict[str, Any]]:
    """One row for each comparison; times in ms, of one block or of 1,000 layers."""

    def row(
        name: str, ours: Callable[[], None], base: Callable[[], None], per: int, aim: str
    ) -> dict[str, Any]:
        times = medians({"ours": ours, "base": base})
        mine, other = times["ours"] / per, times["base"] / per
        return {
            "name": name,
            "ours_ms": mine,
            "baseline_ms": other,
            "ratio": mine / other,
            "aim": aim,
            "peers": {},
        }

    before = medians({"build": build})["build"]  # the first block of the run opens below
    made = [
        row(
            f"enter and leave / mock.patch of {SWAPS} names", enter_and_leave, swap_names, BLOCKS, "< 0.2 ms"
        ),
        row(f"the same, nested / mock.patch of {SWAPS} names", nested, swap_names, BLOCKS, "< 0.2 ms"),
        row("float Linear(8, 8) x1000, block in another thread / none", build_beside, build, 1, "1.0"),
        row("quantized Linear(8, 8) x1000 / float", build_inside, build, 1, "<= 2.5"),
    ]
    after = medians({"build": build})["build"]
    name = "float Linear(8, 8) x1000, after blocks / before the first"
    times = {"ours_ms": after, "baseline_ms": before, "ratio": after / before}
    return [*made, {"name": name, **times, "aim": "1.0", "peers": {}}]


if __name__ == "__main__":
    for line in rows():
        print("{name}: {ours_ms:.4g} ms, {baseline_ms:.4g} ms, ratio {ratio:.3g} (aim {aim})".format(**line))
