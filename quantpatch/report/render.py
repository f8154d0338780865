"""Tables as text, the same wherever they go."""

from __future__ import annotations

import io
import shutil
from typing import Any

from rich.console import Console

__all__ = ["as_text"]


def as_text(renderable: Any) -> str:
    """A rich renderable as plain text, as wide as the terminal (at least 100 columns)."""
    width = max(100, shutil.get_terminal_size((120, 24)).columns)
    console = Console(file=io.StringIO(), width=width, no_color=True, force_terminal=False)
    console.print(renderable)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip("\n")
