"""What notebooks show: whether the code runs in one, and tables of rich as HTML."""

from __future__ import annotations

import io
from typing import Any

# What a cell of a notebook has room for; tables that are narrower are no wider than they need.
_WIDTH = 140
_FORMAT = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',consolas,'Courier New',monospace\">{code}</pre>"
)


def in_notebook() -> bool:
    """Whether what is displayed lands in a notebook."""
    from rich.console import Console

    return Console().is_jupyter


def as_html(renderable: Any) -> str:
    """What rich can show, as HTML; names in it are escaped, and not taken for markup.

    Args:
        renderable: A table, a text, a group of these, or what gives one to rich.
    """
    from rich.console import Console

    console = Console(
        file=io.StringIO(), record=True, width=_WIDTH, force_jupyter=False, markup=False, emoji=False,
        highlight=False, legacy_windows=False,
    )  # fmt: skip
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_FORMAT)
