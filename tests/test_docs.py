"""What the pages say is true: their Python runs and prints what they show, and nothing is out of date."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quantpatch.plugins import hookspecs
from quantpatch.recipes import BUILTIN_RECIPES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their code is run by the tests of the plugins: the packages they are for have ways of their own with torch.
PLUGIN_PAGES = sorted(ROOT.glob("plugins/*/README.md"))

# A fenced block, and whether the comment before it says to leave it alone.
BLOCK = re.compile(r"(<!-- no-run -->\n+)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Each Python block with its first line and the output that the page shows right after it, or None."""
    text = page.read_text()
    found = list(BLOCK.finditer(text))
    for block, following in itertools.zip_longest(found, found[1:]):
        if block[2] != "python" or block[1]:
            continue
        shown = None
        if following is not None and following[2] == "text" and not following[1]:
            between = text[block.end() : following.start()]
            shown = following[3] if not between.strip() else None
        yield text[: block.start(3)].count("\n"), block[3], shown


def with_code(page):
    """Whether a page has code that is run here: a plugin's tests run what is about the plugin."""
    return "<!-- run by the tests of " not in page.read_text() and any(True for _ in blocks(page))


@pytest.fixture
def _one_thread():
    """The models on the pages are so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("page", list(filter(with_code, PAGES)), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_runs_and_prints_what_the_page_shows(page, monkeypatch, capsys, tmp_path):
    for package in re.findall(r"<!-- needs: (\w+) -->", page.read_text()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    module = ModuleType(f"page_{page.stem}")  # classes on a page can be pickled and named in entries
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code, shown in blocks(page):
        capsys.readouterr()
        # Empty lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), module.__dict__)
        printed = [row.rstrip() for row in capsys.readouterr().out.splitlines()]
        if shown is not None:
            assert printed == [row.rstrip() for row in shown.splitlines()], f"{page.name}:{line}"


# PyPI shows these pages as well, where a link to a neighbouring file leads nowhere.
PUBLISHED = [ROOT / "README.md", *PLUGIN_PAGES]
HERE = re.compile(
    r"https://(?:github\.com/quantpatch/quantpatch/(?:blob|tree)|raw\.githubusercontent\.com/quantpatch/quantpatch)/main/(.*)"
)


def links(page):
    """The target of each link and image on the page."""
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text())


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.checkout
@pytest.mark.parametrize("page", [*PAGES, *PLUGIN_PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_and_its_heading_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        if mine := HERE.fullmatch(path):
            target = ROOT / mine[1]
        elif "://" in path:
            continue
        else:
            target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PUBLISHED, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_that_pypi_shows_have_absolute_links_only(page):
    assert [link for link in links(page) if not link.startswith(("https://", "#"))] == []


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["plugins.md", "fields.md", "recipes.md"])
def test_what_pages_say_of_the_code_is_made_of_the_code_as_it_is(build, name):
    page = ROOT / "docs" / name
    assert page.read_text() == build.built(page), "out of date; write: python docs/build.py"


def test_the_manual_has_every_hook(build):
    names = [name for name in hookspecs.__all__ if name.startswith("quantpatch_")]
    assert names
    assert [name for name in names if f"### `{name}(" not in (ROOT / "docs" / "plugins.md").read_text()] == []


def test_the_recipes_that_were_measured_are_those_that_come_along():
    found = json.loads((ROOT / "docs" / "recipes.json").read_text())
    assert found
    assert all(rows.keys() == {"float", *BUILTIN_RECIPES} for rows in found.values())


def test_the_site_has_every_page_in_its_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r": ([\w/-]+\.md)$", nav, re.MULTILINE)
    assert len(listed) == len(set(listed))
    here = {page.name for page in (ROOT / "docs").glob("*.md")}
    made = {*re.findall(r'"([\w-]+\.md)"', (ROOT / "docs" / "site_pages.py").read_text()), "plugins.md"}
    made |= {name for name in listed if name.startswith(("reference/", "plugin-"))}
    assert here <= set(listed) <= here | made
