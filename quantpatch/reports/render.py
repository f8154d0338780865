"""Reports as text, the same wherever they go: cells break at dots and spaces, narrow tables become lists."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from shutil import get_terminal_size
from typing import Any

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

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


def whole_or_folded(renderable: Any) -> Any:
    """What a report shows where there is room for many columns and not for thousands of rows."""
    shown = renderable.__rich__()
    tables = [part for part in _parts(shown) if isinstance(part, Table)]
    if hasattr(renderable, "folded") and any(table.row_count > _LONG for table in tables):
        return renderable.folded()
    return shown


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


# --- lines of a table or a text -----------------------------------------------------------------


_GAP = 2  # between columns
# Lines of a row; a table whose rows are higher is harder to read than a list, the more so a narrow one.
_MOST_LINES, _MOST_LINES_WHERE_WIDE, _WIDE = 3, 12, 100
_INDENT = "    "
# A title or caption is as long as that at least, where nothing says how wide a line may be.
_LINE = 80

Row = Sequence[str]


def table_lines(table: Table, width: int | None) -> Iterator[str]:
    """The lines of a table.

    Args:
        table: What is to be shown.
        width: What no line is wider than; words that are wider are cut. None: as wide as the cells.
    """
    headers = [str(column.header) for column in table.columns]
    rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    is_right = [column.justify == "right" for column in table.columns]
    widths = _widths([headers, *rows], is_right, width) if headers else []
    total = width or sum(widths or ()) + _GAP * len(headers)
    around = width or max(total, _LINE)
    if table.title:
        yield from wrapped(str(table.title), around)
    if widths is None:
        yield from _stacked(headers, rows, is_right, total)
    elif headers:
        rule = "─" * (sum(widths) + _GAP * (len(widths) - 1))
        yield from _lined_up(headers, widths, is_right)
        yield rule
        for row, settings in zip(rows, table.rows, strict=True):
            yield from _lined_up(row, widths, is_right)
            if settings.end_section and row is not rows[-1]:
                yield rule
    if table.caption:
        yield ""
        yield from wrapped(str(table.caption), around)


def width_of(table: Table) -> int:
    """How wide a table is whose cells are not broken."""
    columns = ([str(column.header), *map(str, column.cells)] for column in table.columns)
    return sum(max(map(cell_len, cells)) + _GAP for cells in columns) - _GAP


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width``, broken at spaces, after dots, and elsewhere only within longer words."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        if cell_len(paragraph) <= width:
            lines.append(paragraph.rstrip())
            continue
        line = ""
        for piece in _chunks(paragraph):
            if line and cell_len(line) + cell_len(piece.rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            while cell_len(piece.rstrip()) > width:
                lines.append(piece[:width])
                piece = piece[width:]
            line += piece
        lines.append(line.rstrip())
    return lines


def _chunks(text: str) -> list[str]:
    """What a text may be broken into: words, and names after their dots (not numbers)."""
    return re.findall(r"(?:\d+\.\d\S*|[^\s.]*\.?)\s*", text)[:-1] or [text]


def _widths(rows: Sequence[Row], is_right: list[bool], width: int | None) -> list[int] | None:
    """Widths of columns that rows fit into with few lines; None if there are none."""
    columns = list(zip(*rows, strict=True))
    whole = [max(max(map(cell_len, cell.split("\n"))) for cell in column) for column in columns]
    if width is None or sum(whole) + _GAP * (len(whole) - 1) <= width:
        return whole
    least = [
        full if right else max(cell_len(piece.rstrip()) for cell in column for piece in _chunks(cell))
        for column, full, right in zip(columns, whole, is_right, strict=True)
    ]
    spare = width - _GAP * (len(columns) - 1) - sum(least)
    if spare < 0:
        return None
    widths = list(least)
    while spare:
        needy = max(range(len(widths)), key=lambda n: whole[n] / widths[n])
        widths[needy] += 1
        spare -= 1
    most = _MOST_LINES if width < _WIDE else _MOST_LINES_WHERE_WIDE
    highest = max(len(wrapped(cell, w)) for row in rows for cell, w in zip(row, widths, strict=True))
    return widths if highest <= most else None


def _lined_up(row: Row, widths: list[int], is_right: list[bool]) -> Iterator[str]:
    cells = [wrapped(cell, w) for cell, w in zip(row, widths, strict=True)]
    for number in range(max(map(len, cells))):
        parts = []
        for lines, w, right in zip(cells, widths, is_right, strict=True):
            text = lines[number] if number < len(lines) else ""
            space = " " * (w - cell_len(text))
            parts.append(space + text if right else text + space)
        yield (" " * _GAP).join(parts).rstrip()


def _stacked(headers: list[str], rows: Sequence[Row], is_right: list[bool], width: int) -> Iterator[str]:
    """Each row as its first cell, and below it the others with the names of their columns where needed."""
    for first, *rest in rows:
        yield from wrapped(first, width)
        texts = [
            value if not right and " " not in header else f"{header} {value}"
            for header, value, right in zip(headers[1:], rest, is_right[1:], strict=True)
            if value not in ("", "-")
        ]
        room = width - len(_INDENT)
        packed: list[str] = []
        for item in texts:
            if packed and cell_len(packed[-1]) + cell_len(item) + 3 <= room:
                packed[-1] += f"; {item}"
            else:
                packed.append(item)
        for line in ";\n".join(packed).split("\n"):
            yield from (_INDENT + part for part in wrapped(line, room) if part)
