"""Tables as text, the same wherever they go."""

from __future__ import annotations

import io
from collections.abc import Iterator
from shutil import get_terminal_size
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from quantpatch.report.narrow import narrow_lines, wrapped

__all__ = ["as_percent", "as_text"]

_LONG = 200  # rows
_MANY = 60  # rows, from which on those that are alike become one
_ROOMY = 100  # columns, from which on rich's layout of cells that do not fit can be read
_NARROWEST = 40


def as_text(renderable: Any, *, of_names: bool = False) -> str:
    """A rich renderable as plain text, as wide as the terminal, or ``COLUMNS``; 120 without either.

    Where that is too narrow for all rows as they are, or there are many, those that are alike become one if
    the renderable knows how: it has a method ``folded`` then.

    Args:
        renderable: What is to be shown. Cells that do not fit are folded.
        of_names: Whether it is a table of names, which somebody may search for: without a terminal it is as
            wide as they are.
    """
    terminal = get_terminal_size((0, 24)).columns
    width = max(_NARROWEST, terminal or 120)
    shown = renderable.__rich__() if hasattr(renderable, "__rich__") else renderable
    if terminal and hasattr(renderable, "folded") and not _is_handy(shown, width):
        shown = renderable.folded()
    parts = shown.renderables if isinstance(shown, Group) else [shown]
    return "\n".join(_part(part, width, of_names, is_wide=not terminal) for part in parts)


def _is_handy(shown: Any, width: int) -> bool:
    """Whether tables fit into the width, and are not long."""
    parts = shown.renderables if isinstance(shown, Group) else [shown]
    tables = [part for part in parts if isinstance(part, Table)]
    return all(table.row_count <= _MANY and _Grid(table).width <= width for table in tables)


def _part(part: Any, width: int, of_names: bool, *, is_wide: bool) -> str:
    if isinstance(part, Group):
        return "\n".join(_part(each, width, of_names, is_wide=is_wide) for each in part.renderables)
    if isinstance(part, Text) and part.no_wrap:
        return part.plain
    if isinstance(part, Table):
        grid = _Grid(part)
        is_wide = of_names and (is_wide or (part.row_count > _LONG and width >= _ROOMY))
        if grid.is_plain and (is_wide or grid.width <= width):
            return "\n".join(grid.lines())
        if width < _ROOMY and part.columns:
            return "\n".join(narrow_lines(part, width))
    if width < _ROOMY and isinstance(part, (Text, str)):
        return "\n".join(wrapped(str(part), width))
    return _by_rich(part, width)


def _by_rich(renderable: Any, width: int, **options: Any) -> str:
    console = Console(markup=False, file=io.StringIO(), width=width, no_color=True, force_terminal=False)
    console.print(renderable, **options)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip("\n")


class _Grid:
    """What rich makes of a table whose cells fit; its layout takes most of a millisecond for each row.

    Args:
        table: As rich's defaults have it, but for titles, sections and the sides that columns keep to.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._columns = [[str(cell) for cell in (c.header, *c.cells)] for c in table.columns]
        needed = (max(map(cell_len, cells)) for cells in self._columns)
        self._widths = [max(c.min_width or 0, n) for c, n in zip(table.columns, needed, strict=True)]
        self.width = sum(self._widths) + 3 * len(self._widths) + 1
        self.is_plain = bool(self._columns) and not any("\n" in cell for c in self._columns for cell in c)

    def lines(self) -> Iterator[str]:
        """The lines of the text."""
        table, box = self._table, self._table.box
        assert box is not None
        around = [width + 2 for width in self._widths]
        if table.title:
            yield _by_rich(Text(str(table.title)), self.width, justify="center")
        yield box.get_top(around)
        yield self._row(0, box.head_left, box.head_vertical, box.head_right)
        yield box.get_row(around, "head")
        for number, row in enumerate(table.rows, 1):
            yield self._row(number, box.mid_left, box.mid_vertical, box.mid_right)
            if row.end_section and number < table.row_count:
                yield box.get_row(around, "row")
        yield box.get_bottom(around)
        if table.caption:
            yield _by_rich(Text(str(table.caption)), self.width, justify="center")

    def _row(self, number: int, left: str, between: str, right: str) -> str:
        cells = []
        for column, width, settings in zip(self._columns, self._widths, self._table.columns, strict=True):
            space = " " * (width - cell_len(column[number]))
            is_right = settings.justify == "right"
            cells.append(f" {space}{column[number]} " if is_right else f" {column[number]}{space} ")
        return f"{left}{between.join(cells)}{right}"


def as_percent(share: float) -> str:
    """A share with one decimal, which says 0.0% of nothing and 100.0% of all alone."""
    shown = f"{share:.1%}"
    if shown == "100.0%" and share < 1:
        return ">99.9%"
    return "<0.1%" if shown == "0.0%" and share > 0 else shown
