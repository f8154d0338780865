"""What the hooks of one plugin return, checked; whatever is wrong with it is the plugin's ``PluginError``.

Nothing is remembered here: the registry does that.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
import pluggy

from quantpatch.errors import EntryError, PluginError, listed
from quantpatch.interception.slots import lock
from quantpatch.plugins.entry import Entry, EntryLike
from quantpatch.plugins.example import Example
from quantpatch.plugins.plugin import Plugin
from quantpatch.torch_tools import debug_trace
from quantpatch.torch_tools.raised import is_from_outside, said


def entries_of(plugin: Plugin, manager: pluggy.PluginManager) -> tuple[Entry, ...]:
    """What it offers to replace.

    Raises:
        PluginError: Its hook failed or returned something other than entries.
    """
    hook = "quantpatch_entries"
    entries = []
    given: EntryLike
    with _answers(plugin, manager, hook) as (returned, shown):
        for several in returned:
            if isinstance(several, (str, bytes, Entry)) or not isinstance(several, Iterable):
                raise plugin.error(
                    f"returned {several!r} from {hook}, expected a list of (module, name, replacement)", hook
                )
        for given in itertools.chain.from_iterable(returned):
            try:
                entries.append(Entry.of(given))
            except EntryError as error:  # noqa: PERF203
                raise plugin.error(
                    f"returned something other than entries from {hook}: {error}", hook
                ) from error
        targets = Counter(entry.dotted for entry in entries)
        doubled = sorted(target for target, count in targets.items() if count > 1)
        if doubled:
            raise plugin.error(f"returned more than one entry for {', '.join(doubled)} from {hook}", hook)
        shown += entries
    return tuple(attrs.evolve(entry, plugin=plugin.name) for entry in entries)


def examples_of(plugin: Plugin, manager: pluggy.PluginManager) -> tuple[Example, ...]:
    """How it says to build what it replaces.

    Raises:
        PluginError: Its hook failed or returned something else than examples.
    """
    hook = "quantpatch_examples"
    with _answers(plugin, manager, hook) as (returned, shown):
        several = (given if isinstance(given, Iterable) else (given,) for given in returned)
        found = tuple(itertools.chain.from_iterable(several))
        for example in found:
            if not isinstance(example, Example):
                raise plugin.error(
                    f"returned {example!r} from {hook}, expected Example(target, build, inputs)", hook
                )
        shown += found
    return found


def names_of(
    plugin: Plugin, manager: pluggy.PluginManager, hook: str, kind: type | tuple[type, ...]
) -> Mapping[str, Any]:
    """What it offers by name through a hook that returns a mapping.

    Raises:
        PluginError: Its hook failed or returned something else.
    """
    found: dict[str, Any] = {}
    kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
    with _answers(plugin, manager, hook) as (returned, shown):
        for given in returned:
            if not isinstance(given, Mapping):
                raise plugin.error(f"returned {given!r} from {hook}, expected a mapping by name", hook)
            for name, value in given.items():
                good = isinstance(value, kind) or (isinstance(value, type) and issubclass(value, kind))
                if not isinstance(name, str) or not good:
                    raise plugin.error(
                        f"returned {name!r}: {value!r} from {hook}, expected a name and a {kinds}",
                        hook,
                    )
                if name in found:
                    raise plugin.error(f"returned {name!r} from {hook} twice", hook)
                found[name] = value
        shown += found
    return found


def imported(plugin: Plugin, hook: str, where: str, base: type) -> type[Any]:
    """The class of which it said only where it is, ``"package.module:ClassName"``.

    Raises:
        PluginError: It is not there, or no subclass of what is asked for.
    """
    module, _, name = where.partition(":")
    with _asking(plugin, hook):
        found = getattr(importlib.import_module(module), name)
    if not isinstance(found, type) or not issubclass(found, base):
        raise plugin.error(
            f"returned {where!r} from {hook}, which is {found!r}, expected a {base.__name__}", hook
        )
    return found


@contextlib.contextmanager
def _answers(
    plugin: Plugin, manager: pluggy.PluginManager, hook: str
) -> Iterator[tuple[list[Any], list[Any]]]:
    """What its implementations of a hook returned, to be read inside, and a list of what is found in it."""
    caller = _caller(plugin, manager, hook)
    count = len(caller.get_hookimpls())
    found: list[Any] = []
    if not count:
        yield [], found
        return
    with _asking(plugin, hook), debug_trace.timed(f"plugin {plugin.name!r}: {hook}()") as results:
        returned = caller()
        # pluggy drops None, but a hook that forgot to return is not one that does not exist.
        yield [*returned, *[None] * (count - len(returned))], found
        results.append(listed(found, limit=4) or "nothing")


@contextlib.contextmanager
def _asking(plugin: Plugin, hook: str) -> Iterator[None]:
    """Gives the plugin's name to whatever its hook raises."""
    try:
        yield
    except PluginError:
        raise
    except BaseException as error:
        if is_from_outside(error):
            raise
        raise plugin.error(f"failed in its hook {hook}: {said(error)}", hook) from error


def _caller(plugin: Plugin, manager: pluggy.PluginManager, hook: str) -> pluggy.HookCaller:
    """Calls the hook of this plugin alone."""
    with lock:
        others = [other for other in manager.get_plugins() if other is not plugin.plugin]
        return manager.subset_hook_caller(hook, others)
