"""The first code of every Python process under ``quantpatch run``.

Python imports it by itself, from ``PYTHONPATH``. It costs a process that never imports torch next to
nothing: the block is opened once torch is there.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent


def _make_way() -> None:
    """Leaves ``sys.path`` as the script expects it, and runs the ``sitecustomize`` that this one hides."""
    sys.path[:] = [item for item in sys.path if not item or Path(item).resolve() != HERE]
    own = sys.modules.pop(__name__)
    try:
        importlib.import_module(__name__)
    except ModuleNotFoundError as error:
        if error.name != __name__:
            raise
    finally:
        sys.modules.setdefault(__name__, own)


def _start(is_main: bool) -> None:
    try:
        importlib.import_module("quantpatch.run.session").start(is_main)
    except ModuleNotFoundError as error:
        if error.name != "quantpatch":
            raise
        _say(f"{sys.executable} has no quantpatch; what it builds stays float")


def _say(what: str) -> None:
    if sys.stderr is not None:  # print would take standard output instead
        print(f"quantpatch run: {what}", file=sys.stderr)


def _by_path(file: Path) -> Any:
    """A module of quantpatch alone: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location(f"_quantpatch_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _watch(is_main: bool) -> Callable[[], None]:
    """Opens the block as soon as torch has been imported; returns what ends the watch."""
    pid = os.getpid()
    if "torch" in sys.modules:
        _start(is_main)
        return lambda: None
    import_watch = _by_path(HERE.parent.parent / "interception" / "import_watch.py")

    def imported(module: ModuleType) -> None:
        watch.stop()
        _start(is_main and os.getpid() == pid)  # a fork of the first process reports nothing itself

    watch = import_watch.ImportWatch(["torch"], imported)
    watch.start()
    stop: Callable[[], None] = watch.stop
    return stop


def _report_at_the_end(settings: dict[str, Any], stop_watch: Callable[[], None]) -> None:
    """In the first process, as the very last thing: what was registered first is called last."""
    pid, directory = os.getpid(), settings["directory"]

    def report_all() -> None:
        if os.getpid() != pid:  # a fork of it
            return
        stop_watch()
        try:
            with contextlib.suppress(KeyboardInterrupt):
                if "quantpatch.run.session" in sys.modules:
                    importlib.import_module("quantpatch.run.session").report_all(directory)
                elif os.path.isdir(directory) and os.listdir(directory):
                    report = _by_path(HERE.parent / "report.py")
                    watched = bool(settings["calibrate"] or settings["audit"])
                    report.report(report.left_in(directory), models=watched)
                else:
                    _say("no process imported torch, so that nothing was quantized")
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(report_all)


def _begin() -> None:
    settings = os.environ.get("QUANTPATCH_RUN")
    if settings is None:
        return
    is_main = os.environ.pop("QUANTPATCH_RUN_MAIN", None) is not None
    stop_watch = _watch(is_main)
    if is_main:
        import json  # a few milliseconds that the other processes need not spend

        with contextlib.suppress(ValueError):  # it is reported where torch is imported
            _report_at_the_end(json.loads(settings), stop_watch)


if __name__ == "sitecustomize":  # imported by Python itself, not looked at by a tool
    _make_way()
    _begin()
