"""Writes the hooks' own words into ``docs/plugins.md``, between its two markers.

The signatures and docstrings in ``quantpatch/plugins/hookspecs.py`` are the manual; this puts them where
people read. ``python docs/build.py`` rewrites the page, and a test fails as long as it is out of date.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from quantpatch.plugins import hookspecs

PAGE = Path(__file__).with_name("plugins.md")
BEGIN = "<!-- hooks: written by docs/build.py -->"
END = "<!-- end of hooks -->"


def as_markdown(docstring: str) -> str:
    """A Google-style docstring as Markdown: code fenced, sections in bold."""
    lines: list[str] = []
    in_code = False
    for line in inspect.cleandoc(docstring).splitlines():
        if in_code and line and not line.startswith("    "):
            while not lines[-1]:
                lines.pop()
            lines += ["```", ""]
            in_code = False
        if in_code:
            lines.append(line[4:])
        elif line.endswith("::"):
            lines += [line[:-1], "", "```python"]
            in_code = True
        elif section := re.fullmatch(r"(Args|Returns|Raises):", line):
            lines += [f"**{section[1]}**", ""]
        else:
            lines.append(line.strip())
    text = "\n".join(lines).replace("```python\n\n", "```python\n")
    return re.sub(r"(?<!`)``(?!`)", "`", text)


def hooks() -> str:
    """The section about all hooks."""
    parts = []
    for name, function in vars(hookspecs).items():  # in the order of the source
        if name.startswith(f"{hookspecs.PROJECT}_") and inspect.isfunction(function):
            signature = str(inspect.signature(function)).replace("'", "")
            parts.append(f"### `{name}{signature}`\n\n{as_markdown(function.__doc__ or '')}\n")
    return "\n".join(parts)


def built(page: str) -> str:
    """The page with the section as it should be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{hooks()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(built(PAGE.read_text()))
