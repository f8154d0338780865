"""The matrix: the tests with other Pythons and other releases of torch, and against what is installed.

``nox -l`` lists the sessions, ``nox -s wheel`` runs one. Each makes an environment of its own; what is found
here before a release is in RELEASING.md. For daily work `make` is enough.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["tests", "wheel"]

PLUGINS = sorted(path.parent for path in Path("plugins").glob("*/pyproject.toml"))
NEWER = "3.11"  # the oldest Python for which there is transformers that its plugin knows


def projects(session: nox.Session) -> list[Path]:
    """What can be installed in this Python."""
    fits = not isinstance(session.python, str) or session.python.split(".") >= NEWER.split(".")
    return [Path(), *(p for p in PLUGINS if fits or p.name != "quantpatch-transformers")]


def editable(session: nox.Session) -> list[str]:
    """Options of pip that install them as they lie here."""
    return [part for project in projects(session) for part in ("-e", f"./{project}[dev]")]


def install(session: nox.Session, constraints: str | None, *what: str) -> None:
    """Torch first and pinned: with it in place no later requirement brings another build of it."""
    pins = ["-c", constraints] if constraints else []
    session.install(*pins, "torch")
    session.install(*pins, *what)


def run_tests(session: nox.Session) -> None:
    """As many at a time as there are cores; what stands behind ``--`` goes to pytest instead."""
    where = ["tests", *(str(project) for project in projects(session)[1:])]
    session.run("python", "-m", "pytest", "-n", "auto", "-q", *(session.posargs or ["--all", *where]))


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """All tests with the pinned releases."""
    install(session, "constraints.txt", *editable(session))
    run_tests(session)


@nox.session(python="3.10")
def oldest(session: nox.Session) -> None:
    """All tests with the oldest releases that the requirements allow."""
    install(session, "constraints-oldest.txt", *editable(session))
    run_tests(session)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """All tests with the newest release of everything, as a user gets it who installs today."""
    install(session, None, *editable(session), "torchao")  # which ``lower`` needs from PyTorch 2.14 on
    run_tests(session)


@nox.session(python="3.11")
def wheel(session: nox.Session) -> None:
    """The plugins' tests against quantpatch as it is released: its wheel, out of sight of the checkout."""
    out = Path(session.create_tmp()).resolve()
    shutil.rmtree(out / "dist", ignore_errors=True)
    session.install("build")
    for project in [Path(), *PLUGINS]:
        session.run("python", "-m", "build", "--outdir", str(out / "dist"), str(project))
    wheels = {path.name.split("-")[0]: path for path in (out / "dist").glob("*.whl")}
    install(session, "constraints.txt", *(f"{path}[dev]" for path in wheels.values()))
    # Nothing of the packages lies beside the tests, so that only what is installed can be imported.
    shutil.rmtree(out / "plugins", ignore_errors=True)
    (out / "tests").mkdir(exist_ok=True)
    shutil.copy("tests/test_docs.py", out / "tests")
    shutil.copy("README.md", out)
    for plugin in PLUGINS:
        shutil.copytree(plugin / "tests", out / plugin / "tests")
        shutil.copy(plugin / "README.md", out / plugin)
    for plugin in PLUGINS:
        with session.chdir(out / plugin):
            session.run("python", "-m", "pytest", "-n", "auto", "-q", *session.posargs, "tests")


@nox.session(python="3.11")
def coverage(session: nox.Session) -> None:
    """Which lines no test reaches, in the terminal and as htmlcov/."""
    install(session, "constraints.txt", "coverage[toml]", *editable(session))
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "-q", *session.posargs)
    session.run("coverage", "combine", success_codes=[0, 1])
    session.run("coverage", "report", "--skip-covered", "--show-missing")
    session.run("coverage", "html", "-q")
