"""What came out of a block or a conversion: what was replaced, what was left float, and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from quantpatch.interception.slots import lock
from quantpatch.plugins.entry import Entry
from quantpatch.quantize.reasons import Reason, SubclassOf
from quantpatch.quantize.resolve import Decision
from quantpatch.reports.report import Report, table_of
from quantpatch.torch_tools import debug_trace
from quantpatch.torch_tools.class_swap import dotted

if TYPE_CHECKING:
    from rich.table import Table


@attrs.frozen
class Replaced:
    """A line of ``block.replaced``.

    Attributes:
        target: Dotted name of the class or function.
        replacement: Dotted name of what took its place.
        entry: The entry that applied.
        count: How many objects were built (or calls made).
    """

    target: str
    replacement: str
    entry: Entry
    count: int

    @property
    def plugin(self) -> str | None:
        """The plugin that the entry came from; None for an entry given as ``custom``."""
        return self.entry.plugin


@attrs.frozen
class Skipped:
    """A line of ``block.skipped``: what was built in the block and left float.

    Attributes:
        target: Dotted name of the class (or function).
        why: Why it was left float, as a value.
        count: How many objects were built.
    """

    target: str
    why: Reason
    count: int

    @property
    def reason(self) -> str:
        """Why it was left float, as a sentence."""
        return str(self.why)


_Line = TypeVar("_Line", Replaced, Skipped)


class Lines(Report, tuple[_Line, ...]):
    """Lines of ``block.replaced`` or ``block.skipped``: a tuple that prints as a table."""

    __slots__ = ()

    def _fields(self) -> dict[str, Any]:
        return {"rows": [_written(line) for line in self]}

    def __rich__(self) -> Table:
        return _table(self)


@attrs.frozen
class Conversion(Report):
    """What ``convert`` did, or a block so far; prints as a table.

    Attributes:
        replaced: The layers that were quantized, by class.
        skipped: The layers that were left float, by class, and why.
    """

    replaced: Lines[Replaced]
    skipped: Lines[Skipped]

    _rows = ("replaced", "skipped")

    def _fields(self) -> dict[str, Any]:
        return {name: [_written(line) for line in getattr(self, name)] for name in self._rows}

    def __rich__(self) -> Table:
        return _table((*self.replaced, *self.skipped))


def _written(line: Replaced | Skipped) -> dict[str, Any]:
    if isinstance(line, Skipped):
        return {"target": line.target, "count": line.count, "reason": line.reason}
    return {
        "target": line.target,
        "count": line.count,
        "replacement": line.replacement,
        "plugin": line.plugin,
    }


def _table(lines: Iterable[Replaced | Skipped]) -> Table:
    table = table_of("class", "layers", "what became of them", right=("layers",))
    for line in lines:
        became = line.replacement if isinstance(line, Replaced) else f"float: {line.reason}"
        table.add_row(line.target, str(line.count), became)
    return table


class Outcome:
    """Counts what is built, from any thread."""

    def __init__(self) -> None:
        self._counts: dict[Decision, int] = {}

    def count(self, decision: Decision) -> None:
        """Counts one object that came out as was decided."""
        with lock:
            count = self._counts[decision] = self._counts.get(decision, 0) + 1
        if count == 1 and debug_trace.is_on():
            debug_trace.say(f"  {decision}")

    def covered(self, decision: Decision) -> None:
        """Counts one object that came out as was decided, and had been counted as left float."""
        with lock:
            for known, count in self._counts.items():
                if isinstance(known.reason, SubclassOf) and known.target is decision.target:
                    self._counts[known] = count - 1
                    break
        self.count(decision)

    @property
    def replaced(self) -> Lines[Replaced]:
        """What was replaced so far, in the order in which each came up first."""
        return Lines(
            Replaced(decision.name, dotted(decision.replacement), decision.entry, count)
            for decision, count in self._items()
            if decision.reason is None and decision.entry is not None and decision.entry.reported
        )

    @property
    def skipped(self) -> Lines[Skipped]:
        """What was left float so far, in the order in which each came up first."""
        return Lines(
            Skipped(decision.name, decision.reason, count)
            for decision, count in self._items()
            if decision.reason is not None
        )

    def _items(self) -> list[tuple[Decision, int]]:
        with lock:
            return [(decision, count) for decision, count in self._counts.items() if count]
