"""What the processes of a script report, put together.

A first process without torch loads this file by its path as it ends, where torch cannot be imported any more.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
from rich import box
from rich.console import Console
from rich.table import Table


@attrs.frozen
class Part:
    """What one process reports.

    Attributes:
        process: How to call it.
        replaced: Target, replacement, plugin and count of each line of ``block.replaced``.
        skipped: Target, reason and count of each line of ``block.skipped``.
        notes: Sentences about the calibration and the audit.
        audits: The report of each audit, as text.
    """

    process: str
    replaced: list[list[Any]]
    skipped: list[list[Any]]
    notes: list[str]
    audits: list[str]

    def __bool__(self) -> bool:
        return bool(self.replaced or self.skipped or self.notes or self.audits)

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Part:
        """The part that ``to_json`` wrote."""
        return cls(**json.loads(text))


def left_in(directory: str) -> list[Part]:
    """What other processes have left in a folder."""
    return [Part.from_json(file.read_text()) for file in sorted(Path(directory).glob("*.json"))]


def report(parts: Sequence[Part], *, models: bool) -> None:
    """Prints to stderr what was replaced, what was left float and why, and what the models did.

    Args:
        parts: A part for each process.
        models: Whether the models were watched.
    """
    if sys.stderr is None:  # closed
        return
    console = Console(markup=False, stderr=True, width=None if sys.stderr.isatty() else 160, highlight=False)
    with console.capture() as captured:
        _print(console, parts, models=models)
    sys.stderr.write(captured.get())  # in one piece: the ranks of torchrun write at the same time


def _print(console: Console, parts: Sequence[Part], *, models: bool) -> None:
    rank = os.environ.get("RANK")
    whose = "" if rank is None else f", rank {rank}"
    parts = [part for part in parts if part]
    replaced = _sum(line for part in parts for line in part.replaced)
    skipped = _sum(line for part in parts for line in part.skipped)
    number = sum(replaced.values())
    where = f" in {len(parts)} processes" if len(parts) > 1 else ""
    console.print(f"quantpatch run{whose}: {number} {'layer' if number == 1 else 'layers'} replaced{where}")
    if replaced:
        console.print(_table(("replaced", "by", "plugin", "times"), replaced))
    if replaced and skipped:
        console.print()
    if skipped:
        console.print(_table(("left float", "because", "times"), skipped))
    if not replaced and not skipped:
        console.print("It built no layer that there is an entry for: `quantpatch layers` lists them.")
    if models and not any(part.notes or part.audits for part in parts):
        console.print("No model ran: no module with quantizers was called. Compiled code cannot be seen.")
    for texts in ([part.notes for part in parts], [part.audits for part in parts]):
        for text, names in _by_text(parts, texts).items():
            whose = f"{', '.join(names)}: " if len(parts) > 1 else ""
            console.print(f"{whose}{text}", markup=False)


def _sum(lines: Iterable[list[Any]]) -> Counter[tuple[Any, ...]]:
    total: Counter[tuple[Any, ...]] = Counter()
    for *key, count in lines:
        total[tuple(key)] += count
    return total


def _table(headings: Sequence[str], lines: Counter[tuple[Any, ...]]) -> Table:
    # Like the tables of other reports, which need torch to be imported.
    table = Table(*headings[:-1], box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(headings[-1], justify="right")
    for column in table.columns:
        column.overflow = "fold"
    for key, count in lines.items():
        table.add_row(*(str(value) for value in key), str(count))
    return table


def _by_text(parts: Sequence[Part], texts: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Each text once, with the processes that say it: ranks mostly say the same."""
    found: dict[str, list[str]] = {}
    for part, of_part in zip(parts, texts, strict=True):
        for text in of_part:
            found.setdefault(text, []).append(part.process)
    return found
