"""What the files of a checkpoint hold beside weights, under the names that a model has for it.

transformers renames keys between its models and the checkpoints that their authors published, when it saves
as when it loads, and lets a model with a head read the checkpoint of one without and the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from quantpatch.errors import CheckpointError
from quantpatch.export.structure import RANGE

__all__ = ["Checkpoint", "names_in"]

_SUFFIX = f"_quantizer.{RANGE}"


class Checkpoint:
    """The ranges and the metadata in the safetensors files of a checkpoint.

    Args:
        files: Paths of the files; those of other kinds hold nothing of interest.
        model: The model that they are to be loaded into.

    Attributes:
        path: The first file, for messages.

    Raises:
        CheckpointError: A file cannot be read.
    """

    def __init__(self, files: Iterable[str], model: PreTrainedModel) -> None:
        files = [str(file) for file in files]
        self.path = files[0] if files else "a state_dict"
        self._files = [file for file in files if file.endswith(".safetensors")]
        self._where: dict[str, tuple[str, str]] = {}  # by name in the model: the file, and the key in it
        self._renamed: dict[str, str] = {}  # by name in the model: what transformers makes of the key
        keys = {key: file for file in self._files for key in self._read(file, lambda f: list(f.keys()))}
        ranges = {key: file for key, file in keys.items() if key.endswith(_SUFFIX)}
        if ranges:
            transforms = get_model_conversion_mapping(model)
            renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
            converters = [each for each in transforms if isinstance(each, WeightConverter)]
            renamed = {key: rename_source_key(key, renamings, converters)[0] for key in ranges}
            names = {key: new.removesuffix(f".{RANGE}") for key, new in renamed.items()}
            own = names_in(model, names.values())
            for key, file in ranges.items():
                name = own.get(names[key], names[key])
                self._where[name] = (file, key)
                self._renamed[name] = renamed[key]

    @property
    def range_names(self) -> Collection[str]:
        """Names of the quantizers whose range the files hold, as the model has or would have them."""
        return self._where.keys()

    def ranges(self) -> dict[str, Tensor]:
        """The ranges, by their names in the model's ``state_dict``."""
        return {
            f"{name}.{RANGE}": self._read(file, lambda f, key=key: f.get_tensor(key))
            for name, (file, key) in self._where.items()
        }

    def metadata(self) -> Mapping[str, str]:
        """The metadata, which every file has alike."""
        return self._read(self._files[0], lambda f: f.metadata() or {}) if self._files else {}

    def patterns_of(self, quantizers: Collection[str]) -> set[str]:
        """Regular expressions for the keys that are ranges of these quantizers, and of nothing else."""
        return {rf"^{re.escape(new)}$" for name, new in self._renamed.items() if name in quantizers}

    def _read(self, file: str, what: Any) -> Any:
        try:
            with safe_open(file, framework="pt") as opened:
                return what(opened)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}", path=file, problems=(str(error),)
            ) from error


def names_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The names that modules of a checkpoint have in a model, which may have a head where it has none.

    Args:
        model: The model.
        names: Names of layers in the checkpoint, or of quantizers, which the model may not have yet.

    Returns:
        The name in the model, by the name in the checkpoint. What belongs to another head is left out.
    """
    names = list(names)
    own = {name for name, _ in model.named_modules(remove_duplicate=False)}

    def has_place(name: str) -> bool:
        return (name.rpartition(".")[0] if name.endswith("_quantizer") else name) in own

    base = model.base_model_prefix
    prefix = f"{base}."
    from_a_head = any(name.startswith(prefix) for name in names)
    if all(has_place(name) for name in names) or not (base in own or from_a_head):
        return {name: name for name in names}
    if base not in own:
        return {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if not from_a_head:
        return {name: prefix + name for name in names}
    return {name: name for name in names if name.startswith(prefix) or has_place(name)}
