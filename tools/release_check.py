"""``make release-check``: whether what is committed here could be released today.

From a clean clone it builds the sdists and wheels of quantpatch and its plugins, looks at what is in them,
installs them into a fresh environment for each Python and torch of the matrix that can be had here, and runs
the demo and the tests against what is installed. Prints a line for each check, with its seconds, and exits
with 1 if one failed.

``python tools/release_check.py --tests "tests/recipes" --only 3.11`` is the short form.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import email
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Python, the file with pins, and which release of torch that is, for the table.
MATRIX = (
    ("3.11", "constraints.txt", "pinned"),
    ("3.10", "constraints-oldest.txt", "oldest"),
    ("3.12", "constraints.txt", "pinned"),
    ("3.13", "constraints.txt", "pinned"),
    ("3.13", None, "newest"),
)
LARGEST_WHEEL = 1 << 20  # bytes
SLOWEST_IMPORT = 1.15  # of torch's own
LICENSES = {"Apache-2.0"}
#: What is in no environment without extras, and what only they bring.
NEEDS_AN_EXTRA = re.compile(
    r"triton|numerics\.kernels|backends\.numba|export\.onnx\.|^quantpatch\.testing|__main__$|sitecustomize"
)

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, quantpatch
failed = {}
for module in pkgutil.walk_packages(quantpatch.__path__, "quantpatch."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = str(error)
print(json.dumps(failed))
"""
WHAT_IT_IMPORTS = """
import sys, quantpatch
extras = "numba sklearn onnx onnxruntime onnxscript safetensors itables jinja2 matplotlib vl_convert"
print(*(name for name in extras.split() if name in sys.modules))
"""


@dataclasses.dataclass(frozen=True)
class Release:
    """What was built.

    Attributes:
        folder: Where everything is.
        clone: The clean clone that it was built from.
        out: The sdists and wheels.
        tests: What to run of the tests; all, if nothing is named.
    """

    folder: Path
    clone: Path
    out: Path
    tests: Sequence[str]

    def wheel(self, project: str) -> Path:
        """The wheel of a project."""
        return next(self.out.glob(f"{project.replace('-', '_')}-[0-9]*.whl"))


class Failed(Exception):
    """A check that did not hold."""


class Checks:
    """Runs checks and keeps what came of each."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def run(self, name: str, check: Callable[[], object]) -> bool:
        """Runs one and prints its line."""
        start = time.perf_counter()
        try:
            said, word = check() or "", "ok"
        except (Failed, subprocess.CalledProcessError) as error:
            output = getattr(error, "output", None) or ""
            said, word = f"{error}\n{output[-3000:]}", "FAILED"
            self.failed.append(name)
        print(f"{word:<7} {name} ({time.perf_counter() - start:.0f} s) {said}", flush=True)
        return word == "ok"


def demand(condition: bool, said: str) -> None:
    """Fails the check that calls it."""
    if not condition:
        raise Failed(said)


def call(*command: object, cwd: Path | None = None, **variables: str) -> str:
    """What a command prints; an error with its output if it fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**environment, **variables}, text=True, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout


class Environment:
    """A fresh virtual environment."""

    def __init__(self, python: str, folder: Path) -> None:
        call(python, "-m", "venv", folder)
        self.folder = folder
        self.python = folder / "bin" / "python"

    def install(self, *what: object, pins: Path | None = None) -> None:
        """Installs packages with pip."""
        constraints = [] if pins is None else ["-c", pins]
        call(self.python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *constraints, *what)


def python_of(version: str) -> str | None:
    """The command of a version of Python that runs here."""
    places = [
        f"python{version}",
        *map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))),
    ]
    for place in places:
        if (found := shutil.which(place)) is not None:
            done = subprocess.run([found, "-c", "import sys; print(*sys.version_info[:2], sep='.')"],
                                  capture_output=True, text=True)  # fmt: skip
            if done.stdout.strip() == version:
                return found
    return None


def build(clone: Path, out: Path, tools: Environment) -> str:
    """An sdist, and of it a wheel, of quantpatch and each plugin."""
    for project in (clone, *plugins(clone)):
        call(tools.python, "-m", "build", "--outdir", out, project)
    return ", ".join(
        f"{path.name} {path.stat().st_size / 1024:.0f} KiB" for path in sorted(out.glob("*.whl"))
    )


