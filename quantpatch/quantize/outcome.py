"""What came out of a block or a conversion: what was replaced, what was left float, and why."""

from __future__ import annotations

from collections import Counter

import attrs

from quantpatch.interception import hooks
from quantpatch.plugins.entry import Entry
from quantpatch.plugins.plugin import Offer
from quantpatch.torch_tools import debug_trace
from quantpatch.torch_tools.class_swap import dotted

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
        self._counts: Counter[tuple[Offer, str, str, str]] = Counter()

    def count(
        self, offer: Offer, float_because: str = "", *, target: str = "", replacement: str = ""
    ) -> None:
        """Counts one object.

        Args:
            offer: The entry that is for it, or for its base class.
            float_because: Why it stayed float; empty if it was replaced.
            target: Dotted name of its class, if that is not the entry's target.
            replacement: Dotted name of what took its place, if that is not the entry's replacement.
        """
        with hooks.lock:
            key = offer, float_because, target, replacement
            self._counts[key] += 1
            first = self._counts[key] == 1
        if first and debug_trace.is_on():
            debug_trace.say(_decision(*key))

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        """What was replaced so far, in the order in which each came up first."""
        return tuple(
            Replaced(
                target or offer.entry.dotted,
                replacement or dotted(offer.entry.load_replacement()),
                offer.entry,
                offer.plugin,
                count,
            )
            for (offer, because, target, replacement), count in self._items()
            if not because and offer.entry.reported
        )

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What was left float so far, in the order in which each came up first."""
        return tuple(
            Skipped(target or offer.entry.dotted, because, count)
            for (offer, because, target, _), count in self._items()
            if because
        )

    def _items(self) -> list[tuple[tuple[Offer, str, str, str], int]]:
        with hooks.lock:
            return list(self._counts.items())


def _decision(offer: Offer, float_because: str, target: str, replacement: str) -> str:
    if float_because:
        return f"  {target or offer.entry.dotted} stays float: {float_because}"
    return f"  {f'{target} -> {replacement}' if target else offer.entry} ({offer.source})"
