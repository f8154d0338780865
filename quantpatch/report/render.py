"""Reports as text, the same wherever they go."""

from __future__ import annotations

from collections.abc import Iterator
from shutil import get_terminal_size
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from quantpatch.report.layout import table_lines, width_of, wrapped

_LONG = 200  # rows
_MANY = 60  # rows, or words of a sentence, from which on those that are alike become one
_ROOMY = 100  # columns, from which on long tables may be wider than the terminal
_NARROWEST = 40


def as_text(renderable: Any, *, of_names: bool = False) -> str:
    """Tables and sentences as plain text, as wide as the terminal, or ``COLUMNS``; 120 without either.

    Where that is too narrow for all rows as they are, or there are many, those that are alike become one if
    the renderable knows how: it has a method ``folded`` then.

    Args:
        renderable: A table, a text, a group of these, or what gives one to rich.
        of_names: Whether it is a table of names, which one may search for: without a terminal it is as wide
            as they are.
    """
    terminal = get_terminal_size((0, 24)).columns
    width = max(_NARROWEST, terminal or 120)
    shown = renderable.__rich__() if hasattr(renderable, "__rich__") else renderable
    if terminal and hasattr(renderable, "folded") and not _is_handy(shown, width):
        shown = renderable.folded()

    def lines() -> Iterator[str]:
        for part in _parts(shown):
            if isinstance(part, Table):
                is_long = part.row_count > _LONG and width >= _ROOMY
                yield from table_lines(part, None if of_names and (is_long or not terminal) else width)
            elif isinstance(part, Text) and part.no_wrap:
                yield part.plain
            else:
                yield from wrapped(str(part), width)

    return "\n".join(lines())


def _parts(shown: Any) -> Iterator[Any]:
    for part in shown.renderables if isinstance(shown, Group) else [shown]:
        yield from _parts(part) if isinstance(part, Group) else [part]


def _is_handy(shown: Any, width: int) -> bool:
    """Whether tables fit into the width, and nothing is long."""
    return all(
        part.row_count <= _MANY and width_of(part) <= width
        if isinstance(part, Table)
        else getattr(part, "no_wrap", False) or str(part).count(" ") <= _MANY
        for part in _parts(shown)
    )


def as_percent(share: float) -> str:
    """A share with one decimal, which says 0.0% of nothing and 100.0% of all alone."""
    shown = f"{share:.1%}"
    if shown == "100.0%" and share < 1:
        return ">99.9%"
    return "<0.1%" if shown == "0.0%" and share > 0 else shown