def plugins(clone: Path) -> list[Path]:
    """Their folders."""
    return sorted(path.parent for path in clone.glob("plugins/*/pyproject.toml"))


def check_contents(out: Path, clone: Path) -> str:
    """One version everywhere, the licence and the types in each wheel, nothing that is not ours, small."""
    tree = ast.parse((clone / "quantpatch/__init__.py").read_text())
    own = next(ast.literal_eval(n.value) for n in tree.body
               if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__version__")  # fmt: skip
    wheels = sorted(out.glob("*.whl"))
    demand(len(wheels) == 1 + len(plugins(clone)), f"{len(wheels)} wheels")
    for path in wheels:
        demand(path.stat().st_size <= LARGEST_WHEEL, f"{path.name} has {path.stat().st_size:,} bytes")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
            said = email.message_from_bytes(archive.read(metadata))
        demand(
            said["Version"] == own,
            f"{path.name}: version {said['Version']}, and quantpatch.__version__ is {own}",
        )
        demand(said["License-Expression"] in LICENSES, f"{path.name}: licence {said['License-Expression']}")
        demand(any(n.endswith("licenses/LICENSE") for n in names), f"{path.name} has no LICENSE")
        demand(any(n.endswith("py.typed") for n in names), f"{path.name} has no py.typed")
        demand(bool(said.get_all("Project-URL")), f"{path.name} has no addresses")
        strange = [
            n for n in names if n.endswith((".js", ".css", ".so", ".pyc", ".ttf", ".woff2")) or "/tests/" in n
        ]
        strange = [n for n in strange if "scaffold/template" not in n]
        demand(not strange, f"{path.name} has {strange}")
    for path in out.glob("*.tar.gz"):
        with tarfile.open(path) as archive:
            demand(any(n.name.endswith("/LICENSE") for n in archive), f"{path.name} has no LICENSE")
    return f"version {own}; wheels have nothing of others: scripts of the report page are read from itables"


def check_without_extras(bare: Environment) -> str:
    """Every module is imported where no extra is installed."""
    failed = json.loads(call(bare.python, "-I", "-W", "ignore", "-c", IMPORT_EVERYTHING).splitlines()[-1])
    missing = {name: said for name, said in failed.items() if not NEEDS_AN_EXTRA.search(name)}
    demand(not missing, f"without extras these do not import: {missing}")
    return f"{len(failed)} modules are for an extra alone"


def check_extras(there: Environment) -> None:
    """Where extras are installed they are imported when they are used."""
    found = call(there.python, "-I", "-W", "ignore", "-c", WHAT_IT_IMPORTS).strip()
    demand(not found, f"import quantpatch imports {found}")


def import_time(python: Path, statement: str) -> float:
    """Seconds of user time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([python, "-I", "-c", statement], check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def check_import_time(bare: Environment, rounds: int = 5) -> str:
    """Importing quantpatch beside importing torch, in turns, in user time."""
    for statement in ("import torch", "import quantpatch"):  # bytecode is written
        import_time(bare.python, statement)
    pairs = [
        [import_time(bare.python, f"import {name}") for name in ("torch", "quantpatch")]
        for _ in range(rounds)
    ]
    ratio = statistics.median(own / torch for torch, own in pairs)
    torch, own = (statistics.median(column) for column in zip(*pairs, strict=True))
    said = f"torch {torch:.2f} s, quantpatch {own:.2f} s, ratio {ratio:.3f} (at most {SLOWEST_IMPORT})"
    demand(ratio <= SLOWEST_IMPORT, said)
    return said


def check_demo(there: Environment, folder: Path) -> str:
    """The demo of what is installed."""
    text = call(there.folder / "bin" / "quantpatch", "demo", cwd=folder, COLUMNS="100")
    row = next(line for line in text.splitlines() if line.startswith("in ONNX Runtime"))
    return " ".join(row.split())


def check_tests(there: Environment, release: Release, folder: Path, with_plugins: list[Path]) -> str:
    """The tests, where nothing of the packages lies beside them."""
    clone, tests = release.clone, release.tests
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    for package in ("quantpatch", "pytest_quantpatch.py"):
        there_now = folder / package
        shutil.rmtree(there_now) if there_now.is_dir() else there_now.unlink()
    for plugin in plugins(folder):
        for package in plugin.iterdir():
            if package.is_dir() and package.name != "tests":
                shutil.rmtree(package)
    where = list(tests) or ["tests", *(str(p.relative_to(clone) / "tests") for p in with_plugins)]
    found = call(there.python, "-c", "import quantpatch; print(quantpatch.__file__)", cwd=folder).strip()
    demand(str(there.folder) in found, f"quantpatch is imported from {found}")
    options = ("-q", "-n", "2", "-p", "no:cacheprovider", "-m", "not checkout")
    text = call(there.python, "-m", "pytest", *options, *where, cwd=folder)
    return text.strip().splitlines()[-1].strip("= ")


def main() -> None:
    """Runs the checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="a Python of the matrix, such as 3.11; several times")
    parser.add_argument("--tests", default="", help="what to run of the tests, instead of all")
    parser.add_argument("--keep", type=Path, help="where to put the sdists and wheels")
    given = parser.parse_args()
    checks = Checks()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="release-") as name:
        folder = Path(name)
        clone, out = folder / "clone", (given.keep or folder / "dist").resolve()
        call("git", "clone", "-q", "--no-hardlinks", ROOT, clone)
        changed = call("git", "-C", ROOT, "status", "--porcelain").strip()
        if changed:
            print("note    what is not committed is not in the clone")
        tools = Environment(sys.executable, folder / "tools")
        tools.install("build>=1.2", "twine>=6.1")
        out.mkdir(exist_ok=True)
        if not checks.run("sdists and wheels", lambda: build(clone, out, tools)):
            sys.exit(1)
        files = sorted(out.glob("*"))
        checks.run(
            "metadata and README", lambda: call(tools.python, "-m", "twine", "check", "--strict", *files)[:0]
        )
        checks.run("what is in them", lambda: check_contents(out, clone))
        release = Release(folder, clone, out, given.tests.split())
        left_out = []
        for version, pins, kind in MATRIX:
            label = f"Python {version}, {kind} torch"
            python = python_of(version)
            if python is None or (given.only and version not in given.only):
                left_out.append(label)
            else:
                check_environment(checks, release, python, label, None if pins is None else clone / pins)
        if left_out:
            print(f"left out: {', '.join(left_out)}")
    print(f"{len(checks.failed)} failed, {time.perf_counter() - start:.0f} s")
    sys.exit(bool(checks.failed))


