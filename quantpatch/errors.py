"""Every error quantpatch raises, so that ``except QuantPatchError`` catches them all.

Each type carries its culprit as data (the entry, the plugin, the quantizers …), so that a program
can react to what went wrong without reading the message. The message is for the person: what was
given, what was expected, whose it is, and what to write instead.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable
from types import FrameType
from typing import Any

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BlockError",
    "CalibrationError",
    "CheckError",
    "CheckpointError",
    "ConversionError",
    "EntryConflictError",
    "EntryError",
    "ExportError",
    "FileError",
    "InputError",
    "LayerError",
    "MissingExtraError",
    "PluginError",
    "QuantPatchError",
    "QuantPatchWarning",
    "RangeError",
    "SearchError",
    "TuningError",
    "UnknownNameError",
    "listed",
    "near_misses",
    "shown",
    "warn_caller",
]

_PASSED_OVER = ("quantpatch", "contextlib")  # in which blocks end


class QuantPatchWarning(UserWarning):
    """Something was left float, or may not be as expected; the message names it."""


class QuantPatchError(Exception):
    """Base of all errors of this package.

    Args:
        message: What was given, what was expected, and what to write instead.
        **culprit: What the error is about; becomes attributes of the error.
    """

    def __init__(self, message: str, **culprit: Any) -> None:
        super().__init__(message)
        # Attributes rather than extra positional arguments: Exception's own pickling then keeps them.
        self.__dict__.update(culprit)


class EntryError(QuantPatchError):
    """An entry ``(module, name, replacement)`` cannot be used.

    Attributes:
        entry: The entry, or what was given in its place.
        plugin: Name of the plugin it came from, or None when it was given to the block.
    """

    entry: Any = None
    plugin: str | None = None


class EntryConflictError(QuantPatchError):
    """Two plugins want to replace the same target.

    Attributes:
        target: Dotted name of the target.
        plugins: Names of the plugins, sorted.
        entries: Their entries, in the same order.
    """

    target: str = ""
    plugins: tuple[str, ...] = ()
    entries: tuple[Any, ...] = ()


class PluginError(QuantPatchError):
    """A plugin cannot be imported, or one of its hooks failed or returned the wrong thing.

    Attributes:
        plugin: Name of the plugin (the name of its entry point).
        distribution: Name and version of the distribution it came with, or None.
        hook: Name of the hook concerned, or None.
    """

    plugin: str = ""
    distribution: str | None = None
    hook: str | None = None


class ArgumentError(QuantPatchError, ValueError):
    """An argument has an impossible value, or two arguments contradict each other; nothing was changed.

    Args:
        message: As in :class:`QuantPatchError`.
        **given: The argument, by its name, as it was given.

    Attributes:
        argument: Name of the argument, where it is known: a parameter of the function that was called, or a
            field of the value that was made, such as ``"num_bits"``.
        value: What was given for it.
    """

    argument: str = ""
    value: Any = None

    def __init__(self, message: str, **given: Any) -> None:
        super().__init__(message)
        if given:
            [(self.argument, self.value)] = given.items()


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is of a wrong type: a list in place of a model, a tensor of integers for a quantizer.

    Attributes:
        argument: Name of the argument, where it is known.
        value: What was given for it. Of a tensor that cannot be quantized: its dtype, or its layout if that
            is at fault; of anything else that was to be quantized: its type.
        quantizer: The quantizer that was given it, if one was.
    """

    quantizer: Any = None


class UnknownNameError(ArgumentError, LookupError):
    """There is nothing by a name that was given (of a layer, recipe, calibrator, format, plugin …).

    Attributes:
        kind: What the name was meant to name, such as ``"recipe"``.
        name: The name given.
        known: The names that exist, sorted.
    """

    kind: str = ""
    name: str = ""
    known: tuple[str, ...] = ()

    @classmethod
    def of(cls, kind: str, name: object, known: Iterable[str], hint: str = "") -> UnknownNameError:
        """The error for an unknown name, with near misses (or, of a short list, all names)."""
        names = tuple(sorted(set(known)))
        message = f"unknown {kind} {name!r}. {near_misses(str(name), names)}{hint}"
        error = cls(message.rstrip())
        error.__dict__.update(kind=kind, name=str(name), known=names, value=name)
        return error


class BlockError(QuantPatchError, RuntimeError):
    """A block was used in a way that cannot work, such as ``stop()`` without ``start()``."""


class ConversionError(QuantPatchError, RuntimeError):
    """An existing model cannot be converted or reverted; it is as it was.

    Attributes:
        layers: Qualified names of the layers concerned.
        entry: The entry concerned, or None.
    """

    layers: tuple[str, ...] = ()
    entry: Any = None


class RangeError(QuantPatchError, ValueError):
    """A range (amax) that is negative, not finite, or of the wrong shape.

    Attributes:
        quantizer: The quantizer that was to use it, if one was.
        value: What was given.
    """

    quantizer: Any = None
    value: Any = None


class InputError(QuantPatchError, RuntimeError):
    """A model failed on inputs that it cannot take; it is as it was.

    Attributes:
        devices: Where the inputs are, and where the model is, if that is what differs.
    """

    devices: tuple[str, str] = ("", "")


