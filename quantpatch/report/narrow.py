"""Tables for a narrow terminal: cells broken at dots and spaces, or rows one below another."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.cells import cell_len
from rich.table import Table

__all__ = ["narrow_lines", "wrapped"]

_GAP = 2  # between columns
_MOST_LINES = 3  # of a row; a table whose rows are higher is harder to read than a list
_INDENT = "    "


def narrow_lines(table: Table, width: int) -> Iterator[str]:
    """The lines of a table, none wider than ``width``.

    Args:
        table: What is to be shown.
        width: Number of columns; words that are wider are cut.
    """
    headers = [str(column.header) for column in table.columns]
    rows = list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))
    is_right = [column.justify == "right" for column in table.columns]
    if table.title:
        yield from wrapped(str(table.title), width)
    widths = _widths([headers, *rows], is_right, width)
    if widths is None:
        yield from _stacked(headers, rows, is_right, width)
    else:
        yield from _lined_up(headers, widths, is_right)
        yield "─" * (sum(widths) + _GAP * (len(widths) - 1))
        for row in rows:
            yield from _lined_up(row, widths, is_right)
    if table.caption:
        yield ""
        yield from wrapped(str(table.caption), width)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width``, broken at spaces, after dots, and elsewhere only within longer words."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for piece in _pieces(paragraph):
            if line and cell_len(line) + cell_len(piece.rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            while cell_len(piece.rstrip()) > width:
                lines.append(piece[:width])
                piece = piece[width:]
            line += piece
        lines.append(line.rstrip())
    return lines


def _pieces(text: str) -> list[str]:
    """What a text may be broken into: words, and names after their dots (not numbers)."""
    return re.findall(r"(?:\d+\.\d\S*|[^\s.]*\.?)\s*", text)[:-1] or [text]


def _widths(rows: list[tuple[str, ...] | list[str]], is_right: list[bool], width: int) -> list[int] | None:
    """Widths of columns that rows fit into with few lines; None if there are none."""
    columns = list(zip(*rows, strict=True))
    whole = [max(map(cell_len, column)) for column in columns]
    least = [
        full if right else max(cell_len(piece.rstrip()) for cell in column for piece in _pieces(cell))
        for column, full, right in zip(columns, whole, is_right, strict=True)
    ]
    spare = width - _GAP * (len(columns) - 1) - sum(least)
    if spare < 0:
        return None
    widths = list(least)
    while spare and widths != whole:
        needy = max(range(len(widths)), key=lambda n: whole[n] / widths[n])
        widths[needy] += 1
        spare -= 1
    highest = max(len(wrapped(cell, w)) for row in rows for cell, w in zip(row, widths, strict=True))
    return widths if highest <= _MOST_LINES else None


def _lined_up(row: tuple[str, ...] | list[str], widths: list[int], is_right: list[bool]) -> Iterator[str]:
    cells = [wrapped(cell, w) for cell, w in zip(row, widths, strict=True)]
    for number in range(max(map(len, cells))):
        parts = []
        for lines, w, right in zip(cells, widths, is_right, strict=True):
            text = lines[number] if number < len(lines) else ""
            space = " " * (w - cell_len(text))
            parts.append(space + text if right else text + space)
        yield (" " * _GAP).join(parts).rstrip()


def _stacked(
    headers: list[str], rows: list[tuple[str, ...]], is_right: list[bool], width: int
) -> Iterator[str]:
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
