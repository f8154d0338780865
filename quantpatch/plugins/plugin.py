"""One plugin: imported when it is needed, and checked for fitting this quantpatch and its hooks.

Whatever is wrong with a plugin becomes a ``PluginError`` with its name, its distribution and what to do. What
it is or does that cannot be is remembered; an import that fails is tried again when it is next needed.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
import re
from collections.abc import Callable
from typing import Any

import pluggy

from quantpatch.errors import PluginError, listed, shown, warn_caller
from quantpatch.interception.slots import lock
from quantpatch.interception.torch_state import Trace, protected
from quantpatch.plugins import hookspecs
from quantpatch.torch_tools import debug_trace
from quantpatch.torch_tools.atomic_files import own_version
from quantpatch.torch_tools.raised import is_from_outside, said

BUILTIN = "quantpatch.builtin"
BLOCK_VARIABLE = "QUANTPATCH_BLOCK"


# Characters of a message; what a plugin says of itself may be of any length.
_LONGEST = 4000
HOOKS = tuple(name for name in hookspecs.__all__ if name.startswith("quantpatch_"))

# A line of a distribution's requirements that is about quantpatch itself.
_IS_OURS = re.compile(r"quantpatch(?![\w.-])", re.IGNORECASE).match


class Plugin:
    """A plugin that is known, imported or not.

    Args:
        name: Name of the entry point.
        get: Imports it.
        where: What the entry point names, ``"package.module"``; empty if it was registered by hand.
        dist: The distribution that brings it, or None if it was registered by hand.

    Attributes:
        distribution: That distribution's name.
        version: That distribution's version.
        plugin: The module or object with the hooks, once it is loaded.
        failure: Why it cannot take part, once that is known.
    """

    def __init__(
        self,
        name: str,
        get: Callable[[], Any],
        *,
        where: str = "",
        dist: importlib.metadata.Distribution | None = None,
    ) -> None:
        self.name = name
        self.where = where
        self.distribution = dist.name if dist else None
        self.version = dist.version if dist else None
        self.plugin: Any = None
        self.failure: PluginError | None = None
        self._get = get
        self._dist = dist

    def __repr__(self) -> str:
        return f"plugin {self.name!r}{self._whose}"

    @property
    def provenance(self) -> str | None:
        """Name and version of its distribution."""
        return f"{self.distribution} {self.version}" if self.distribution else None

    @property
    def _whose(self) -> str:
        return f" (from {self.provenance})" if self.provenance else ""

    def error(self, what: str, hook: str | None = None) -> PluginError:
        """The error that says what is wrong with it, whose it is, and how to go on without it."""
        message = f"{self!r} {what}. To go on without it, set {BLOCK_VARIABLE}={self.name}"
        return PluginError(
            shown(message, _LONGEST, keep="\n"),
            plugin=self.name,
            distribution=self.provenance,
            hook=hook,
        )

    # --- loading -------------------------------------------------------------------------------

    def load(self, manager: pluggy.PluginManager) -> None:
        """Imports it and registers its hooks, once.

        Raises:
            PluginError: It cannot be imported, changes torch, is written for another version of the
                plugin API, or does not fit the hooks.
        """
        if self.failure is not None:
            raise self.failure
        if self.plugin is not None:
            return
        plugin = self._import()
        try:
            self._check_api(plugin)
        except PluginError as error:
            self.failure = error
            raise
        with lock:  # not around the import, which may wait for another thread's
            if self.plugin is None:  # else another thread was faster
                self._register(plugin, manager)
                self.plugin = plugin

    def _import(self) -> Any:
        changes: list[Trace] = []
        try:
            with debug_trace.timed(f"{self!r} imported"):
                if self.name == BUILTIN or not self.where:
                    return self._get()
                with protected(changes):
                    plugin = self._get()
        except BaseException as error:
            if is_from_outside(error):
                raise
            raise self.error(f"cannot be imported: {said(error)}{self._hint(error)}") from error
        if changes:
            what = listed(changes)
            # Remembered, since the module will not be run again.
            self.failure = self.error(
                f"changes PyTorch when it is imported: {what}. That was taken back. A plugin replaces "
                f"classes and functions by returning entries from its hook quantpatch_entries"
            )
            raise self.failure
        return plugin

    def _hint(self, error: BaseException) -> str:
        """What to do about an import that fails."""
        missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
        if not missing:
            return ""
        if missing.partition(".")[0] != "quantpatch":
            return f". Install what brings the module {missing!r}"
        required = [line for line in (self._dist.requires if self._dist else None) or () if _IS_OURS(line)]
        wants = f" ({self.distribution} requires {required[0]})" if required else ""
        return (
            f". It is written for another quantpatch{wants}; this is {own_version()}, with version "
            f"{hookspecs.API_VERSION} of the plugin API. Install versions that go together"
        )

    def _check_api(self, plugin: Any) -> None:
        stated = getattr(plugin, "quantpatch_api", (1, 1))
        match stated:
            case (int(oldest), int(newest)) if 1 <= oldest <= newest:
                pass
            case _:
                raise self.error(
                    f"states quantpatch_api = {stated!r}; expected the oldest and the newest version of the "
                    f"plugin API that it works with: quantpatch_api = (1, {hookspecs.API_VERSION})"
                )
        ours = hookspecs.API_VERSION
        if oldest <= ours <= newest:
            return
        versions = f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"
        update = "quantpatch" if ours < oldest else self.distribution or "the plugin"
        raise self.error(
            f"is written for {versions} of the plugin API, and this quantpatch ({own_version()}) has version "
            f"{ours}. Update {update}: pip install --upgrade {update}"
        )

    def _register(self, plugin: Any, manager: pluggy.PluginManager) -> None:
        if type(plugin).__hash__ is None:  # pluggy keeps plugins in sets, and would complain much later
            self.failure = self.error(
                f"is {type(plugin).__name__}, which has no hash; register a module or a class"
            )
            raise self.failure
        other = manager.get_name(plugin)
        if other is not None:
            self.failure = self.error(
                f"is the same module as plugin {other!r}: two entry points name {self.where}. Remove one"
            )
            raise self.failure
        try:
            manager.register(plugin, self.name)
            manager.check_pending()
        except Exception as error:
            if manager.has_plugin(self.name):
                manager.unregister(name=self.name)
            self.failure = self.error(
                f"does not fit the hooks: {str(error).splitlines()[-1]}; there are {', '.join(HOOKS)}"
            )
            raise self.failure from error
        self._check_marks(plugin, manager)
        if self.where and not manager.get_hookcallers(plugin):
            warn_caller(
                f"{self!r} implements no hook, so that it does nothing: mark the functions of {self.where} "
                f"that are hooks with @quantpatch.hookimpl; there are {', '.join(HOOKS)}"
            )

    def _check_marks(self, plugin: Any, manager: pluggy.PluginManager) -> None:
        """A function with the name of a hook that is not marked as one would never be called."""
        for name in dir(plugin):
            if not name.startswith(f"{hookspecs.PROJECT}_"):
                continue
            function = inspect.getattr_static(plugin, name)
            function = getattr(function, "__func__", function)
            if not inspect.isfunction(function) or hasattr(function, f"{hookspecs.PROJECT}_impl"):
                continue
            if name in HOOKS:
                manager.unregister(name=self.name)
                self.failure = self.error(
                    f"has a function {name} that is not marked as a hook, so that it would never be called. "
                    f"Write @quantpatch.hookimpl above its `def {name}`"
                )
                raise self.failure
            # Without what all have in common, which would make any two alike.
            own, prefix = {hook.partition("_")[2]: hook for hook in HOOKS}, f"{hookspecs.PROJECT}_"
            near = [own[n] for n in difflib.get_close_matches(name.removeprefix(prefix), own, 1, 0.8)]
            if near:
                warn_caller(
                    f"{self!r} has a function {name}, which is not called: there is no such hook, and it is "
                    f"not marked as one. If it is to be {near[0]}, write @quantpatch.hookimpl above "
                    f"`def {near[0]}`"
                )

    def hooks(self, manager: pluggy.PluginManager) -> tuple[str, ...]:
        """Names of the hooks it implements, sorted."""
        return tuple(sorted(caller.name for caller in manager.get_hookcallers(self.plugin) or []))


def discover() -> dict[str, Plugin]:
    """The plugins of the installed distributions, by name. Nothing is imported.

    Of several with one name there is one, which fails and names the others.
    """
    found: dict[str, Plugin] = {}
    points = importlib.metadata.entry_points(group=hookspecs.PROJECT)
    for point in sorted(points, key=lambda p: (p.name, p.dist.name if p.dist else "", p.value)):
        plugin = Plugin(point.name, point.load, where=point.value, dist=point.dist)
        taken = found.setdefault(point.name, plugin)
        if taken.provenance != plugin.provenance:
            taken.failure = taken.error(f"has the same name as one from {plugin.provenance}. Uninstall one")
        elif taken.where != plugin.where:
            taken.failure = taken.error(
                f"is declared twice, as {taken.where} and as {plugin.where}. Give one of them another name"
            )
    return found
