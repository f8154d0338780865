"""The block of one process under ``quantpatch run``."""

from __future__ import annotations

import atexit
import os
import sys
from multiprocessing import util
from pathlib import Path

from quantpatch.errors import QuantPatchError, shown
from quantpatch.run.models import WatchedModels
from quantpatch.run.report import Part, left_in, report
from quantpatch.run.settings import VARIABLE, RunSettings
from quantpatch.torch_tools.atomic_files import written_whole


class Session:
    """Opens the block, and leaves its report when the process ends.

    Args:
        settings: How to quantize, and where to leave it.
        is_main: Whether this is the first process.
    """

    def __init__(self, settings: RunSettings, *, is_main: bool) -> None:
        self.settings = settings
        self._is_main = is_main
        self._scope = settings.scope().start()
        self._models = self._watched()

    def _watched(self) -> WatchedModels | None:
        settings, rules = self.settings, self.settings.rules()
        if not (settings.audit or settings.report or settings.calibrate or rules or settings.operations):
            return None
        return WatchedModels(
            settings.calibrate,
            settings.calibration,
            audit=settings.audit,
            page=self._page(),
            rules=rules,
            operations=settings.quantize_operations if settings.operations else None,
        )

    def _page(self) -> Path | None:
        """Where the page about the first model goes; of other processes beside the first one's."""
        path = Path(self.settings.report)
        if not self.settings.report:
            return None
        return (
            path if self._is_main else path.with_stem(f"{path.stem}-{_name_of_process().replace(' ', '-')}")
        )

    def part(self) -> Part:
        """What this process reports."""
        notes, audits = ((), ()) if self._models is None else (self._models.notes(), self._models.audits())
        return Part(
            process=_name_of_process(),
            replaced=[[r.target, r.replacement, r.plugin, r.count] for r in self._scope.replaced],
            skipped=[[s.target, s.reason, s.count] for s in self._scope.skipped],
            notes=list(notes),
            audits=list(audits),
        )

    def close(self) -> Part:
        """Ends the block; what it reports."""
        part = self.part()
        self._scope.stop()
        if self._models is not None:
            self._models.close()
        return part

    def leave(self) -> None:
        """Ends the block and leaves its report for the first process, if that is still there."""
        part, directory = self.close(), Path(self.settings.directory)
        if part and directory.is_dir():
            with written_whole(directory / f"{os.getpid()}.json") as folder:
                (folder / f"{os.getpid()}.json").write_text(part.to_json())


def _name_of_process() -> str:
    rank = os.environ.get("RANK")
    return f"rank {rank}" if rank is not None else f"process {os.getpid()}"


current: Session | None = None


def start(is_main: bool) -> None:
    """Opens the block of this process, as the environment says.

    Args:
        is_main: Whether this is the first process: it prints at the end instead of leaving it.
    """
    global current
    # Once: a script may change its environment as it likes.
    try:
        settings = RunSettings.from_json(os.environ[VARIABLE])
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        # Nothing that the command wrote. The script runs; `import torch` must not fail.
        _say(f"{VARIABLE} cannot be read ({shown(error)}); what this process builds stays float")
        return
    try:
        current = Session(settings, is_main=is_main)
    except QuantPatchError as error:  # the command had no such trouble: another environment, say
        _say(f"the block cannot be opened: {error}")
        raise SystemExit(2) from None
    if not is_main:
        _leave_at_the_end()
    # Children that multiprocessing makes end without the handlers of atexit, and begin with no finalizers.
    util.register_after_fork(leave, lambda leave: util.Finalize(None, leave, exitpriority=0))
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_begin_again)


def _say(what: str) -> None:
    if sys.stderr is not None:  # print would take standard output instead
        print(f"quantpatch run: {what}", file=sys.stderr)


def _leave_at_the_end() -> None:
    atexit.register(leave)
    util.Finalize(None, leave, exitpriority=0)


def report_all(directory: str) -> None:
    """Prints what all processes report; this one, the first, ends its block."""
    global current
    session, current = current, None
    if session is None:
        report(left_in(directory), models=False)
        return
    settings = session.settings
    report(
        [session.close(), *left_in(directory)],
        models=bool(settings.calibrate or settings.audit or settings.report),
    )


def leave() -> None:
    """Ends this process's block and leaves its report, once."""
    global current
    session, current = current, None
    if session is not None:
        session.leave()


def _begin_again() -> None:
    """In a fork: a block of its own, so that nothing is reported twice."""
    global current
    if current is None:
        return
    current.close()
    current = Session(current.settings, is_main=False)
    atexit.register(leave)