class CalibrationError(QuantPatchError, RuntimeError):
    """Calibration cannot give ranges; the model is as it was before.

    Attributes:
        quantizers: Names of the quantizers concerned.
        quantizer: The quantizer whose data was at fault, where it is one.
        ranks: The ranks of ``torch.distributed`` that failed, where it was not this one.
    """

    quantizers: tuple[str, ...] = ()
    quantizer: Any = None
    ranks: tuple[int, ...] = ()


class TuningError(QuantPatchError, RuntimeError):
    """A model cannot be tuned; it is as it was before.

    Attributes:
        method: Name of the method.
        layers: Qualified names of the layers concerned.
    """

    method: str = ""
    layers: tuple[str, ...] = ()


class CheckpointError(QuantPatchError, RuntimeError):
    """A model cannot be saved, or a file cannot be loaded into it; the model and the file are as they were.

    Attributes:
        path: The file.
        problems: What is wrong, one sentence each.
    """

    path: str = ""
    problems: tuple[str, ...] = ()


class ExportError(QuantPatchError, RuntimeError):
    """A model cannot be exported or folded as it is; nothing was written or changed.

    Attributes:
        quantizers: Names of the quantizers (or layers) concerned.
        runtime: The runtime that the export was for, or None.
    """

    quantizers: tuple[str, ...] = ()
    runtime: str | None = None


class CheckError(QuantPatchError, AssertionError):
    """What was demanded does not hold: a rule that every quantized layer keeps, or a share that is quantized.

    Attributes:
        entry: The entry whose layer breaks rules, where it is known.
        checks: Names of the checks that failed.
        report: The ``CoverageReport`` of a model of which less ran quantized than was demanded.
    """

    entry: Any = None
    checks: tuple[str, ...] = ()
    report: Any = None


class SearchError(QuantPatchError, RuntimeError):
    """No configuration that was tried keeps the metric that was asked for; the model is as it was.

    Attributes:
        result: The ``SearchResult`` of the configuration with the best metric.
    """

    result: Any = None


class FileError(QuantPatchError, OSError):
    """A file (or script) is not there, cannot be written, or holds something else; nothing was done with it.

    Attributes:
        path: The file, or the name of the module that was to be run.
    """

    path: str = ""


class LayerError(QuantPatchError, TypeError):
    """A quantized layer's class does not fit its float class.

    Attributes:
        layer: The class.
    """

    layer: type | None = None


class MissingExtraError(QuantPatchError, ImportError):
    """An optional dependency is not installed.

    Attributes:
        extra: The extra that brings it.
        package: The package that could not be imported.
    """

    extra: str = ""
    package: str = ""

    @classmethod
    def of(cls, extra: str, package: str, purpose: str) -> MissingExtraError:
        """The error for a missing package, with the line that installs it."""
        message = (
            f"{purpose} needs {package}, which is not installed. Write: pip install 'quantpatch[{extra}]'"
        )
        return cls(message, extra=extra, package=package)


def near_misses(name: str, known: Iterable[str], limit: int = 3) -> str:
    """A sentence that says which known names come nearest to ``name``.

    Names are compared without regard to case and by their last part, so that ``linear`` finds
    ``torch.nn.Linear``.
    """
    names = list(known)
    if not names:
        return "There are none. "
    spelled = {n.lower(): n for n in names} | {n.rpartition(".")[2].lower(): n for n in names}
    close: list[str] = []
    for wanted in dict.fromkeys((name.lower(), name.rpartition(".")[2].lower())):
        close += difflib.get_close_matches(wanted, spelled, n=limit, cutoff=0.6)
        close += [key for key in spelled if wanted and wanted in key]
    found = list(dict.fromkeys(spelled[key] for key in close))[:limit]
    if found:
        return f"Did you mean {' or '.join(repr(n) for n in found)}? "
    if len(names) <= 12:
        return f"There are: {', '.join(repr(n) for n in names)}. "
    return ""


def shown(text: object, most: int = 160, *, keep: str = "") -> str:
    r"""Text from outside (a file, a plugin) as a message or a table may repeat it.

    What a terminal would act on, or not show, is escaped as Python writes it: ``\x1b``, ``\n``. Of what is
    long the middle is left out.

    Args:
        text: The text, or what has it as its ``str``.
        most: About how many characters to show.
        keep: Control characters that may stay, such as the line feeds of a message.
    """
    whole = str(text)
    if len(whole) > most:
        half = most // 2
        whole = f"{whole[:half]}…{whole[-half:]} ({len(whole):,} characters)"
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in whole)


def listed(items: Iterable[object], limit: int = 10, separator: str = ", ") -> str:
    """The first few of many things for a message, and how many more there are.

    Args:
        items: The things, such as names.
        limit: How many to show at most.
        separator: What stands between two.
    """
    texts = [str(item) for item in items]
    more = len(texts) - limit
    if more <= 0:
        return separator.join(texts)
    last = " " if separator == ", " else separator
    return f"{separator.join(texts[:limit])}{last}and {more} more"


def warn_caller(message: str) -> None:
    """Warns of something at the line that called quantpatch, however deep inside this is found out."""
    level = 1
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, QuantPatchWarning, stacklevel=level)
