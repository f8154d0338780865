"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
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
    file can be renamed in one step only within a file system.

    Raises:
        PathError: There is no folder for the file.
    """
    if not path.parent.is_dir():  # said of the folder, not of a temporary one in it
        raise PathError(f"{path} cannot be written: there is no folder {path.parent}", path=str(path))
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
        names = sorted((file.name for file in folder.iterdir()), key=lambda name: name == path.name)
        for name in names:
            with open(folder / name, "rb+") as file:
                os.fsync(file.fileno())
        for name in names:
            os.replace(folder / name, path.parent / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
