"""Tables as text, the same wherever they go."""

from __future__ import annotations

import io
import shutil
from typing import Any

from rich.console import Console

__all__ = ["as_percent", "as_text"]


def as_text(renderable: Any) -> str:
    """A rich renderable as plain text, as wide as the terminal (at least 100 columns)."""
    width = max(100, shutil.get_terminal_size((120, 24)).columns)
    console = Console(markup=False, file=io.StringIO(), width=width, no_color=True, force_terminal=False)
    console.print(renderable)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip("\n")


def as_percent(share: float) -> str:
    """A share with one decimal, which says 0.0% of nothing and 100.0% of all alone."""
    shown = f"{share:.1%}"
    if shown == "100.0%" and share < 1:
        return ">99.9%"
    return "<0.1%" if shown == "0.0%" and share > 0 else shown
