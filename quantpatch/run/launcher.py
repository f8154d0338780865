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

from quantpatch.errors import ScriptError
from quantpatch.run.settings import VARIABLE, RunSettings

__all__ = ["launch"]

#: Set for the first process alone: the one that prints the report.
MAIN_VARIABLE = "QUANTPATCH_RUN_MAIN"

_BOOTSTRAP = Path(__file__).with_name("bootstrap")


def launch(settings: RunSettings, command: Sequence[str], *, module: bool = False) -> NoReturn:
    """Becomes the Python that runs a script in a block.

    Args:
        settings: How to quantize, and what to tell at the end.
        command: The script and its arguments.
        module: Whether ``command`` begins with a module's name instead, as for ``python -m``.

    Raises:
        ScriptError: There is no such script, or this Python takes no notice of the environment.
        QuantPatchError: The block cannot be opened.
    """
    script = command[0]
    if not module and not os.path.exists(script):
        hint = ""
        if not script.endswith(".py") and os.sep not in script:
            hint = f"; for a module write: quantpatch run -m {script}"
        raise ScriptError(f"there is no script {script!r} in {os.getcwd()}{hint}", script=script)
    if sys.flags.ignore_environment:
        raise ScriptError(
            "this Python was started with -I or -E and ignores the environment variables by which the block "
            "reaches the script. Write: python -m quantpatch run ...",
            script=script,
        )
    with settings.scope():  # whatever is wrong with the settings is told here, before anything runs
        pass
    directory = tempfile.mkdtemp(prefix="quantpatch-run-")
    environment = _environment(attrs.evolve(settings, directory=directory))
    python = [sys.executable, *_flags(), *(["-m"] if module else []), *command]
    sys.stdout.flush()
    sys.stderr.flush()
    if sys.platform == "win32":  # there, the caller would not wait for the new process
        raise SystemExit(subprocess.call(python, env=environment))
    os.execve(sys.executable, python, environment)


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
