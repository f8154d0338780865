"""What the files of a checkpoint hold beside weights, under the names that a model has for it.

transformers renames keys between its models and the checkpoints that their authors published, when it saves
as when it loads, and lets a model with a head read the checkpoint of one without and the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from quantpatch.errors import CheckpointError
from quantpatch.layers import RANGE_KEY, ZERO_POINT_KEY

__all__ = ["Checkpoint", "aliased", "names_in"]

_SUFFIX = f"_quantizer.{RANGE_KEY}"
_ZERO_POINT_SUFFIX = f"_quantizer.{ZERO_POINT_KEY}"


class Checkpoint:
    """The ranges and the metadata in the safetensors files of a checkpoint.

    Args:
        files: Paths of the files; those of other kinds hold nothing of interest.

    Attributes:
        path: The first file, for messages.
        zero_points: The keys of zero points, once ``find_ranges`` has looked.
    """

    def __init__(self, files: Iterable[str]) -> None:
        files = [str(file) for file in files]
        self.path = files[0] if files else "a state_dict"
        self._files = [file for file in files if file.endswith(".safetensors")]
        self._keys: dict[str, str] = {}  # all of them: the file
        self._where: dict[str, tuple[str, str]] = {}  # by name in the model: the file, and the key in it
        self.zero_points: tuple[str, ...] = ()
        self._renamed: dict[str, str] = {}  # by name in the model: what transformers makes of the key

    def find_ranges(self, model: PreTrainedModel, aliases: Mapping[str, str] | None = None) -> None:
        """Looks for the ranges of a model's quantizers.

        Args:
            model: The model that the checkpoint is to be loaded into.
            aliases: The keys of the ranges, by the names of their quantizers, where they are not named after
                these; see ``aliased``.

        Raises:
            CheckpointError: A file cannot be read.
        """
        keys = {key: file for file in self._files for key in self._read(file, lambda f: list(f.keys()))}
        self._keys = keys
        renaming = _renaming(model)

        def renamed(key: str) -> str:
            return renaming(key)[0]

        self.zero_points = tuple(key for key in keys if key.endswith(_ZERO_POINT_SUFFIX))
        names = {key: name for name, key in (aliases or {}).items() if key in keys}
        names.update(
            {key: renamed(key).removesuffix(f".{RANGE_KEY}") for key in keys if key.endswith(_SUFFIX)}
        )
        own = names_in(model, names.values())
        for key, name in names.items():
            name = own.get(name, name)
            self._where[name] = (keys[key], key)
            self._renamed[name] = renamed(key)

    def leave_out_unknown(self) -> None:
        """Forgets of ranges that were not known when they were saved, and of the zero points beside them."""
        unknown = {name for name, (file, key) in self._where.items() if self._tensor(file, key).isnan().all()}
        beside = {self._where.pop(name)[1].removesuffix(RANGE_KEY) + ZERO_POINT_KEY for name in unknown}
        self.zero_points = tuple(key for key in self.zero_points if key not in beside)

    def leave_out_resized(self, model: PreTrainedModel) -> dict[str, list[str]]:
        """Forgets of the ranges of layers whose weight has another shape in a model, where it starts anew.

        Returns:
            The names of the quantizers, by layer.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        renaming = _renaming(model)
        plain: dict[str, str] = {}  # the key of what is not put together from several, by name
        for key in self._keys:
            name, converted = renaming(key)
            if converted is None and not key.endswith((_SUFFIX, _ZERO_POINT_SUFFIX)):
                plain[name] = key
        own = names_in(model, {name.rpartition(".")[0] for name in plain})
        resized: set[str] = set()
        for name, key in plain.items():
            layer, _, leaf = name.rpartition(".")
            name = f"{own.get(layer, layer)}.{leaf}"
            if name in parameters and self._shape(key) != [*parameters[name].shape]:
                resized.add(name)
        tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
        resized |= {target for target, source in tied.items() if source in resized}
        anew: dict[str, list[str]] = {}
        for quantizer in self._where:
            if quantizer.removesuffix("_quantizer") in resized:
                anew.setdefault(quantizer.rpartition(".")[0], [])
        for quantizer in [q for q in self._where if q.rpartition(".")[0] in anew]:
            anew[quantizer.rpartition(".")[0]].append(quantizer)
            del self._where[quantizer]
        return anew

    def _shape(self, key: str) -> list[int]:
        shape: list[int] = self._read(self._keys[key], lambda f: f.get_slice(key).get_shape())
        return shape

    @property
    def range_names(self) -> Collection[str]:
        """Names of the quantizers whose range the files hold, as the model has or would have them."""
        return self._where.keys()

    def ranges(self) -> dict[str, Tensor]:
        """The ranges and the zero points beside them, by their names in the model's ``state_dict``."""
        found = {}
        for name, (file, key) in self._where.items():
            found[f"{name}.{RANGE_KEY}"] = self._tensor(file, key)
            beside = key.removesuffix(RANGE_KEY) + ZERO_POINT_KEY
            if beside in self._keys:
                found[f"{name}.{ZERO_POINT_KEY}"] = self._tensor(self._keys[beside], beside)
        return found

    def _tensor(self, file: str, key: str) -> Tensor:
        found: Tensor = self._read(file, lambda f: f.get_tensor(key))
        return found

    def metadata(self) -> Mapping[str, str]:
        """The metadata, which every file has alike."""
        return self._read(self._files[0], lambda f: f.metadata() or {}) if self._files else {}

    def patterns_of(self, quantizers: Collection[str]) -> set[str]:
        """Regular expressions for the keys of ranges of these quantizers and of zero points, and no more."""
        ranges = [new for name, new in self._renamed.items() if name in quantizers]
        beside = {key.removesuffix(RANGE_KEY) + ZERO_POINT_KEY for _, key in self._where.values()}
        zero_points = (key for key in self._keys if key.endswith(_ZERO_POINT_SUFFIX) or key in beside)
        return {rf"^{re.escape(key)}$" for key in (*ranges, *zero_points)}

    def _read(self, file: str, what: Any) -> Any:
        try:
            with safe_open(file, framework="pt") as opened:
                return what(opened)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read: {error}", path=file, problems=(str(error),)
            ) from error


def _renaming(model: PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """What transformers makes of the keys of a checkpoint when it loads it into a model.

    Returns:
        A function of a key. It gives the key in the model, and what converts the tensor, if anything does.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    return lambda key: rename_source_key(key, renamings, converters)


def aliased(model: PreTrainedModel, quantizers: Iterable[str]) -> dict[str, str]:
    """Keys under which the ranges of quantizers are to be saved, by the quantizers' names.

    Where transformers renames the keys of a model's weights, or puts several together, it would take ranges
    that are named after weights for these. There they get names that are like nothing else.
    """
    if getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False):
        return {name: f"quantpatch.range.{number}" for number, name in enumerate(quantizers)}
    return {}


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
