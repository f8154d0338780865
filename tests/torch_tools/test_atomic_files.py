"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from quantpatch.errors import FileError
from quantpatch.torch_tools import atomic_files
from quantpatch.torch_tools.atomic_files import written_whole


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


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a folder"), written_whole(tmp_path):
        raise AssertionError("nothing is written")


def write(path: Path, text: str) -> None:
    with written_whole(path) as folder:
        (folder / path.name).write_text(text)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from quantpatch.torch_tools.atomic_files import written_whole
with written_whole(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".quantpatch-")
    write(tmp_path / "other", "whole")
    assert [file.name for file in tmp_path.iterdir()] == ["other"]


def test_a_folder_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    with written_whole(tmp_path / "one") as folder:
        write(tmp_path / "two", "2")
        (folder / "one").write_text("1")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one", "two"]


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in (".hidden", "quantpatch-x", ".quantpatch"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".quantpatch-link").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "new", "new")
    assert len(list(tmp_path.iterdir())) == 6


def test_a_lock_keeps_clear_of_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    """A child inherits descriptors 0 to 2 and would find a folder where its output goes."""
    code = """
import os, sys
from pathlib import Path
from quantpatch.torch_tools import atomic_files
for n in range(3):
    os.close(n)
_, lock = atomic_files.temporary_folder(Path(sys.argv[1]), ".quantpatch-")
os._exit(0 if lock > 2 else 1)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=300).returncode == 0


def test_of_a_link_the_file_that_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / "v1", tmp_path / "latest"
    real.write_text("old")
    link.symlink_to(real)
    write(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert [file.name for file in real.parent.iterdir()] == ["v1"]
    real.unlink()
    write(link, "again")  # a link to what is not there yet
    assert real.read_text() == "again"


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="a device or a pipe"):
        write(tmp_path / "pipe", "new")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_companion_goes_with_the_file_that_names_it(tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    with written_whole(path, companion=data.name) as folder:
        (folder / path.name).write_text("weights are in m.onnx.data")
        (folder / data.name).write_text("large")
    assert data.exists()
    with written_whole(path, companion=data.name) as folder:
        (folder / path.name).write_text("small")
    assert path.read_text() == "small"
    assert not data.exists()
    data.write_text("somebody else's")
    with written_whole(path, companion=data.name) as folder:
        (folder / path.name).write_text("small again")
    assert data.read_text() == "somebody else's"


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "fcntl", None)
    (tmp_path / ".quantpatch-left").mkdir()
    write(tmp_path / "new", "new")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".quantpatch-left", "new"]