def check_environment(checks: Checks, release: Release, python: str, label: str, pins: Path | None) -> None:
    """What is checked for a Python and a torch."""
    number = len(list(release.folder.glob("run*")))
    run = release.folder / f"run{number}"
    run.mkdir()
    there = Environment(python, release.folder / f"env{number}")
    # transformers that its plugin knows does not install in Python 3.10.
    fits = [
        p for p in plugins(release.clone) if not ("3.10" in label and p.name == "quantpatch-transformers")
    ]

    def install_bare() -> str:
        there.install("torch", pins=pins)
        there.install(release.wheel("quantpatch"), pins=pins)
        return call(
            there.python, "-W", "ignore", "-c", "import torch; print('torch', torch.__version__)"
        ).strip()

    def install_all() -> None:
        projects = ["quantpatch", *(p.name for p in fits)]
        there.install(*(f"{release.wheel(project)}[dev]" for project in projects), pins=pins)

    if checks.run(f"{label}: installed without extras", install_bare):
        checks.run(f"{label}: every module without extras", lambda: check_without_extras(there))
        if number == 0:
            checks.run(f"{label}: import time", lambda: check_import_time(there))
        if checks.run(f"{label}: installed with plugins and extras", install_all):
            checks.run(f"{label}: nothing imports an extra", lambda: check_extras(there))
            checks.run(f"{label}: demo", lambda: check_demo(there, run))
            checks.run(f"{label}: tests", lambda: check_tests(there, release, run / "tree", fits))
    shutil.rmtree(there.folder)


if __name__ == "__main__":
    main()
