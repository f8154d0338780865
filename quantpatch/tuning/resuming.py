"""What a tuning has done so far, in files of a folder, so that another that is like it can go on from there.

After each block whose weights are rounded for good, and after each method, a file gets what has changed since
the one before: parameters, ranges and factors at inputs, and what is to be reported. Each is a safetensors
file that is written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from quantpatch.errors import FileError, shown
from quantpatch.torch_tools.atomic_files import own_version, written_whole
from quantpatch.torch_tools.extras import safetensors_for


@attrs.frozen
class Record:
    """What one file has.

    Attributes:
        step: The number of the method.
        is_finished: Whether the method had done all that it does.
        tuned: What it had tuned by then: arguments of ``Tuned``, by name.
        skipped: What it had not, and why.
        rounded: The names of the parameters that it had rounded.
        zero_points: Of quantizers, by name; None for those that have none any more.
        tensors: ``parameter:``, ``range:`` or ``factor:`` and a name; an empty range is not known any more.
    """

    step: int
    is_finished: bool
    tuned: Mapping[str, Mapping[str, Any]]
    skipped: Mapping[str, str]
    rounded: tuple[str, ...]
    zero_points: Mapping[str, int | None]
    tensors: Mapping[str, Tensor]


class Records:
    """The files of one tuning.

    Args:
        folder: The folder; it is made if there is none.
        fingerprint: Of the model as it was given, and of what is done to it.

    Attributes:
        known: What the files have, in their order.

    Raises:
        FileError: It is no folder, or a file in it is damaged, or of another model or other methods.
        MissingExtraError: safetensors is not installed.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder, self._fingerprint = folder, fingerprint
        self._safetensors = safetensors_for("tune(resume=...)")
        if folder.exists() and not folder.is_dir():
            raise FileError(f"resume={str(folder)!r} is a file: name a folder", path=str(folder))
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise FileError(f"resume={str(folder)!r} cannot be made: {error}", path=str(folder)) from error
        paths = sorted(folder.glob("[0-9]*.safetensors"))
        if paths != [self._path(number) for number in range(len(paths))]:
            raise FileError(f"{folder} lacks some of its files, or has others: empty it", path=str(folder))
        self.known: list[Record] = [self._read(path) for path in paths]
        self._count = len(self.known)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06}.safetensors"

    def _read(self, path: Path) -> Record:
        try:
            with self._safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            fingerprint = metadata["fingerprint"]
            said = json.loads(metadata["tuning"])
            record = Record(**{**said, "rounded": tuple(said["rounded"])}, tensors=tensors)
        except (self._safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(
                f"{path} holds nothing that tune has kept: {type(error).__name__}: {shown(error)}",
                path=str(path),
            ) from error
        if fingerprint != self._fingerprint:
            raise FileError(
                f"{path} is of another model, or of other methods, options, ranges or seed; empty the "
                f"folder to begin anew",
                path=str(path),
            )
        return record

    def put(self, record: Record) -> None:
        """Writes a file."""
        path = self._path(self._count)
        said = attrs.asdict(record, filter=lambda field, _: field.name != "tensors")
        metadata = {
            "quantpatch": own_version(),
            "fingerprint": self._fingerprint,
            "tuning": json.dumps(said),
        }
        with written_whole(path) as folder:
            self._safetensors.torch.save_file(dict(record.tensors), folder / path.name, metadata)
        self._count += 1
