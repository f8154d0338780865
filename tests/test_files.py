"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from quantpatch.errors import PathError
from quantpatch.files import written_whole


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    """Whatever its writer gives it: safetensors makes files that nobody else may read."""
    (tmp_path / "usual").touch()
    with written_whole(tmp_path / "new") as folder:
        (folder / "new").write_text("whole")
        (folder / "new").chmod(0o600)
    assert mode(tmp_path / "new") == mode(tmp_path / "usual")
    assert sorted(os.listdir(tmp_path)) == ["new", "usual"]


def test_a_file_keeps_the_permissions_of_the_one_it_replaces(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "old").chmod(0o640)
    with written_whole(tmp_path / "old") as folder:
        (folder / "old").write_text("new")
    assert (tmp_path / "old").read_text() == "new"
    assert mode(tmp_path / "old") == 0o640


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PathError, match="is a folder"), written_whole(tmp_path):
        raise AssertionError("nothing is written")
