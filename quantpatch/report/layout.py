"""Lines of a table or a text: cells broken at dots and spaces, or, where it is narrow, rows as a list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.table import Table

_GAP = 2  # between columns
# Lines of a row; a table whose rows are higher is harder to read than a list, the more so a narrow one.
_MOST_LINES, _MOST_LINES_WHERE_WIDE, _WIDE = 3, 12, 100
_INDENT = "    "

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
    if table.title:
        yield from wrapped(str(table.title), total)
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
        yield from wrapped(str(table.caption), total)


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
        told = [
            value if not right and " " not in header else f"{header} {value}"
            for header, value, right in zip(headers[1:], rest, is_right[1:], strict=True)
            if value not in ("", "-")
        ]
        room = width - len(_INDENT)
        packed: list[str] = []
        for item in told:
            if packed and cell_len(packed[-1]) + cell_len(item) + 3 <= room:
                packed[-1] += f"; {item}"
            else:
                packed.append(item)
        for line in ";\n".join(packed).split("\n"):
            yield from (_INDENT + part for part in wrapped(line, room) if part)
