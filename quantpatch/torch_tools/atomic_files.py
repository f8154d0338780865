"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantpatch.errors import FileError

fcntl: Any = None if sys.platform == "win32" else importlib.import_module("fcntl")

#: What temporary folders beside a file are called, and something after it.
PREFIX = ".quantpatch-"


@contextlib.contextmanager
def written_whole(path: Path, *, companion: str | None = None) -> Iterator[Path]:
    """A block that writes the file ``path.name`` (and what belongs to it) into a folder it is given.

    When the block ends every file in there is moved beside ``path``, ``path`` itself last, so that it is
    complete as soon as it is there. If the block raises, nothing is moved. The folder is a neighbour of
    the file, since a file can be renamed in one step only within a file system; one that a killed process
    left is removed by the next that writes beside it. A file has the permissions and the owner of the one
    that it replaces, or those of any new file, whatever the writer gave it. Of a symbolic link the file
    that it names is replaced.

    Args:
        path: The file.
        companion: Name of a file that may belong to it. If the one there belongs to the file that is
            replaced, which names it, and no new one is written, it is removed.

    Raises:
        FileError: There is no folder for the file, or the path is one, or a device.
    """
    if path.is_dir():
        raise FileError(f"{path} is a folder: give the name of a file in it", path=str(path))
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_file():
        raise FileError(f"{path} is a device or a pipe, which no file can replace", path=str(path))
    if not real.parent.is_dir():  # said of the folder, not of a temporary one in it
        raise FileError(f"{path} cannot be written: there is no folder {real.parent}", path=str(path))
    with _temporary(real.parent) as folder:
        yield folder
        names = sorted((file.name for file in folder.iterdir()), key=lambda name: name == path.name)
        places = {name: real if name == path.name else real.parent / name for name in names}
        stale = None if companion is None or companion in names else real.parent / companion
        if stale is not None and not (stale.is_file() and real.is_file() and _names(real, companion)):
            stale = None
        usual = _mode_of_new_files(folder)
        for name, place in places.items():
            with open(folder / name, "rb+") as file:
                _take_after(place, Path(file.name), usual)
                os.fsync(file.fileno())
        for name, place in places.items():
            os.replace(folder / name, place)
        if stale is not None:
            stale.unlink(missing_ok=True)


def _take_after(old: Path, new: Path, usual: int) -> None:
    """Gives a file the owner and permissions of the one that it is to replace, if there is one."""
    if not old.exists():
        os.chmod(new, usual)
        return
    known, own = old.stat(), new.stat()
    if hasattr(os, "chown") and (known.st_uid, known.st_gid) != (own.st_uid, own.st_gid):
        with contextlib.suppress(OSError):  # not everybody may
            os.chown(new, known.st_uid, known.st_gid)
    os.chmod(new, stat.S_IMODE(known.st_mode))


def _names(file: Path, companion: str | None) -> bool:
    """Whether a file has the name of another in it."""
    assert companion is not None
    return companion.encode() in file.read_bytes()


def _mode_of_new_files(folder: Path) -> int:
    """The permissions that files get here; the umask alone can only be asked by changing it."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A block that fills a new folder, which is given its name when all is in it.

    If the block raises, nothing is left behind.

    Raises:
        FileExistsError: There is something of that name already. It is not touched.
    """
    if os.path.lexists(path):
        raise FileExistsError(path)
    with _temporary(path.parent) as parent:
        draft = parent / path.name
        draft.mkdir()  # with the permissions of any new folder, which the temporary one does not have
        yield draft
        os.rename(draft, path)


@contextlib.contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    folder, lock = temporary_folder(parent, PREFIX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def temporary_folder(parent: Path, prefix: str, *, inherited: bool = False) -> tuple[Path, int | None]:
    """A new folder, with a lock that says that it is in use; those that killed processes left are removed.

    The system takes the lock away from a process that ends, however that happens.

    Args:
        parent: Where to make it.
        prefix: What its name begins with, and those of the ones to be removed.
        inherited: Whether a program that takes this one's place in its process keeps the lock.

    Returns:
        The folder, and the descriptor that holds the lock; None where there are no such locks.
    """
    _remove_abandoned(parent, prefix)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _locked(folder, wait=True)
        if lock is None or folder.is_dir():
            if lock is not None:
                os.set_inheritable(lock, inherited)
            return folder, lock
        os.close(lock)  # before it had its lock another process took it for abandoned


def _locked(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds a lock on a folder; None if another has it, or there is no such thing here."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        # Where standard output is closed its number is free, and is not for a folder: children inherit it.
        high: int = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)
    try:
        fcntl.flock(high, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # in use, or a file system without locks
        os.close(high)
        return None
    return high


def _remove_abandoned(parent: Path, prefix: str) -> None:
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        found = [e.path for e in entries if e.name.startswith(prefix) and e.is_dir(follow_symlinks=False)]
        for path in found:
            lock = _locked(Path(path), wait=False)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def own_version() -> str:
    """The installed version of quantpatch, for metadata."""
    try:
        return version("quantpatch")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
