"""An extension of griffe, which reads docstrings for the site: they are written for terminals."""

from __future__ import annotations

import re
from typing import Any

import griffe


def as_markdown(text: str) -> str:
    """A Google-style docstring whose paragraphs are Markdown; what its sections are stays to be parsed."""
    lines: list[str] = []
    indent: int | None = None  # of the line that announced the code block that this is in
    for line in text.splitlines():
        own = len(line) - len(line.lstrip())
        if indent is not None and line.strip() and own <= indent:
            while not lines[-1].strip():
                lines.pop()
            lines += [f"{' ' * indent}```", ""]
            indent = None
        if indent is None and line.rstrip().endswith("::"):
            indent = own
            said = line.rstrip()[:-1]
            lines += [*([said, ""] if said.strip() != ":" else []), f"{' ' * own}```python"]
        elif indent is not None:
            if line.strip() or not lines[-1].endswith("```python"):
                lines.append(f"{' ' * indent}{line[indent + 4 :]}" if line.strip() else "")
        else:
            lines.append(line)
    if indent is not None:
        lines.append(f"{' ' * indent}```")
    whole = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", "\n".join(lines))
    return re.sub(r"(?<!`)``(?!`)", "`", whole)


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every object that is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
