"""Writes what pages say of the code out of the code itself, between markers in the pages.

=====================  ==========================  ===================================================
marker                 page                        from
=====================  ==========================  ===================================================
``hooks``              ``plugins.md``              signatures and docstrings in ``plugins/hookspecs.py``
``fields``             ``fields.md``               docstrings of ``Recipe`` and ``QuantDescriptor``
``recipes``            ``recipes.md``              the registry
``measured``           ``recipes.md``              ``recipes.json``, which ``benchmarks.recipes`` writes
=====================  ==========================  ===================================================

``python docs/build.py`` rewrites the pages, and a test fails as long as one is out of date.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

import quantpatch as qp
from quantpatch.plugins import hookspecs

DOCS = Path(__file__).parent
BUILTIN = "quantpatch.builtin"


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
    return in_backticks(text)


def in_backticks(text: str) -> str:
    """Names of code as Markdown writes them."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"(?<!`)``(?!`)", "`", text)


def hooks() -> str:
    """The section about all hooks."""
    parts = []
    for name, function in vars(hookspecs).items():  # in the order of the source
        if name.startswith(f"{hookspecs.PROJECT}_") and inspect.isfunction(function):
            signature = str(inspect.signature(function)).replace("'", "")
            parts.append(f"### `{name}{signature}`\n\n{as_markdown(function.__doc__ or '')}\n")
    return "\n".join(parts)


def fields() -> str:
    """A table for each of the two values that say how to quantize."""
    return "\n".join(
        f"## {cls.__name__}\n\n{_table_of_fields(cls)}" for cls in (qp.Recipe, qp.QuantDescriptor)
    )


def _table_of_fields(cls: Any) -> str:
    said = inspect.cleandoc(cls.__doc__).partition("Attributes:\n")[2].partition("\nRaises:")[0]
    meanings = {
        name: " ".join(meaning.split())
        for name, meaning in re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", said, re.MULTILINE | re.DOTALL)
    }
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for field in attrs.fields(cls):
        if field.init:
            meaning = in_backticks(meanings[field.name]).replace("|", "\\|")
            rows.append(f"| `{field.name}` | {_default(cls, field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(cls: Any, field: Any) -> str:
    if field.default is attrs.NOTHING:
        return "-"
    value = getattr(cls(name="x") if cls is qp.Recipe else cls(), field.name)
    if isinstance(value, qp.QuantDescriptor):
        changed = [
            f for f in attrs.fields(qp.QuantDescriptor) if f.init and getattr(value, f.name) != f.default
        ]
        return f"`QuantDescriptor({', '.join(f'{f.name}={getattr(value, f.name)!r}' for f in changed)})`"
    return f"`{value!r}`"


def recipes() -> str:
    """What each recipe means."""
    rows = ["| recipe | activations | weights | bits a weight | for |", "|---|---|---|---|---|"]
    for name, (recipe, plugin) in qp.registry.recipes().items():
        if plugin == BUILTIN:
            bits = qp.registry.format(recipe.weight).bits_with_scale
            cells = (f"`{name}`", _operand(recipe.input), _operand(recipe.weight), f"{bits:g}", recipe.about)
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _operand(descriptor: qp.QuantDescriptor | None) -> str:
    if descriptor is None:
        return "float"
    format = qp.registry.format(descriptor)
    if format.block_size is not None:
        return f"`{format.name}`: a scale for each {format.block_size}, from the tensor"
    ranges = "each output channel" if descriptor.axis == "channel" else "the tensor"
    return f"`{format.name}`, a range for {ranges}"


#: How the models are called, and what is measured of them.
MODELS: Mapping[str, str] = {
    "digits": "digits CNN: accuracy",
    "minilm": "MiniLM: cosine to the float embeddings",
    "efficientnet": "EfficientNet-Lite0: classes as in float",
}


def measured() -> str:
    """What each recipe gives and costs on real models."""
    found = json.loads((DOCS / "recipes.json").read_text())
    models = [model for model in MODELS if model in found]
    rows = [
        f"| | {' | '.join(f'{MODELS[model]} | file' for model in models)} |",
        f"|---|{'---|---|' * len(models)}",
    ]
    for name in found[models[0]]:
        cells = []
        for model in models:
            row = found[model].get(name, {})
            before, after = (_score(row.get(key, "")) for key in ("calibrated", "gptq"))
            cells.append(f"{before}, {after}" if after else before)
            cells.append(f"{row['bytes'] / found[model]['float']['bytes']:.0%}" if "bytes" in row else "")
        label = name if name == "float" else f"`{name}`"
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _score(said: str) -> str:
    return re.sub(r"^(?:cosine|top-1 as in float) |, SQNR .*", "", said)


#: What is written into each page, by its marker.
PAGES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "plugins.md": {"hooks": hooks},
    "fields.md": {"fields": fields},
    "recipes.md": {"recipes": recipes, "measured": measured},
}


def built(page: Path) -> str:
    """The page with its sections as they should be."""
    text = page.read_text()
    for name, write in PAGES[page.name].items():
        begin, end = f"<!-- {name}: written by docs/build.py -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{write()}\n{end}{after}"
    return text


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(built(DOCS / name))
