"""What a block costs: entering and leaving it, and building layers inside, outside and beside it.

Run ``python -m benchmarks.scope``. The functions that are compared take turns in one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
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


PLUGINS = 20
PLUGIN = """
import quantpatch
@quantpatch.hookimpl
def quantpatch_entries():
    return [("target{n}.layers", f"Layer{{i}}", f"plugin{n}.layers:QuantLayer{{i}}") for i in range(3)]
"""
# What a process pays once, and what it pays for each block. torch is there already: it is not ours.
PROCESS = f"""
import json, time, torch
def ms(start):
    return 1e3 * (time.perf_counter() - start)
start = time.perf_counter()
import quantpatch
imported = ms(start)
start = time.perf_counter()
with quantpatch.quantize_modules():
    pass
first = ms(start)
start = time.perf_counter()
for _ in range({BLOCKS}):
    with quantpatch.quantize_modules():
        pass
print(json.dumps([imported, first, ms(start) / {BLOCKS}]))
"""


def write_plugins(folder: Path, count: int) -> None:
    """Installs plugins, each a distribution with three entries for a package that is not imported."""
    for n in range(count):
        (folder / f"plugin{n}.py").write_text(PLUGIN.format(n=n))
        info = folder / f"plugin{n}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin{n}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[quantpatch]\nplugin{n} = plugin{n}\n")


def with_plugins(repeats: int = 7) -> list[dict[str, Any]]:
    """The cost of having plugins installed; every figure from processes of its own, which take turns."""
    times: dict[int, list[list[float]]] = {0: [], PLUGINS: []}
    with tempfile.TemporaryDirectory() as folder:
        environments = {}
        for count in times:
            own = Path(folder, str(count))
            own.mkdir()
            write_plugins(own, count)
            path = os.pathsep.join([str(own), *sys.path[:1], os.environ.get("PYTHONPATH", "")]).rstrip(":")
            environments[count] = {**os.environ, "PYTHONPATH": path}
        for _ in range(repeats):
            for count, environment in environments.items():
                done = subprocess.run(
                    [sys.executable, "-c", PROCESS], env=environment, capture_output=True, check=True
                )
                times[count].append(json.loads(done.stdout))
    rows = []
    for i, (what, aim) in enumerate(
        (("import quantpatch (after torch)", "1.0"), ("first block", "-"), ("each further block", "< 0.2 ms"))
    ):
        none, many = (statistics.median(run[i] for run in times[count]) for count in times)
        rows.append({
            "name": f"{what}, {PLUGINS} plugins more / none more", "ours_ms": many, "baseline_ms": none,
            "ratio": many / none, "aim": aim, "peers": {},
        })  # fmt: skip
    return rows


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
    return [*made, *with_plugins(), {"name": name, **times, "aim": "1.0", "peers": {}}]


if __name__ == "__main__":
    for line in rows():
        print("{name}: {ours_ms:.4g} ms, {baseline_ms:.4g} ms, ratio {ratio:.3g} (aim {aim})".format(**line))
