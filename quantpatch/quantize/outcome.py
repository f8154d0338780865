"""What came out of a block or a conversion: what was replaced, what was left float, and why."""

from __future__ import annotations

import attrs

from quantpatch.interception.slots import lock
from quantpatch.plugins.entry import Entry
from quantpatch.quantize.reasons import Reason
from quantpatch.quantize.resolve import Decision
from quantpatch.torch_tools import debug_trace
from quantpatch.torch_tools.class_swap import dotted


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

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        """What was replaced so far, in the order in which each came up first."""
        return tuple(
            Replaced(decision.name, dotted(decision.replacement), decision.entry, count)
            for decision, count in self._items()
            if decision.reason is None and decision.entry is not None and decision.entry.reported
        )

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What was left float so far, in the order in which each came up first."""
        return tuple(
            Skipped(decision.name, decision.reason, count)
            for decision, count in self._items()
            if decision.reason is not None
        )

    def _items(self) -> list[tuple[Decision, int]]:
        with lock:
            return list(self._counts.items())
