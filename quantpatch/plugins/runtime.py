"""What runs an exported model, as a value: what it takes, and where it wants quantizers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import attrs

from quantpatch.errors import ArgumentTypeError, MissingExtraError, PluginError, UnknownNameError

#: The rules of ``prepare`` that a runtime may ask for; ``export/prepare/placement_rules.py`` has them.
PLACEMENT = ("slow_float", "convolutions", "joins", "skips", "sums", "products")


def _known_rules(runtime: Any, attribute: Any, rules: tuple[str, ...]) -> None:
    for rule in rules:
        if rule not in PLACEMENT:
            raise UnknownNameError.of("placement rule", rule, PLACEMENT)


def _function(runtime: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    is_named = isinstance(value, str) and all(value.partition(":"))
    if value is not None and not is_named and (isinstance(value, str) or not callable(value)):
        raise ArgumentTypeError(
            f"{attribute.name} of a runtime is {value!r}, expected a function or where one is, "
            f"'package.module:function'",
            **{attribute.name: value},
        )


def _as_tuple(rules: Iterable[str] | str) -> tuple[str, ...]:
    return (rules,) if isinstance(rules, str) else tuple(rules)


class OpenedFile(Protocol):
    """A file that a runtime has opened, as its users do."""

    def __call__(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        """The file's outputs, in their order, for its inputs by name; all are numpy arrays."""
        ...


@attrs.frozen(kw_only=True)
class WrittenFile:
    """A file that was written, for a runtime to say what it makes of it.

    Attributes:
        path: The file.
        feeds: Inputs to run it on, by name.
        found: The ``ExportedQuantizer`` of each quantizer in it. Of weights, constants of the file are called
            after the quantizer: ``"conv.weight_quantizer."`` and something more.
    """

    path: Path
    feeds: Sequence[Mapping[str, Any]]
    found: Sequence[Any]


@attrs.frozen(kw_only=True)
class Kernels:
    """What a runtime made of a file.

    Attributes:
        on_floats: Names of the layers whose weights are quantized, but that run on float kernels.
        on_integers: The other layers with quantized weights: what runs each.
        compared: How many integer kernels were compared, each alone, with what the file says.
        within_step: The share of their values that are within a step; None if none was compared.
        unlike: What the runtime computes otherwise than the file says if it is opened with its defaults, as a
            sentence; empty if that is nothing.
    """

    on_floats: tuple[str, ...] = ()
    on_integers: Mapping[str, str] = attrs.field(factory=dict)
    compared: int = 0
    within_step: float | None = None
    unlike: str = ""


@attrs.frozen(kw_only=True)
class Runtime:
    """What will run an exported model: what it takes, and where it wants quantizers.

    Functions may be given as ``"package.module:function"``, which is imported when it is first needed.

    Attributes:
        fold_batchnorm: Whether ``prepare`` folds batch norm.
        placement: The rules by which ``prepare`` places quantizers, in their order. ``"slow_float"`` leaves
            small convolutions float where ONNX Runtime is slower on integers; ``"convolutions"`` quantizes
            what convolutions give, and ``"joins"`` operands and results of additions and concatenations of
            that; ``"skips"`` quantizes the other operand of an addition to what a convolution gives, and
            ``"sums"`` leaves that result as it is; ``"products"`` leaves products of activations float.
        unsigned: Whether activations may be unsigned integers: ``prepare`` makes those so that are never
            negative, and quantizers that are unsigned are refused otherwise.
        zero_points: Whether integers of activations may have zero points.
        transposed_axis: The axis on which weights of transposed convolutions have their scales; None for
            that of their output channels.
        signed_as_uint8: Whether a file has signed 8-bit activations as uint8 with zero point 128, the same
            values.
        weight_pairs: Whether a file has weights as floats with a QuantizeLinear/DequantizeLinear pair behind
            them, and not as integers.
        file: What it runs: ``"onnx"``, a file of ``export_onnx``, or ``"program"``, what ``lower`` makes.
        why_float: Takes a quantized layer and returns why the runtime has no integer kernel for it, as a
            clause; None if it has one. ``prepare`` switches off the quantizers of such layers.
        refuses: Takes an ``ExportedQuantizer`` and returns why the runtime does not support it and what to
            change, as a clause; None if it does.
        passes: Takes the ``onnx_ir.Model`` and rewrites it in place as the runtime is fast at; it must not
            change values.
        opens: Takes the path of a file and the number of threads, None for its default, and returns an
            ``OpenedFile``. The check then runs the file with it, beside the model, and measures its latency.
        kernels: Takes a ``WrittenFile`` and returns the ``Kernels`` that the runtime made of it, for the
            report.
        name: Its name, which is noted when it is looked up.
    """

    fold_batchnorm: bool = True
    placement: tuple[str, ...] = attrs.field(
        default=("convolutions", "joins"), converter=_as_tuple, validator=_known_rules
    )
    unsigned: bool = True
    zero_points: bool = True
    transposed_axis: int | None = attrs.field(default=None, validator=attrs.validators.in_((None, 0)))
    signed_as_uint8: bool = False
    weight_pairs: bool = False
    file: Literal["onnx", "program"] = attrs.field(
        default="onnx", validator=attrs.validators.in_(("onnx", "program"))
    )
    why_float: Callable[[Any], str | None] | str | None = attrs.field(default=None, validator=_function)
    refuses: Callable[[Any], str | None] | str | None = attrs.field(default=None, validator=_function)
    passes: Callable[[Any], None] | str | None = attrs.field(default=None, validator=_function)
    opens: Callable[[Path, int | None], OpenedFile] | str | None = attrs.field(
        default=None, validator=_function
    )
    kernels: Callable[[WrittenFile], Kernels] | str | None = attrs.field(default=None, validator=_function)
    name: str = ""

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls one of the functions, imported if it is given by name; None if there is none.

        Raises:
            PluginError: It cannot be imported.
            MissingExtraError: It needs a package that is not installed.
        """
        function = self.function(name)
        return None if function is None else function(*arguments)

    def function(self, name: str) -> Callable[..., Any] | None:
        """One of the functions, imported if it is given by name.

        Raises:
            PluginError: It cannot be imported.
            MissingExtraError: It needs a package that is not installed.
        """
        function = getattr(self, name)
        if isinstance(function, str):
            module, _, attribute = function.partition(":")
            try:
                function = getattr(importlib.import_module(module), attribute)
            except MissingExtraError:
                raise
            except (ImportError, AttributeError) as error:
                raise PluginError(
                    f"{name}={function!r} of a runtime cannot be imported: {type(error).__name__}: {error}",
                    hook="quantpatch_runtimes",
                ) from error
        return function  # type: ignore[no-any-return]
