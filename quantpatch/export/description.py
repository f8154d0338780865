"""How a model is quantized, as JSON: its layers' classes, its quantizers' descriptors, the plugins in force.

Reading it back runs no code that the file names. A class is looked up among the entries of the plugins and
in modules that are imported already; a format of a plugin is asked for by its name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast

import attrs
from torch import nn

from quantpatch.classes import dotted, own_class
from quantpatch.descriptor import QuantDescriptor
from quantpatch.errors import CheckpointError, QuantPatchError
from quantpatch.formats import Blocked, Float, Integer, NumberFormat
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.subclass import replacement_of
from quantpatch.quantizer import named_quantizers
from quantpatch.registry import registry

__all__ = [
    "active_plugins",
    "describe_layers",
    "describe_quantizers",
    "describe_sharing",
    "descriptor_of",
    "find_class",
    "missing_plugins",
]

_BUILTIN = "quantpatch.builtin"
_FORMATS: Mapping[str, type[Any]] = {"integer": Integer, "float": Float, "blocked": Blocked}
_LATER = ("format", "number_format")


def active_plugins() -> list[dict[str, str | None]]:
    """Name, distribution and version of each plugin that takes part, the built-in one left out."""
    return [
        {"name": info.name, "distribution": info.distribution, "version": info.version}
        for info in registry.plugins()
        if info.state == "active" and info.name != _BUILTIN
    ]


def missing_plugins(described: list[Mapping[str, Any]]) -> list[str]:
    """Those of the plugins described that do not take part here, each with what would bring it."""
    states = {info.name: info for info in registry.plugins()}
    found = []
    for plugin in described:
        info = states.get(plugin["name"])
        if info is None:
            source = plugin.get("distribution")
            how = (
                f"pip install {source}=={plugin.get('version')}"
                if source
                else "register it as in the saving program"
            )
            found.append(f"{plugin['name']!r} is not installed ({how})")
        elif info.state != "active":
            found.append(f"{plugin['name']!r} is {info.state}: {info.reason}")
    return found


# --- Formats and descriptors ------------------------------------------------------------------------------


def _describe_format(format: Any, where: str) -> Any:
    if format is None or isinstance(format, str):
        return format
    for kind, cls in _FORMATS.items():
        if type(format) is cls:
            fields = {a.name: getattr(format, a.name) for a in attrs.fields(type(format))}
            if "element" in fields:
                fields["element"] = _describe_format(fields["element"], where)
            return {"kind": kind, **fields}
    for name, offered in registry.named("quantpatch_formats", NumberFormat).items():
        if offered == format:
            return name
    raise CheckpointError(
        f"{where}: its format {format.name!r} ({type(format).__name__}) can be written "
        f"only by its name, and no "
        f"plugin offers it. Return it from the hook quantpatch_formats: {{{format.name!r}: ...}}"
    )


def _format_of(described: Any) -> NumberFormat | str | None:
    if described is None or isinstance(described, str):
        return described
    fields = dict(described)
    cls = _FORMATS[fields.pop("kind")]
    if "element" in fields:
        element = _format_of(fields["element"])
        # A plugin's is known by its name.
        fields["element"] = (
            registry.format(QuantDescriptor(format=element)) if isinstance(element, str) else element
        )
    return cls(**fields)  # type: ignore[no-any-return]


def _describe_descriptor(descriptor: QuantDescriptor, where: str) -> dict[str, Any]:
    described = {
        a.name: getattr(descriptor, a.name)
        for a in attrs.fields(QuantDescriptor)
        if a.name not in _LATER and getattr(descriptor, a.name) != a.default
    }
    if descriptor.format is not None:
        described["format"] = _describe_format(descriptor.format, where)
    return described


def descriptor_of(described: Mapping[str, Any]) -> QuantDescriptor:
    """The descriptor that a file describes, with a format that exists here.

    Raises:
        QuantPatchError: It contradicts itself, or names a format that does not exist.
        KeyError, TypeError, ValueError: It is no description of a descriptor.
    """
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in described.items()}
    if "format" in fields:
        fields["format"] = _format_of(fields["format"])
    descriptor = QuantDescriptor(**cast(Any, fields))
    registry.format(descriptor)
    return descriptor


def describe_quantizers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Each quantizer by name: its descriptor, what is switched off, and whether its range is known.

    Also whether its zero point was found, if it was.

    Raises:
        CheckpointError: One has a format that no file can name.
    """
    described: dict[str, dict[str, Any]] = {}
    for name, quantizer in named_quantizers(model).items():
        described[name] = {
            "descriptor": _describe_descriptor(quantizer.descriptor, name),
            "disabled": quantizer.disabled,
            # As of a copy: a file may be written while the model is in float for its calibration.
            "quantizing": quantizer.__getstate__()["quantizing"],
            "known": quantizer.amax is not None,
        }
        if quantizer.zero_point_is_found:
            described[name]["zero_point_is_found"] = True
    return described


def describe_sharing(model: nn.Module) -> dict[str, str]:
    """The further names of quantizers that are in a model more than once, each with the first."""
    first = {quantizer: name for name, quantizer in named_quantizers(model).items()}
    every = named_quantizers(model, every_name=True)
    return {name: first[quantizer] for name, quantizer in every.items() if first[quantizer] != name}


# --- Layers -----------------------------------------------------------------------------------------------


def describe_layers(model: nn.Module) -> dict[str, dict[str, str]]:
    """The quantized layers by name: their class and the float class that it stands for.

    Of a user's subclass the class is that of its base's replacement.
    """
    return {
        name: {
            "class": dotted(replacement_of(own_class(cast(nn.Module, layer)))),
            "float": dotted(layer.float_class),
        }
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
    }


def find_class(name: str) -> type[Any] | None:
    """The quantized layer of a dotted name; None if no plugin offers it and no module imported holds it."""
    for offer in registry.offers():
        replacement = offer.entry.replacement
        offered = (
            replacement.replace(":", ".")
            if isinstance(replacement, str)
            else dotted(replacement)
            if isinstance(replacement, type)
            else ""
        )
        if offered == name:
            try:
                found = offer.entry.load_replacement()
            except QuantPatchError:
                return None
            return found if isinstance(found, type) and issubclass(found, QuantizedLayer) else None
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        value: Any = sys.modules.get(".".join(parts[:cut]))
        if value is None:
            continue
        for part in parts[cut:]:
            value = getattr(value, part, None)
        return value if isinstance(value, type) and issubclass(value, QuantizedLayer) else None
    return None
