"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from quantpatch.errors import PathError

__all__ = ["folder_written_whole", "own_version", "written_whole"]


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A block that writes the file ``path.name`` (and what belongs to it) into a folder it is given.

    When the block ends every file in there is moved beside ``path``, ``path`` itself last: whoever finds it
    finds it complete. If the block raises, nothing is moved. The folder is a neighbour of the file, since a
    file can be renamed in one step only within a file system. A file has the permissions of the one that it
    replaces, or of any new file, whatever the writer gave it.

    Raises:
        PathError: There is no folder for the file, or the path is one.
    """
    if path.is_dir():
        raise PathError(f"{path} is a folder: give the name of a file in it", path=str(path))
    if not path.parent.is_dir():  # said of the folder, not of a temporary one in it
        raise PathError(f"{path} cannot be written: there is no folder {path.parent}", path=str(path))
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
        names = sorted((file.name for file in folder.iterdir()), key=lambda name: name == path.name)
        usual = _mode_of_new_files(folder)
        for name in names:
            old = path.parent / name
            with open(folder / name, "rb+") as file:
                os.chmod(file.name, stat.S_IMODE(old.stat().st_mode) if old.exists() else usual)
                os.fsync(file.fileno())
        for name in names:
            os.replace(folder / name, path.parent / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    parent = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        draft = parent / path.name
        draft.mkdir()  # with the permissions of any new folder, which the temporary one does not have
        yield draft
        os.rename(draft, path)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def own_version() -> str:
    """The installed version of quantpatch, for metadata."""
    try:
        return version("quantpatch")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
