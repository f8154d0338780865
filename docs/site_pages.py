"""What ``make docs`` adds to the pages that are here: the API reference, and files that lie elsewhere.

A hook of mkdocs. The reference has what the public modules name in ``__all__``; it is read from the source,
so that the site is built without torch.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
MAIN = "https://github.com/quantpatch/quantpatch/blob/main/"
#: Files elsewhere in the repository that are pages of the site.
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "ARCHITECTURE.md": "architecture.md",
    **{
        f"plugins/quantpatch-{name}/README.md": f"plugin-{name}.md"
        for name in ("transformers", "residual", "pytorch-quantization")
    },
}


def public_modules() -> list[str]:
    """Those that the stability policy lists."""
    listed = (ROOT / "docs" / "stability.md").read_text().partition("## What a version")[0]
    return sorted({"quantpatch.errors", *re.findall(r"`(quantpatch\.\w+)`", listed)} - {"quantpatch.__all__"})


def names_of(module: str) -> dict[str, str]:
    """What a front door has in ``__all__``, and the module that each is from."""
    path = ROOT / module.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    origins = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
            return {name: origins.get(name, f"{module}.{name}") for name in ast.literal_eval(node.value)}
    own = [n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name[0] != "_"]
    return {name: f"{module}.{name}" for name in own}


def _origin(path: str) -> str:
    """Where what a name stands for is defined, through the front doors in between."""
    module, _, name = path.rpartition(".")
    if (ROOT / module.replace(".", "/") / "__init__.py").is_file():
        further = names_of(module).get(name, path)
        return path if further == path else _origin(further)
    return path


def reference() -> dict[str, str]:
    """The pages of the reference. What the root has is described there alone."""
    shown: dict[str, str] = {}
    pages = {}
    for module in ["quantpatch", *public_modules()]:
        title = (ast.get_docstring(_tree(module)) or "").partition("\n")[0]
        text = [f"# {module}", in_backticks(title)]
        also = []
        for name, path in sorted(names_of(module).items(), key=lambda item: item[0].lower()):
            origin = _origin(path)
            if origin in shown:
                also.append(f"[`{name}`][{origin}]")
            else:
                shown[origin] = module
                text.append(f"::: {origin}")
        if also:
            text.insert(2, f"Described elsewhere: {', '.join(also)}.")
        pages[f"reference/{module.rpartition('.')[2]}.md"] = "\n\n".join(text) + "\n"
    return pages


def _tree(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def in_backticks(text: str) -> str:
    """Names of code as Markdown writes them."""
    return text.replace("``", "`")


def localized(markdown: str, page: str) -> str:
    """Links to files on GitHub that are pages of the site as links to these."""

    def local(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        goal = ELSEWHERE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if not goal.endswith(".md"):
            return match[0]
        return f"]({posixpath.relpath(goal, posixpath.dirname(page) or '.')}{anchor})"

    return re.sub(rf"\]\({re.escape(MAIN)}([^)#]*)(#[^)]*)?\)", local, markdown)


def absolute(markdown: str, source: str) -> str:
    """Relative links of a file that lies elsewhere as links to GitHub."""
    folder = posixpath.dirname(source)

    def link(match: re.Match[str]) -> str:
        return f"]({MAIN}{posixpath.normpath(posixpath.join(folder, match[1]))}"

    return re.sub(r"\]\((?![a-z]+:|#)([^)\s#]+)", link, markdown)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages."""
    made = {page: absolute((ROOT / source).read_text(), source) for source, page in ELSEWHERE.items()}
    peers = (
        (ROOT / "README.md").read_text().partition("## Features, beside its peers")[2].partition("\n## ")[0]
    )
    made["peers.md"] = f"# Beside its peers\n{peers}\nHow fast each is: [measurements](performance.md).\n"
    for page, text in {**made, **reference()}.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes links lead within the site."""
    return localized(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Lets tables that scroll be reached by keyboard."""
    return html.replace("<table>", '<table tabindex="0">')


def on_post_page(output: str, **_: Any) -> str:
    """Names the theme's search for screen readers."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"', 1)
