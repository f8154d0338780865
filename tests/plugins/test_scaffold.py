"""``quantpatch new-plugin``: what it writes, what it refuses, and the walk of an author from there."""

from __future__ import annotations

import json

import pytest
from environments import Environment
from typer.testing import CliRunner

from quantpatch.cli import main
from quantpatch.errors import ArgumentError, FileError
from quantpatch.plugins.hookspecs import API_VERSION
from quantpatch.plugins.scaffold import new_plugin
from quantpatch.torch_tools import atomic_files

FILES = {
    "README.md",
    "pyproject.toml",
    "quantpatch_my_lib/__init__.py",
    "quantpatch_my_lib/float_layers.py",
    "quantpatch_my_lib/layers.py",
    "quantpatch_my_lib/py.typed",
    "tests/test_layers.py",
}


def written(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_complete_distribution_is_written(tmp_path):
    result = CliRunner().invoke(main.app, ["new-plugin", "my-lib", "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "quantpatch-my-lib"
    assert str(folder) in result.output
    assert written(folder) == FILES
    assert list(tmp_path.iterdir()) == [folder]
    for path in folder.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")
        assert "$" not in path.read_text()
    assert 'my-lib = "quantpatch_my_lib"' in (folder / "pyproject.toml").read_text()
    assert (
        f"quantpatch_api = ({API_VERSION}, {API_VERSION})"
        in (folder / "quantpatch_my_lib/__init__.py").read_text()
    )
    assert folder.stat().st_mode & 0o777 == (folder / "tests").stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("MyLib", "mylib"),
        ("quantpatch-mylib", "mylib"),
        ("my lib", "my-lib"),
        ("my_lib", "my-lib"),
        ("-x-", "x"),
        ("../up", "up"),
        ("7seas", "seas"),
        ("", "mylib"),
        ("größe", "gr-e"),
    ],
)
def test_a_name_that_is_none_is_an_error_that_shows_a_good_one(tmp_path, name, good):
    with pytest.raises(ArgumentError) as caught:
        new_plugin(name, tmp_path)
    assert repr(name) in str(caught.value)
    assert str(caught.value).endswith(f"Write: quantpatch new-plugin {good}")
    assert list(tmp_path.iterdir()) == []
    new_plugin(good, tmp_path)


def test_the_name_of_an_installed_plugin_is_refused(tmp_path, plugin):
    plugin("mylib", entries=[])
    with pytest.raises(ArgumentError, match="'mylib' is installed already.*new-plugin my-mylib"):
        new_plugin("mylib", tmp_path)


@pytest.mark.parametrize("what", ["file", "empty folder", "link to nowhere"])
def test_what_exists_is_not_touched(tmp_path, what):
    path = tmp_path / "quantpatch-mylib"
    if what == "file":
        path.write_text("mine")
    elif what == "empty folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(FileError, match="exists already, and nothing in it was touched"):
        new_plugin("mylib", tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileError, match="cannot be written: .*nowhere"):
        new_plugin("mylib", tmp_path / "nowhere")


def test_nothing_is_left_of_a_folder_that_could_not_be_finished(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_files.folder_written_whole(tmp_path / "new") as draft:
        (draft / "half").write_text("done")
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


# --- The walk -------------------------------------------------------------------------------------

USE = """
import os, torch

def use():
    import quantpatch
    from quantpatch_shiny.float_layers import Scorer

    with quantpatch.quantize_modules() as scope:
        layer = Scorer(8, heads=4)
    print(type(layer).__name__, [row.plugin for row in scope.replaced], flush=True)

for blocked in ("", "shiny"):  # in processes of their own, which share what torch takes to import
    if os.fork() == 0:
        os.environ["QUANTPATCH_BLOCK"] = blocked
        try:
            use()
        finally:
            os._exit(0)
    os.wait()
"""


ADAPTED = {
    "float_layers.py": """
import torch
from torch import nn

class Scorer(nn.Module):
    def __init__(self, features, *, heads):
        super().__init__()
        self.table = nn.Parameter(torch.randn(heads, features, features))

    def forward(self, left, right, *, scale):
        return torch.einsum("bi,hij,bj->bh", left, self.table, right) * scale, self.table.shape
""",
    "layers.py": """
from quantpatch import QuantizedLayer
from quantpatch_shiny.float_layers import Scorer

class QuantScorer(QuantizedLayer, Scorer):
    inputs = ("left", "right")
    weights = {"table": 0}
""",
    "__init__.py": """
import quantpatch

@quantpatch.hookimpl
def quantpatch_entries():
    return [("quantpatch_shiny.float_layers", "Scorer", "quantpatch_shiny.layers:QuantScorer")]

@quantpatch.hookimpl
def quantpatch_examples():
    import torch
    from quantpatch_shiny.float_layers import Scorer

    return [
        quantpatch.Example(
            "quantpatch_shiny.float_layers.Scorer",
            build=lambda: Scorer(8, heads=4),
            inputs=lambda: (torch.randn(16, 8), torch.randn(16, 8)),
            keywords={"scale": 0.5},
        )
    ]
""",
}


def test_the_walk_generate_install_test_use_block_uninstall(tmp_path):
    folder = new_plugin("shiny", tmp_path)
    there = Environment(tmp_path / "venv")
    there.pip("install", "--no-index", "--no-deps", "--no-build-isolation", str(folder))

    # The author's tests make all checks; those of the kit that trace are left out here, since they are slow.
    tests = there.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", str(folder / "tests"),
        "--quantpatch-conformance", "--quantpatch-plugin", "shiny",
        "-k", "not compiled and not exported and not onnx",
    )  # fmt: skip
    assert "23 passed, 3 deselected" in tests

    # The author names another layer, of a different kind; the tests stay as they were written. What is
    # installed is written over, which takes no seconds as installing again would.
    (installed,) = there.folder.rglob("quantpatch_shiny")
    for name, source in ADAPTED.items():
        (installed / name).write_text(source)
    adapted = there.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", str(folder / "tests"),
        "-k", "example or block or near",
    )  # fmt: skip
    assert "3 passed, 1 deselected" in adapted

    assert there.run("-c", USE) == "QuantScorer ['shiny']\nScorer []\n"

    there.pip("uninstall", "-y", "quantpatch-shiny")
    listed = json.loads(there.run("-m", "quantpatch", "plugins", "--json"))
    assert "quantpatch.builtin" in {row["name"] for row in listed}
    assert "shiny" not in {row["name"] for row in listed}
