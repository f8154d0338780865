"""A description as a file has it, read into values: what is missing or of a wrong type is found here.

A file may hold anything. So types are checked strictly (``"false"`` is not a truth value, and true not a
number), and nothing here looks at a class, a module or a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
import torch

from quantpatch.errors import CheckpointError, shown

T = TypeVar("T")

_DTYPES = {
    str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_REQUIRED: Any = object()


def read_json(text: str) -> Any:
    """What a text in JSON holds.

    Raises:
        ValueError: It is not JSON, or nested so deep that only malice has written it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


@attrs.frozen
class PluginNote:
    """A plugin that took part where the model was saved."""

    name: str
    distribution: str | None
    version: str | None


@attrs.frozen
class Layer:
    """A quantized layer: its class, and the float class that it stands for, by their dotted names."""

    replacement: str
    float_class: str


@attrs.frozen
class Quantizer:
    """A quantizer; its descriptor is still a mapping of JSON's types."""

    descriptor: Mapping[str, Any]
    disabled: bool
    quantizing: bool
    known: bool


@attrs.frozen
class Packed:
    """A weight that is in the file as codes: its shape and dtype, and whether its quantizer has its range."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    own: bool


@attrs.frozen
class Description:
    """How a model was quantized, as ``quantpatch.export.checkpoint.description`` writes it.

    Attributes:
        plugins: The plugins that took part.
        layers: The quantized layers by name.
        quantizers: The quantizers by name.
        shared: Further names of quantizers that several layers share, each with the first one.
        tied: Further names of tensors that are in the file once.
        packed: The weights that are in the file as codes.
    """

    plugins: tuple[PluginNote, ...]
    layers: Mapping[str, Layer]
    quantizers: Mapping[str, Quantizer]
    shared: Mapping[str, str]
    tied: Mapping[str, str]
    packed: Mapping[str, Packed]

    @classmethod
    def of(cls, read: Any) -> Description:
        """The description that was read from JSON.

        Raises:
            CheckpointError: Something is missing or of a wrong type; the message names it.
        """
        whole = _Fields("the description", read)
        return cls(
            tuple(_plugin(f"plugin {i}", each) for i, each in enumerate(whole.get("plugins", list))),
            whole.each("layers", _layer),
            whole.each("quantizers", _quantizer),
            whole.each("shared", _text, {}),
            whole.each("tied", _text, {}),
            whole.each("packed", _packed, {}),
        )


class _Fields:
    """An object of JSON whose fields are asked for with their types."""

    def __init__(self, name: str, value: Any) -> None:
        self._name = name
        self._value: dict[str, Any] = _typed(name, value, dict)

    def get(self, field: str, kind: type[T], default: Any = _REQUIRED) -> T:
        if field not in self._value:
            if default is _REQUIRED:
                raise CheckpointError(f"{self._name} has no {field!r}")
            return default  # type: ignore[no-any-return]
        return _typed(f"{field!r} of {self._name}", self._value[field], kind)

    def each(self, field: str, read: Callable[[str, Any], T], default: Any = _REQUIRED) -> dict[str, T]:
        found = self.get(field, dict, default)
        return {name: read(f"{shown(name)} in {field!r}", value) for name, value in found.items()}


_WORDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "an integer"}


def _typed(name: str, value: Any, kind: type[T]) -> T:
    if type(value) is not kind:  # not isinstance: true is an int
        # A list or an object may be nested deep, or be long.
        given = f"a {type(value).__name__}" if isinstance(value, (list, dict)) else shown(repr(value), 60)
        raise CheckpointError(f"{name} is {given}, expected {_WORDS[kind]}")
    return value


def _text(name: str, value: Any) -> str:
    return _typed(name, value, str)


def _plugin(name: str, value: Any) -> PluginNote:
    fields = _Fields(name, value)
    notes = {key: value.get(key) for key in ("distribution", "version")}
    return PluginNote(
        fields.get("name", str),
        *(None if note is None else _text(f"{key!r} of {name}", note) for key, note in notes.items()),
    )


def _layer(name: str, value: Any) -> Layer:
    fields = _Fields(name, value)
    return Layer(fields.get("class", str), fields.get("float", str))


def _quantizer(name: str, value: Any) -> Quantizer:
    fields = _Fields(name, value)
    return Quantizer(
        fields.get("descriptor", dict),
        fields.get("disabled", bool),
        fields.get("quantizing", bool),
        fields.get("known", bool),
    )


def _packed(name: str, value: Any) -> Packed:
    fields = _Fields(name, value)
    shape = tuple(_typed(f"a size of {name}", size, int) for size in fields.get("shape", list))
    dtype = fields.get("dtype", str)
    if any(size < 0 for size in shape) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{name} has a negative size, or a dtype that no weight has ({shown(dtype, 40)})"
        )
    return Packed(shape, _DTYPES[dtype], fields.get("own", bool))
