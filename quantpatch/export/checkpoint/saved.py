"""How a model is quantized, as a file has it: values that become JSON, and are read from it.

A file may hold anything. So types are checked strictly (``"false"`` is not a truth value, and true not a
number), what is missing or of a wrong type is found here, and nothing here looks at a class, a module or a
model.
"""

from __future__ import annotations

import json
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import attrs
import torch

from quantpatch.errors import CheckpointError, shown
from quantpatch.layers.operations import NAMES

T = TypeVar("T")

_DTYPES = {
    str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


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
    distribution: str | None = None
    version: str | None = None


@attrs.frozen
class Layer:
    """A quantized layer: its class, and the float class that it stands for, by their dotted names.

    Attributes:
        replacement: Its class; of one that exists in no module the importable one that it is made of.
        float_class: The float class.
        operations: Names of the operations inside its forward that are quantized, if it is made for these.
    """

    replacement: str
    float_class: str
    operations: list[str] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        for operation in self.operations:
            if operation not in NAMES:
                raise ValueError(f"there is no operation {shown(operation, 40)}")


@attrs.frozen
class Quantizer:
    """A quantizer, whose descriptor is a mapping of JSON's types.

    Attributes:
        descriptor: See ``quantpatch.export.checkpoint.description``.
        disabled: Whether tensors pass unchanged.
        quantizing: Whether it quantizes.
        known: Whether its range is known.
        zero_point: That which data was found to need; None: it is the descriptor's. It is there for those who
            load the tensors later, which have it as well.
    """

    descriptor: dict[str, Any]
    disabled: bool
    quantizing: bool
    known: bool
    zero_point: int | None = None


@attrs.frozen
class Packed:
    """A weight that is in the file as codes: its shape and dtype, and whether its quantizer has its range."""

    shape: tuple[int, ...]
    dtype: str
    own: bool

    def __attrs_post_init__(self) -> None:
        if any(size < 0 for size in self.shape) or self.dtype not in _DTYPES:
            raise ValueError(
                f"a size of it is negative, or its dtype one that no weight has ({shown(self.dtype, 40)})"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return _DTYPES[self.dtype]


@attrs.frozen
class Description:
    """How a model is quantized.

    Attributes:
        plugins: The plugins that took part.
        layers: The quantized layers by name.
        quantizers: The quantizers by name.
        shared: Further names of quantizers that several layers share, each with the first one.
        tied: Further names of tensors that are in the file once.
        packed: The weights that are in the file as codes.
        input_factors: The layers that multiply what they are given by a factor.
    """

    plugins: list[PluginNote]
    layers: dict[str, Layer]
    quantizers: dict[str, Quantizer]
    shared: dict[str, str] = attrs.field(factory=dict)
    tied: dict[str, str] = attrs.field(factory=dict)
    packed: dict[str, Packed] = attrs.field(factory=dict)
    input_factors: list[str] = attrs.field(factory=list)


def read(kind: type[T], name: str, value: Any) -> T:
    """A value of one of these classes that was read from JSON.

    Args:
        kind: The class.
        name: What to call it in errors.
        value: What was read.

    Raises:
        CheckpointError: Something is missing or of a wrong type; the message names it.
    """
    return cast(T, _read(kind, name, value))


def _read(kind: Any, name: str, value: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return None if value is None and NoneType in inner else _read(inner[0], name, value)
    if origin in (tuple, list):
        return origin(
            _read(inner[0], f"item {n} of {name}", v) for n, v in enumerate(_typed(list, name, value))
        )
    if origin is dict:
        found = _typed(dict, name, value)
        return {key: _read(inner[1], f"{shown(key)} in {name}", each) for key, each in found.items()}
    if kind is Any:
        return value
    if not attrs.has(kind):
        return _typed(kind, name, value)
    found, types, given = _typed(dict, name, value), get_type_hints(kind), {}
    for field in attrs.fields(kind):
        if field.name in found:
            given[field.name] = _read(types[field.name], f"{field.name!r} of {name}", found[field.name])
        elif field.default is attrs.NOTHING:
            raise CheckpointError(f"{name} has no {field.name!r}")
    try:
        return kind(**given)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None


_WORDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "an integer"}


def _typed(kind: type[T], name: str, value: Any) -> T:
    if type(value) is not kind:  # not isinstance: true is an int
        # A list or an object may be nested deep, or be long.
        given = f"a {type(value).__name__}" if isinstance(value, (list, dict)) else shown(repr(value), 60)
        raise CheckpointError(f"{name} is {given}, expected {_WORDS[kind]}")
    return value
