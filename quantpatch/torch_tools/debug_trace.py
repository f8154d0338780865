"""``QUANTPATCH_TRACE=1``: a line on stderr for each plugin, hook, block and decision."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from quantpatch.errors import shown
from quantpatch.torch_tools.raised import said

VARIABLE = "QUANTPATCH_TRACE"


def is_on() -> bool:
    """Whether lines are wanted; looked up each time, so that it can be switched within a process."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def say(line: str) -> None:
    """Writes a line, if lines are wanted."""
    if is_on():
        print(f"quantpatch: {shown(line, 2000)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def timed(what: str) -> Iterator[list[str]]:
    """A block that is logged when it is over, with its duration.

    ::

        with timed("plugin 'x': quantpatch_entries()") as results:
            results.append("3 entries")
    """
    results: list[str] = []
    start = time.perf_counter()
    try:
        yield results
    except BaseException as error:
        results[:] = [said(error)]
        raise
    finally:
        ms = 1e3 * (time.perf_counter() - start)
        came = f" -> {', '.join(results)}" if results else ""
        say(f"{what}{came} ({ms:.2f} ms)")
