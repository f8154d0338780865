"""What is released: an sdist that makes the same wheel, and a wheel that works without the checkout."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from environments import Environment

ROOT = Path(__file__).resolve().parent.parent

USE = """
import quantpatch as qp, torch
from pathlib import Path
from torch import nn

assert Path(qp.__file__).is_relative_to({folder!r}), qp.__file__
with qp.quantize_modules(recipe="int8"):
    model = nn.Sequential(nn.Linear(8, 4))
qp.calibrate(model, [torch.randn(2, 8)], progress=False)
ours = [plugin.name for plugin in qp.registry.plugins() if plugin.distribution == "quantpatch"]
print(type(model[0]).__module__, ours)
"""


def hatchling(folder: Path, target: str, out: Path) -> Path:
    """Builds what a release uploads, as a front end would, without one."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return hatchling(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (there,) = folder.iterdir()
    return there


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    return hatchling(unpacked, "wheel", tmp_path_factory.mktemp("wheel"))


def package_files(folder):
    files = (path for path in (folder / "quantpatch").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.mark.checkout
def test_the_wheel_that_the_sdist_makes_has_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert names == {*package_files(ROOT), "pytest_quantpatch.py"}


def test_the_sdist_has_what_its_tests_need(unpacked):
    for name in (
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "conftest.py",
        "tests/test_distribution.py",
        "docs/index.md",
    ):
        assert (unpacked / name).exists(), name


@pytest.mark.checkout
def test_the_wheel_is_installed_and_works_and_is_taken_away(wheel, tmp_path):
    there = Environment(tmp_path / "venv")
    there.pip("install", "--no-index", "--no-deps", str(wheel))
    printed = there.run("-c", USE.format(folder=str(tmp_path)))
    assert printed == "quantpatch.layers.linear ['quantpatch.builtin']\n"
    assert "QuantLinear" in there.run("-m", "quantpatch", "explain", "torch.nn.Linear")
    there.pip("uninstall", "-y", "quantpatch")


@pytest.mark.parametrize("folder", sorted(ROOT.glob("plugins/*/")), ids=lambda folder: folder.name)
def test_each_plugins_sdist_makes_a_wheel_with_its_packages(folder, tmp_path):
    source = hatchling(folder, "sdist", tmp_path / "sdist")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (there,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(hatchling(there, "wheel", tmp_path / "wheel")) as archive:
        names = set(archive.namelist())
    ours = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if "tests" not in path.relative_to(folder).parts and "__pycache__" not in path.parts
    }
    assert ours <= names
