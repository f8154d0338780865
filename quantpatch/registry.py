"""Find plugins, load them when they are needed, and say whose everything is.

pluggy holds the plugins; what it leaves open is closed here: a plugin that fails is named with its
distribution and can be blocked, a misspelled hook is an error, the order is sorted, and what a hook
returned is known by the plugin that returned it.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import attrs
import pluggy

from quantpatch import hookspecs
from quantpatch.calibrators import Calibrator
from quantpatch.descriptor import QuantDescriptor, Recipe
from quantpatch.entries import Entry, EntryLike
from quantpatch.errors import EntryError, PluginError, QuantPatchError, UnknownNameError
from quantpatch.formats import NumberFormat
from quantpatch.interception import lock

__all__ = ["BUILTIN", "Offer", "PluginInfo", "Registry", "registry"]

BUILTIN = "quantpatch.builtin"
ALLOW_VARIABLE = "QUANTPATCH_PLUGINS"
BLOCK_VARIABLE = "QUANTPATCH_BLOCK"

State = Literal["active", "blocked", "failed"]


@attrs.frozen(cache_hash=True)
class Offer:
    """An entry with its provenance.

    Attributes:
        entry: The entry.
        plugin: Name of the plugin that offers it, or None for one given to a scope as ``custom``.
    """

    entry: Entry
    plugin: str | None

    @property
    def source(self) -> str:
        """Whose it is, for messages."""
        return "custom" if self.plugin is None else f"plugin {self.plugin!r}"


@attrs.frozen
class PluginInfo:
    """A line of ``quantpatch plugins``.

    Attributes:
        name: Name of the entry point.
        distribution: Distribution that brings it, or None if it was registered by hand.
        version: That distribution's version.
        state: Whether it takes part, is blocked, or failed.
        reason: Why it is blocked or how it failed.
        hooks: Names of the hooks it implements, sorted.
        entries: What it offers to replace.
    """

    name: str
    distribution: str | None
    version: str | None
    state: State
    reason: str
    hooks: tuple[str, ...]
    entries: tuple[Entry, ...]


class _Candidate:
    """A plugin that is known, loaded or not."""

    def __init__(
        self, name: str, load: Callable[[], Any], distribution: str | None, version: str | None
    ) -> None:
        self.name = name
        self.load = load
        self.distribution = distribution
        self.version = version
        self.plugin: Any = None
        self.failure: PluginError | None = None
        self.results: dict[str, Any] = {}

    @property
    def provenance(self) -> str | None:
        return f"{self.distribution} {self.version}" if self.distribution else None

    def error(self, what: str, hook: str | None = None) -> PluginError:
        whose = f" (from {self.provenance})" if self.provenance else ""
        return PluginError(
            f"plugin {self.name!r}{whose} {what}. To go on without it, set {BLOCK_VARIABLE}={self.name}",
            plugin=self.name,
            distribution=self.provenance,
            hook=hook,
        )


class Registry:
    """The plugins of a process, by name.

    Args:
        discover: Whether to look for installed plugins (entry points), when first needed.
    """

    def __init__(self, *, discover: bool = True) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._candidates: dict[str, _Candidate] = {}
        self._undiscovered = discover

    # --- what is there -------------------------------------------------------------------------

    def register(self, plugin: Any, name: str) -> None:
        """Adds a plugin by hand, for tests and notebooks; installed ones are found by themselves.

        Raises:
            PluginError: The name is taken, or the plugin misspells a hook.
        """
        known = self._all().get(name)
        if known is not None:
            raise known.error("is registered already, so that no second one can have its name")
        candidate = _Candidate(name, lambda: plugin, None, None)
        if type(plugin).__hash__ is None:  # pluggy keeps plugins in sets, and would complain much later
            raise candidate.error(
                f"is {type(plugin).__name__}, which has no hash; register a module or a class"
            )
        self._candidates[name] = candidate
        try:
            self._load(candidate)
        except PluginError:
            del self._candidates[name]
            raise

    def unregister(self, name: str) -> None:
        """Takes away a plugin that ``register`` added.

        Raises:
            UnknownNameError: There is no such plugin.
        """
        candidate = self._candidates.pop(name, None)
        if candidate is None:
            raise UnknownNameError.of("plugin", name, self._candidates)
        if candidate.plugin is not None:
            self._manager.unregister(candidate.plugin)

    def _all(self) -> dict[str, _Candidate]:
        with lock:
            if self._undiscovered:
                self._discover()
                self._undiscovered = False
            return dict(sorted(self._candidates.items(), key=lambda item: (item[0] != BUILTIN, item[0])))

    def _discover(self) -> None:
        points = importlib.metadata.entry_points(group=hookspecs.PROJECT)
        for point in sorted(points, key=lambda p: (p.name, p.value)):
            dist = point.dist
            found = _Candidate(
                point.name, point.load, dist.name if dist else None, dist.version if dist else None
            )
            taken = self._candidates.setdefault(point.name, found)
            if taken.provenance != found.provenance:
                taken.failure = taken.error(f"has the same name as one from {found.provenance}")

    # --- who takes part ------------------------------------------------------------------------

    def _reason_blocked(self, name: str, only: Iterable[str] | None) -> str:
        if name in _names_in(BLOCK_VARIABLE):
            return f"{BLOCK_VARIABLE} names it"
        if name == BUILTIN:
            return ""
        if ALLOW_VARIABLE in os.environ and name not in _names_in(ALLOW_VARIABLE):
            return f"{ALLOW_VARIABLE} does not name it"
        if only is not None and name not in only:
            return "the scope's plugins=[...] does not name it"
        return ""

    def _active(self, only: Iterable[str] | None = None) -> list[_Candidate]:
        candidates = self._all()
        if only is not None:
            for name in only:
                if name not in candidates:
                    raise UnknownNameError.of("plugin", name, candidates)
        active = [c for name, c in candidates.items() if not self._reason_blocked(name, only)]
        for candidate in active:
            self._load(candidate)
        return active

    def _load(self, candidate: _Candidate) -> None:
        """Imports a plugin and registers its hooks, once.

        Raises:
            PluginError: It cannot be imported or registered (again the same error every time).
        """
        if candidate.failure is not None:
            raise candidate.failure
        if candidate.plugin is not None:
            return
        try:
            plugin = candidate.load()
        except (Exception, SystemExit) as error:
            candidate.failure = candidate.error(f"cannot be imported: {type(error).__name__}: {error}")
            raise candidate.failure from error
        with lock:  # not around the import, which may wait for another thread's
            if candidate.plugin is plugin:  # another thread was faster
                return
            try:
                self._manager.register(plugin, candidate.name)
                self._manager.check_pending()
            except Exception as error:
                if self._manager.has_plugin(candidate.name):
                    self._manager.unregister(name=candidate.name)
                known = ", ".join(name for name in hookspecs.__all__ if name.startswith("quantpatch_"))
                candidate.failure = candidate.error(
                    f"does not fit the hooks: {str(error).splitlines()[-1]}; there are {known}"
                )
                raise candidate.failure from error
            candidate.plugin = plugin

    # --- what they say -------------------------------------------------------------------------

    def _call(self, candidate: _Candidate, hook: str, read: Callable[[Any], Any]) -> Any:
        """What one plugin's hook returned, as ``read`` understands it; called once, then remembered."""
        if hook not in candidate.results:
            others = [c.plugin for c in self._all().values() if c is not candidate and c.plugin is not None]
            with lock:
                caller = self._manager.subset_hook_caller(hook, others)
            try:
                returned = caller()
                # pluggy drops None, but a hook that forgot to return is not one that does not exist.
                result = read(returned[0] if returned else None if caller.get_hookimpls() else ())
            except PluginError:
                raise
            except (Exception, SystemExit) as error:
                raise candidate.error(
                    f"failed in its hook {hook}: {type(error).__name__}: {error}", hook
                ) from error
            candidate.results[hook] = result
        return candidate.results[hook]

    def _offers_of(self, candidate: _Candidate) -> tuple[Offer, ...]:
        hook = "quantpatch_entries"

        def read(returned: Any) -> tuple[Offer, ...]:
            if isinstance(returned, (str, bytes, Entry)) or not isinstance(returned, Iterable):
                raise candidate.error(
                    f"returned {returned!r} from {hook}, expected a list of (module, name, replacement)", hook
                )
            entries = []
            given: EntryLike
            for given in returned:
                try:
                    entries.append(Entry.of(given))
                except EntryError as error:  # noqa: PERF203
                    raise candidate.error(
                        f"returned something else than entries from {hook}: {error}", hook
                    ) from error
            targets = Counter(entry.dotted for entry in entries)
            doubled = sorted(target for target, count in targets.items() if count > 1)
            if doubled:
                raise candidate.error(
                    f"returned more than one entry for {', '.join(doubled)} from {hook}", hook
                )
            return tuple(Offer(entry, candidate.name) for entry in entries)

        offers: tuple[Offer, ...] = self._call(candidate, hook, read)
        return offers

    def _names_of(self, candidate: _Candidate, hook: str, kind: type) -> Mapping[str, Any]:
        def read(returned: Any) -> Mapping[str, Any]:
            if returned == ():
                return {}
            if not isinstance(returned, Mapping):
                raise candidate.error(f"returned {returned!r} from {hook}, expected a mapping by name", hook)
            for name, value in returned.items():
                good = isinstance(value, kind) or (isinstance(value, type) and issubclass(value, kind))
                if not isinstance(name, str) or not good:
                    raise candidate.error(
                        f"returned {name!r}: {value!r} from {hook}, expected a name and a {kind.__name__}",
                        hook,
                    )
            return dict(returned)

        names: Mapping[str, Any] = self._call(candidate, hook, read)
        return names

    def offers(self, plugins: Iterable[str] | None = None) -> tuple[Offer, ...]:
        """Every entry of every active plugin: built-ins first, then plugins by name.

        Args:
            plugins: Names of the plugins that take part besides the built-in one; None: all that the
                environment variables leave.

        Raises:
            PluginError: A plugin failed.
            UnknownNameError: There is no plugin of a name in ``plugins``.
        """
        only = None if plugins is None else tuple(plugins)
        return tuple(offer for c in self._active(only) for offer in self._offers_of(c))

    def named(self, hook: str, kind: type) -> dict[str, Any]:
        """What the active plugins offer under a name through a hook that returns a mapping.

        Args:
            hook: Name of the hook.
            kind: Type that every value is an instance of (or, if it is a class, a subclass of).

        Raises:
            PluginError: A plugin failed, returned something else, or uses another's name.
        """
        found: dict[str, Any] = {}
        owner: dict[str, str] = {}
        for candidate in self._active():
            for name, value in self._names_of(candidate, hook, kind).items():
                if name in found:
                    raise candidate.error(
                        f"returned {name!r} from {hook}, which {owner[name]!r} has already", hook
                    )
                found[name], owner[name] = value, candidate.name
        return found

    def recipe(self, given: str | Recipe) -> Recipe:
        """The recipe of a name; a recipe is its own.

        Raises:
            UnknownNameError: There is no such recipe.
        """
        if isinstance(given, Recipe):
            return given
        recipes: dict[str, Recipe] = self.named("quantpatch_recipes", Recipe)
        try:
            return recipes[given]
        except (KeyError, TypeError):
            raise UnknownNameError.of("recipe", given, recipes) from None

    def format(self, descriptor: QuantDescriptor) -> NumberFormat:
        """The number format that a descriptor means.

        Raises:
            UnknownNameError: It names a format that does not exist.
        """
        if descriptor.number_format is not None:
            return descriptor.number_format
        formats: dict[str, NumberFormat] = self.named("quantpatch_formats", NumberFormat)
        try:
            return formats[str(descriptor.format)]
        except KeyError:
            raise UnknownNameError.of("format", descriptor.format, formats) from None

    def calibrator(self, name: str) -> type[Calibrator]:
        """The calibrator of a name.

        Raises:
            UnknownNameError: There is no such calibrator.
        """
        calibrators: dict[str, type[Calibrator]] = self.named("quantpatch_calibrators", Calibrator)
        try:
            return calibrators[name]
        except (KeyError, TypeError):
            raise UnknownNameError.of("calibrator", name, calibrators) from None

    def plugins(self) -> list[PluginInfo]:
        """Every plugin that is installed or registered, with its state. Blocked ones are not imported."""
        return [self._info(candidate) for candidate in self._all().values()]

    def _info(self, candidate: _Candidate) -> PluginInfo:
        state: State = "active"
        reason = self._reason_blocked(candidate.name, None)
        entries: tuple[Entry, ...] = ()
        hooks: list[str] = []
        if reason:
            state = "blocked"
        else:
            try:
                self._load(candidate)
                callers = self._manager.get_hookcallers(candidate.plugin) or []
                hooks = sorted(caller.name for caller in callers)
                entries = tuple(offer.entry for offer in self._offers_of(candidate))
            except QuantPatchError as error:
                state, reason = "failed", str(error)
        return PluginInfo(
            candidate.name, candidate.distribution, candidate.version, state, reason, tuple(hooks), entries
        )


def _names_in(variable: str) -> frozenset[str]:
    return frozenset(name.strip() for name in os.environ.get(variable, "").split(",") if name.strip())


#: The registry that blocks use.
registry = Registry()
