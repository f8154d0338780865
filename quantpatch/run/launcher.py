"""From the command ``quantpatch run`` to the Python that runs the script."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import attrs

from quantpatch.errors import FileError, UnknownNameError
from quantpatch.plugins.registry import registry
from quantpatch.recipes.descriptor import Recipe
from quantpatch.run.settings import VARIABLE, RunSettings
from quantpatch.torch_tools.atomic_files import temporary_folder

#: Set for the first process alone: the one that prints the report.
MAIN_VARIABLE = "QUANTPATCH_RUN_MAIN"

_BOOTSTRAP = Path(__file__).with_name("bootstrap")


def launch(settings: RunSettings, command: Sequence[str], *, module: bool = False) -> NoReturn:
    """Becomes the Python that runs a script in a block.

    Args:
        settings: How to quantize, and what to report at the end.
        command: The script and its arguments; ``-`` is a script that comes from the standard input.
        module: Whether ``command`` begins with a module's name instead, as for ``python -m``.

    Raises:
        FileError: There is no such script, or this Python ignores the environment.
        QuantPatchError: The block cannot be opened.
    """
    script = command[0]
    if not module and script != "-" and not os.path.exists(script):
        hint = ""
        if not script.endswith(".py") and os.sep not in script:
            hint = f"; for a module write: quantpatch run -m {script}"
        raise FileError(f"there is no script {script!r} in {os.getcwd()}{hint}", path=script)
    if sys.flags.ignore_environment:
        raise FileError(
            "this Python was started with -I or -E and ignores the environment variables by which the block "
            "reaches the script. Write: python -m quantpatch run ...",
            path=script,
        )
    _try(settings)
    directory, _ = temporary_folder(Path(tempfile.gettempdir()), "quantpatch-run-", inherited=True)
    environment = _environment(attrs.evolve(settings, directory=str(directory)))
    python = [sys.executable, *_flags(), *(["-m"] if module else []), *command]
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed, as under cron or in a daemon
            stream.flush()
    if sys.platform == "win32":  # there, the caller would not wait for the new process
        raise SystemExit(subprocess.call(python, env=environment))
    os.execve(sys.executable, python, environment)


def _try(settings: RunSettings) -> None:
    """Opens and closes the block: what is wrong with the settings is reported here, before anything runs."""
    for name in ("method", "weight_method"):
        if (method := settings.calibration.get(name)) is not None:
            registry.calibrator(method)
    try:
        with settings.scope():
            pass
    except UnknownNameError as error:
        if error.kind != "layer in skip" or error.name in registry.named("quantpatch_recipes", Recipe):
            raise
        raise UnknownNameError.of(
            error.kind,
            error.name,
            error.known,
            "--skip takes names of classes, which `quantpatch layers` lists. By its name in the model a "
            f"layer is left float by a rule of a recipe: qp.Recipe(name='mine', rules="
            f"{{{error.name!r}: None}}), which a plugin returns from its hook quantpatch_recipes, and "
            f"--recipe mine",
        ) from None


def _environment(settings: RunSettings) -> dict[str, str]:
    environment = dict(os.environ)
    path = [item for item in environment.get("PYTHONPATH", "").split(os.pathsep) if item]
    if str(_BOOTSTRAP) not in path:
        path.insert(0, str(_BOOTSTRAP))
    environment["PYTHONPATH"] = os.pathsep.join(path)
    environment[VARIABLE] = settings.to_json()
    environment[MAIN_VARIABLE] = "1"
    return environment


def _flags() -> list[str]:
    """This Python's own options, for the next one."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    if getattr(sys.stdout, "write_through", False):
        flags.append("-u")
    return flags
