"""The conformance kit: checks on a layer, and everything that the installed plugins have to be tried on."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch

from quantpatch.errors import CheckError, QuantPatchError, QuantPatchWarning, UnknownNameError
from quantpatch.plugins.entry import Entry, EntryLike
from quantpatch.plugins.example import Example
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import PluginInfo, registry
from quantpatch.recipes.descriptor import Recipe
from quantpatch.testing import computing, storing, tracing  # noqa: F401  (in this order they register checks)
from quantpatch.testing.checks import CHECKS
from quantpatch.testing.subject import Broken, NotApplicable, Subject


def assert_layer_conforms(
    entry: EntryLike,
    build: Callable[[], Any],
    inputs: Callable[[], tuple[Any, ...]],
    *,
    keywords: Mapping[str, Any] | None = None,
    checks: Iterable[str] | None = None,
    skip_checks: Mapping[str, str] | None = None,
    plugins: Iterable[str] | None = None,
    recipe: str | Recipe | None = None,
) -> tuple[str, ...]:
    """Tries a replacement on all that a quantized layer owes its float class.

    ::

        def test_my_layer():
            entry = ("my_package.layers", "MyConv", "my_plugin.layers:QuantMyConv")
            assert_layer_conforms(entry, lambda: MyConv(4, 8), lambda: (torch.randn(2, 4, 5),))

    Args:
        entry: The entry.
        build: Builds the float layer by its ordinary class, small.
        inputs: Returns the positional arguments of a call, as a tuple.
        keywords: Keyword arguments of the call.
        checks: Names of the checks to make; default: all.
        skip_checks: Checks that cannot hold for this layer, by name, each with the reason.
        plugins: Plugins that take part in the blocks besides the built-in one; default: all active ones.
        recipe: Recipe of the blocks; default int8.

    Returns:
        Names of the checks that hold. Those that say nothing about this layer (torch has no half-precision
        kernel for it, say) are not among them.

    Raises:
        CheckError: Some do not hold. The message names each with what was seen and what to change.
        UnknownNameError: There is no check of a name.
    """
    entry = Entry.of(entry)
    example = Example(entry.dotted, build, inputs, keywords=keywords or {}, skip_checks=skip_checks or {})
    names = tuple(CHECKS) if checks is None else tuple(checks)
    subject = Subject(entry, example, None if plugins is None else tuple(plugins), recipe)
    results = {name: _result(name, subject) for name in names}
    failed = {name: result for name, result in results.items() if isinstance(result, CheckError)}
    if failed:
        raise CheckError(
            f"{len(failed)} of {len(names)} checks failed\n" + "\n".join(map(str, failed.values())),
            entry=entry,
            checks=tuple(failed),
        )
    return tuple(name for name, result in results.items() if result is None)


def _result(name: str, subject: Subject) -> CheckError | NotApplicable | None:
    try:
        run_check(name, subject)
    except (CheckError, NotApplicable) as error:
        return error
    return None


def run_check(name: str, subject: Subject) -> None:
    """Makes one check.

    Raises:
        CheckError: It does not hold.
        NotApplicable: It says nothing about this layer, or the example skips it.
        UnknownNameError: There is no such check, or the example skips one that does not exist.
    """
    for given in (name, *subject.example.skip_checks):
        if given not in CHECKS:
            raise UnknownNameError.of("check", given, CHECKS)
    if name in subject.example.skip_checks:
        raise NotApplicable(f"left out: {subject.example.skip_checks[name]}")
    check = CHECKS[name]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what it traces
        warnings.simplefilter("error", QuantPatchWarning)
        try:
            check.function(subject)
        except NotApplicable:
            raise
        except Broken as error:
            raise _failure(name, subject, str(error)) from error
        except Exception as error:
            raise _failure(name, subject, f"it raised {type(error).__name__}: {error}") from error


def _failure(name: str, subject: Subject, what: str) -> CheckError:
    check = CHECKS[name]
    return CheckError(
        f"{subject.entry}, example {str(subject.example)!r}, check {name!r}: "
        f"{(check.function.__doc__ or '').strip()}\n  seen:   {what}\n  change: {check.advice}.",
        entry=subject.entry,
        checks=(name,),
    )


# --- Installed plugins ----------------------------------------------------------------------------


@attrs.frozen
class Trial:
    """One thing to try of an installed plugin.

    Attributes:
        plugin: The plugin's name.
        target: Dotted name of the target, with the example's label in brackets; or of the plugin itself.
        check: Name of the check.
        run: Makes it; raises ``CheckError`` or ``NotApplicable``.
    """

    plugin: str
    target: str
    check: str
    run: Callable[[], None]

    @property
    def name(self) -> str:
        """Unique in a session."""
        return f"{self.plugin}::{self.target}::{self.check}"


def trials(plugins: Iterable[str] = ()) -> list[Trial]:
    """Every check on every example of every entry of the installed plugins.

    A plugin that fails, an entry without an example and an example without an entry are there as trials that
    fail; an entry whose target's package is not installed as one that is skipped.

    Args:
        plugins: Names of the plugins to try; default: all that are not blocked.

    Raises:
        UnknownNameError: There is no plugin of a name.
    """
    found = {info.name: info for info in registry.plugins()}
    wanted = tuple(plugins)
    for name in wanted:
        if name not in found:
            raise UnknownNameError.of("plugin", name, found)
    chosen = [found[n] for n in wanted] if wanted else [i for i in found.values() if i.state != "blocked"]
    return [trial for info in chosen for trial in _trials_of(info)]


def _trials_of(info: PluginInfo) -> list[Trial]:
    if info.state != "active":
        return [_failing(info.name, info.name, f"it is {info.state}: {info.reason}")]
    try:
        examples = registry.examples(info.name)
    except QuantPatchError as error:
        return [_failing(info.name, info.name, str(error))]
    made: list[Trial] = []
    by_target = {entry.dotted: entry for entry in info.entries}
    for example in examples:
        if example.target not in by_target:
            unknown = UnknownNameError.of("target", example.target, by_target)
            made.append(_failing(info.name, example.target, f"an example without an entry: {unknown}"))
    for entry in info.entries:
        own = [example for example in examples if example.target == entry.dotted]
        labels = [example.label for example in own]
        doubled = sorted({label for label in labels if labels.count(label) > 1})
        if doubled:
            made.append(_failing(info.name, entry.dotted, f"several examples labelled {doubled[0]!r}"))
            continue
        absent = _not_installed(entry)
        if absent:
            made.append(_raising(info.name, entry.dotted, NotApplicable(absent)))
        elif not own:
            made.append(_failing(info.name, entry.dotted, _without_example(entry)))
        else:
            plugins = () if info.name == BUILTIN else (info.name,)
            made += [_trial(info.name, Subject(entry, ex, plugins), name) for ex in own for name in CHECKS]
    return made


def _trial(plugin: str, subject: Subject, name: str) -> Trial:
    return Trial(plugin, str(subject.example), name, lambda: run_check(name, subject))


def _raising(plugin: str, target: str, error: Exception) -> Trial:
    def run() -> None:
        raise error

    return Trial(plugin, target, "examples", run)


def _failing(plugin: str, target: str, message: str) -> Trial:
    return _raising(plugin, target, CheckError(message, checks=("examples",)))


def _not_installed(entry: Entry) -> str:
    """Why an entry's target cannot be tried here; empty if it is there."""
    root = entry.module_name.partition(".")[0]
    if entry.loaded_module() is None and importlib.util.find_spec(root) is None:
        return f"{root}, which {entry.dotted} is part of, is not installed"
    if entry.optional and not _exists(entry):
        return f"the {root} that is installed has no {entry.dotted}"
    if inspect.isfunction(getattr(entry.loaded_module(), entry.name, None)):
        return f"{entry.dotted} is a function, and the checks are on layers"
    return ""


def _exists(entry: Entry) -> bool:
    try:
        module = entry.loaded_module() or importlib.import_module(entry.module_name)
    except ModuleNotFoundError:
        return False
    return hasattr(module, entry.name)


def _without_example(entry: Entry) -> str:
    name = entry.name
    return (
        f"{entry} has no example, so nothing is known about it. Say how to build a {name} and what to call "
        f"it with, beside quantpatch_entries:\n"
        f"    @quantpatch.hookimpl\n"
        f"    def quantpatch_examples():\n"
        f"        from {entry.module_name} import {name}\n"
        f"        return [quantpatch.Example({entry.dotted!r}, build=lambda: {name}(...), "
        f"inputs=lambda: (torch.randn(...),))]"
    )
