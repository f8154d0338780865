"""How a model is quantized, as JSON: its layers' classes, its quantizers' descriptors, the plugins in force.

Reading it back runs no code that the file names: see ``known_classes.py`` for classes. A
format of a plugin is asked for by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import attrs
import torch
from torch import nn

from quantpatch.errors import CheckpointError, QuantPatchError, shown
from quantpatch.export.checkpoint.saved import Description, Layer, PluginNote, Quantizer
from quantpatch.layers.base import named_layers
from quantpatch.layers.input_factor import named_input_factors
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.layers.subclass import replacement_of
from quantpatch.layers.with_operations import operations_of
from quantpatch.numerics.formats import Blocked, Float, Integer, NumberFormat
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import registry
from quantpatch.recipes.descriptor import QuantDescriptor
from quantpatch.torch_tools.atomic_files import own_version
from quantpatch.torch_tools.class_swap import dotted, own_class

_FORMATS: Mapping[str, type[Any]] = {"integer": Integer, "float": Float, "blocked": Blocked}
_FIELDS = {a.name for a in attrs.fields(QuantDescriptor) if a.init}


def describe(model: nn.Module) -> dict[str, Any]:
    """How a model is quantized, as JSON: what :class:`quantpatch.export.StructurePlan` makes of another.

    Raises:
        CheckpointError: A quantizer has a format that no file can name.
    """
    first = {quantizer: name for name, quantizer in named_quantizers(model).items()}
    every = named_quantizers(model, every_name=True)
    description = Description(
        plugins=[
            PluginNote(info.name, info.distribution, info.version)
            for info in registry.plugins()
            if info.state == "active" and info.name != BUILTIN
        ],
        layers={
            # Of a user's subclass the class is that of its base's replacement.
            name: Layer(
                dotted(replacement_of(own_class(layer))),
                dotted(layer.float_class),
                list(operations_of(own_class(layer))),
            )
            for name, layer in named_layers(model).items()
        },
        quantizers={name: _describe_quantizer(quantizer, name) for quantizer, name in first.items()},
        shared={name: first[q] for name, q in every.items() if first[q] != name},
        input_factors=list(named_input_factors(model)),
    )
    return {
        "quantpatch": own_version(),
        "torch": str(torch.__version__),
        "model": dotted(own_class(model)),
        **attrs.asdict(description),
    }


def missing_plugins(described: Iterable[PluginNote]) -> list[str]:
    """Those of the plugins described that do not take part here, each with what would bring it."""
    states = {info.name: info for info in registry.plugins()}
    found = []
    for plugin in described:
        info, name = states.get(plugin.name), shown(repr(plugin.name))
        if info is None:
            how = (
                f"pip install {shown(plugin.distribution)}=={shown(plugin.version)}"
                if plugin.distribution
                else "register it as in the saving program"
            )
            found.append(f"{name} is not installed ({how})")
        elif info.state != "active":
            found.append(f"{name} is {info.state}: {info.reason}")
    return found


# --- Formats and descriptors ------------------------------------------------------------------------------


def _describe_quantizer(quantizer: TensorQuantizer, name: str) -> Quantizer:
    descriptor = quantizer.descriptor
    described = {
        a.name: getattr(descriptor, a.name)
        for a in attrs.fields(QuantDescriptor)
        if a.init and a.name != "format" and getattr(descriptor, a.name) != a.default
    }
    if descriptor.format is not None:
        described["format"] = _describe_format(descriptor.format, name)
    return Quantizer(
        described,
        quantizer.disabled,
        quantizer.lasting["quantizing"],  # a file may be written during a calibration
        known=quantizer.amax is not None,
        zero_point=quantizer.zero_point if quantizer.zero_point_is_found else None,
    )


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
    cls = _FORMATS.get(fields.pop("kind", None))
    wanted = () if cls is None else tuple(a.name for a in attrs.fields(cls))
    if cls is None or not fields.keys() <= set(wanted):
        raise CheckpointError(
            f"its format is of a kind that this version does not know: {', '.join(map(shown, described))}",
            field="format",
        )
    if cls is Blocked:
        element = fields.get("element")
        if isinstance(element, dict) and element.get("kind") == "blocked":
            raise CheckpointError("its format has blocks in its blocks", field="format")
        element = _format_of(element)
        # A plugin's is known by its name.
        fields["element"] = (
            registry.format(QuantDescriptor(format=element)) if isinstance(element, str) else element
        )
    return cls(**fields)  # type: ignore[no-any-return]


def descriptor_of(described: Mapping[str, Any]) -> QuantDescriptor:
    """The descriptor that a file describes, with a format that exists here.

    Raises:
        QuantPatchError: It contradicts itself, has fields that no descriptor has or of other types, or names
            a format that does not exist.
    """
    unknown = described.keys() - _FIELDS
    if unknown:
        raise CheckpointError(f"no descriptor has {', '.join(map(shown, sorted(unknown)))}")
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in described.items()}
    try:
        if "format" in fields:
            fields["format"] = _format_of(fields["format"])
        descriptor = QuantDescriptor(**cast(Any, fields))
    except (TypeError, ValueError, RecursionError) as error:  # an argument is missing, a value has no repr
        if isinstance(error, QuantPatchError):
            raise
        raise CheckpointError(f"its descriptor is damaged: {shown(error)}") from None
    registry.format(descriptor)
    return descriptor
