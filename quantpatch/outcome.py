"""What came out of a block or a conversion: what was replaced, what was left float, and why."""

from __future__ import annotations

from collections import Counter

import attrs

from quantpatch import interception, tracing
from quantpatch.classes import dotted
from quantpatch.entries import Entry
from quantpatch.plugins import Offer

__all__ = ["Outcome", "Replaced", "Skipped"]


@attrs.frozen
class Replaced:
    """A line of ``scope.replaced``.

    Attributes:
        target: Dotted name of the class or function.
        replacement: Dotted name of what took its place.
        entry: The entry that applied.
        plugin: The plugin it came from; None for an entry given as ``custom``.
        count: How many objects were built (or calls made).
    """

    target: str
    replacement: str
    entry: Entry
    plugin: str | None
    count: int


@attrs.frozen
class Skipped:
    """A line of ``scope.skipped``: what was built in the block and left float.

    Attributes:
        target: Dotted name of the class (or function).
        reason: Why it was left float.
        count: How many objects were built.
    """

    target: str
    reason: str
    count: int


class Outcome:
    """Counts what is built, from any thread."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[Offer | str, str]] = Counter()

    def count(self, built: Offer | str, float_because: str = "") -> None:
        """Counts one object.

        Args:
            built: The entry that is for it, or, if there is none, the dotted name of its class.
            float_because: Why it stayed float; empty if it was replaced.
        """
        with interception.lock:
            self._counts[built, float_because] += 1
            first = self._counts[built, float_because] == 1
        if first and tracing.is_on():
            tracing.say(_decision(built, float_because))

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        """What was replaced so far, in the order in which each came up first."""
        return tuple(
            Replaced(o.entry.dotted, dotted(o.entry.load_replacement()), o.entry, o.plugin, count)
            for (o, because), count in self._items()
            if isinstance(o, Offer) and not because
        )

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What was left float so far, in the order in which each came up first."""
        return tuple(
            Skipped(built.entry.dotted if isinstance(built, Offer) else built, because, count)
            for (built, because), count in self._items()
            if because
        )

    def _items(self) -> list[tuple[tuple[Offer | str, str], int]]:
        with interception.lock:
            return list(self._counts.items())


def _decision(built: Offer | str, float_because: str) -> str:
    if isinstance(built, str):
        return f"  {built} stays float: {float_because}"
    if float_because:
        return f"  {built.entry.dotted} stays float: {float_because}"
    return f"  {built.entry} ({built.source})"
