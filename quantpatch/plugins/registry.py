"""All plugins of a process: which of them take part, and what they offer together.

pluggy holds the plugins; what it leaves open is closed here and in ``quantpatch.plugins``: a plugin that
fails is named with its distribution and can be blocked, a misspelled hook is an error, the order is
sorted, and what a hook returned is known by the plugin that returned it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import attrs
import pluggy

from quantpatch.calibrators import Calibrator
from quantpatch.errors import PluginError, QuantPatchWarning, UnknownNameError, near_misses
from quantpatch.interception.slots import lock
from quantpatch.numerics.formats import NumberFormat
from quantpatch.plugins import hookspecs
from quantpatch.plugins.answers import entries_of, examples_of, imported, names_of
from quantpatch.plugins.entry import Entry
from quantpatch.plugins.environment import ALLOW_VARIABLE, Environment
from quantpatch.plugins.example import Example
from quantpatch.plugins.plugin import BLOCK_VARIABLE, BUILTIN, Plugin, discover
from quantpatch.plugins.runtime import Runtime
from quantpatch.recipes.descriptor import QuantDescriptor, Recipe

T = TypeVar("T")

State = Literal["active", "blocked", "failed"]


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


class Registry:
    """The plugins of a process, by name.

    Args:
        discover: Whether to look for installed plugins (entry points), when first needed.
    """

    def __init__(self, *, discover: bool = True) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._plugins: dict[str, Plugin] = {}
        self._undiscovered = discover
        self._answers: dict[Hashable, Any] = {}  # of plugins, alone and together
        self._warned: set[tuple[str, str]] = set()  # unknown names that a warning has named

    # --- what is there -------------------------------------------------------------------------

    def register(self, plugin: Any, name: str) -> None:
        """Adds a plugin by hand, for tests and notebooks; installed ones are found by themselves.

        Raises:
            PluginError: The name is taken, or the plugin misspells a hook.
        """
        known = self._all().get(name)
        if known is not None:
            raise known.error("is registered already, so that no second one can have its name")
        added = Plugin(name, lambda: plugin)
        added.load(self._manager)
        self._plugins[name] = added
        self._answers.clear()

    def unregister(self, name: str) -> None:
        """Takes away a plugin that ``register`` added.

        Raises:
            PluginError: It is the built-in one.
            UnknownNameError: There is no such plugin.
        """
        if name == BUILTIN:
            raise _indispensable("cannot be removed")
        removed = self._plugins.pop(name, None)
        self._answers.clear()
        if removed is None:
            raise UnknownNameError.of("plugin", name, self._plugins)
        if removed.plugin is not None:
            self._manager.unregister(removed.plugin)

    def _all(self) -> dict[str, Plugin]:
        """Every plugin, the built-in one first, the others by name."""
        with lock:
            if self._undiscovered:
                self._plugins |= discover()
                self._undiscovered = False
            return dict(sorted(self._plugins.items(), key=lambda item: (item[0] != BUILTIN, item[0])))

    # --- who takes part ------------------------------------------------------------------------

    def _active(self, only: Sequence[str] | None = None) -> list[Plugin]:
        """The plugins that take part, loaded."""
        known = self._all()
        unknown = [name for name in only or () if name not in known]
        if unknown:
            raise UnknownNameError.of("plugin", unknown[0], known)
        environment = Environment.read()
        if BUILTIN in environment.blocked:
            raise _indispensable(f"cannot be blocked, as {BLOCK_VARIABLE} asks")
        unknown = sorted((environment.allowed or frozenset()) - set(known))
        if unknown:
            hint = "`quantpatch plugins` lists those that are installed"
            raise UnknownNameError.of(f"plugin in {ALLOW_VARIABLE}", unknown[0], known, hint)
        self._warn_of_unknown(BLOCK_VARIABLE, environment.blocked)
        active = [plugin for name, plugin in known.items() if not environment.reason_blocked(name, only)]
        for plugin in active:
            plugin.load(self._manager)
        return active

    def _warn_of_unknown(self, variable: str, names: frozenset[str]) -> None:
        known = self._all()
        for name in sorted(names - set(known)):
            if (variable, name) not in self._warned:
                self._warned.add((variable, name))
                near = near_misses(name, known)
                message = f"{variable} names {name!r}, and there is no such plugin. {near}"
                warnings.warn(message.rstrip(), QuantPatchWarning, stacklevel=3)

    # --- what they say -------------------------------------------------------------------------

    def _once(self, key: Hashable, find: Callable[[], T]) -> T:
        """What ``find`` gives, which is called once for a key until plugins come or go."""
        try:
            answer: T = self._answers[key]
        except KeyError:
            answer = self._answers.setdefault(key, find())  # another thread may have been first
        return answer

    def _of_all(self, hook: str, find: Callable[[], T], only: tuple[str, ...] | None = None) -> T:
        """The same for what those plugins say together that take part, which the environment decides."""
        if self._undiscovered:
            self._all()
        variables = os.environ.get(BLOCK_VARIABLE), os.environ.get(ALLOW_VARIABLE)
        return self._once((hook, only, variables), find)

    def entries(self, plugins: Iterable[str] | None = None) -> tuple[Entry, ...]:
        """Every entry of every active plugin: built-ins first, then plugins by name.

        Args:
            plugins: Names of the plugins that take part besides the built-in one; None: all that the
                environment variables leave.

        Raises:
            PluginError: A plugin failed.
            UnknownNameError: There is no plugin of a name in ``plugins``.
        """
        only = None if plugins is None else tuple(plugins)
        # The same objects each time: a block that is opened looks each of them up.
        return self._of_all(
            "quantpatch_entries",
            lambda: tuple(entry for p in self._active(only) for entry in self._entries_of(p)),
            only,
        )

    def _entries_of(self, plugin: Plugin) -> tuple[Entry, ...]:
        return self._once((plugin.name, "quantpatch_entries"), lambda: entries_of(plugin, self._manager))

    def examples(self, plugin: str) -> tuple[Example, ...]:
        """How a plugin says to build what it replaces.

        Raises:
            PluginError: The plugin failed, or returned something else.
            UnknownNameError: There is no such plugin.
        """
        known = self._all()
        if plugin not in known:
            raise UnknownNameError.of("plugin", plugin, known)
        known[plugin].load(self._manager)
        return self._once((plugin, "quantpatch_examples"), lambda: examples_of(known[plugin], self._manager))

    def named(self, hook: str, kind: type | tuple[type, ...]) -> dict[str, Any]:
        """What the active plugins offer under a name through a hook that returns a mapping.

        Args:
            hook: Name of the hook.
            kind: Type that every value is an instance of (or, if it is a class, a subclass of); or several.

        Raises:
            PluginError: A plugin failed, returned something else, or uses another's name.
        """
        return {name: value for name, (value, _) in self._named(hook, kind).items()}

    def _named(self, hook: str, kind: type | tuple[type, ...]) -> dict[str, tuple[Any, str]]:
        """The same, each with the name of its plugin."""

        def find() -> dict[str, tuple[Any, str]]:
            found: dict[str, tuple[Any, str]] = {}
            for plugin in self._active():
                names = self._names_of(plugin, hook, kind)
                for name, value in names.items():
                    if name in found:
                        raise plugin.error(
                            f"returned {name!r} from {hook}, which {found[name][1]!r} has already", hook
                        )
                    found[name] = value, plugin.name
            return found

        return self._of_all(hook, find)

    def _names_of(self, plugin: Plugin, hook: str, kind: type | tuple[type, ...]) -> Mapping[str, Any]:
        return self._once((plugin.name, hook), lambda: names_of(plugin, self._manager, hook, kind))

    def recipes(self) -> dict[str, tuple[Recipe, str]]:
        """Every recipe by its name, with the plugin that offers it.

        Raises:
            PluginError: A plugin failed.
        """
        return self._named("quantpatch_recipes", Recipe)

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
            hint = "Or make one: Recipe(name='mine', input=QuantDescriptor(...))"
            if isinstance(given, str):  # that of a class has a capital, that of a recipe has none
                is_class = given.rpartition(".")[2][:1].isupper()
                hint = f"A layer to leave float is given as skip=[{given!r}]" if is_class else ""
            raise UnknownNameError.of("recipe", given, recipes, hint) from None

    def format(self, descriptor: QuantDescriptor) -> NumberFormat:
        """The number format that a descriptor means.

        Raises:
            UnknownNameError: It names a format that does not exist.
        """
        if descriptor.number_format is not None:
            return descriptor.number_format
        name = str(descriptor.format)
        formats: dict[str, NumberFormat] = self.named("quantpatch_formats", NumberFormat)
        if name not in formats:
            raise UnknownNameError.of("format", name, formats)
        return formats[name]

    def offers_format(self, format: NumberFormat) -> str | None:
        """The name of the plugin that offers a format; None if none does."""
        offered = self._named("quantpatch_formats", NumberFormat).values()
        return next((plugin for value, plugin in offered if value == format), None)

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

    def runtime(self, name: str) -> Runtime:
        """The runtime of a name.

        Raises:
            UnknownNameError: There is no such runtime.
        """
        runtimes: dict[str, Runtime] = self.named("quantpatch_runtimes", Runtime)
        try:
            return attrs.evolve(runtimes[name], name=name)
        except (KeyError, TypeError):
            raise UnknownNameError.of("runtime", name, runtimes) from None

    def tuner(self, name: str, base: type) -> type[Any]:
        """The tuner of a name, which is imported if its plugin says only where it is.

        Args:
            name: Its name.
            base: What it has to be a subclass of.

        Raises:
            PluginError: It cannot be imported, or is another kind of thing.
            UnknownNameError: There is no such tuner.
        """
        hook = "quantpatch_tuners"
        tuners = self._named(hook, (base, str))
        if name not in tuners:
            raise UnknownNameError.of("tuning method", name, tuners)
        found, owner = tuners[name]
        if isinstance(found, str):
            plugin = self._all()[owner]
            found = self._once((owner, hook, name), lambda: imported(plugin, hook, found, base))
        return found  # type: ignore[no-any-return]

    def plugins(self) -> list[PluginInfo]:
        """Every plugin that is installed or registered, with its state. Blocked ones are not imported."""
        environment = Environment.read()
        self._warn_of_unknown(BLOCK_VARIABLE, environment.blocked)
        self._warn_of_unknown(ALLOW_VARIABLE, environment.allowed or frozenset())
        return [self._info(p, environment.reason_blocked(p.name)) for p in self._all().values()]

    def _info(self, plugin: Plugin, blocked_because: str) -> PluginInfo:
        state: State = "blocked" if blocked_because else "active"
        reason = blocked_because
        entries: tuple[Entry, ...] = ()
        hooks: tuple[str, ...] = ()
        if not blocked_because:
            try:
                plugin.load(self._manager)
                hooks = plugin.hooks(self._manager)
                entries = self._entries_of(plugin)
                if not hooks:
                    reason = "it implements no hook: mark functions with @quantpatch.hookimpl"
            except PluginError as error:
                state, reason = "failed", str(error)
        return PluginInfo(plugin.name, plugin.distribution, plugin.version, state, reason, hooks, entries)


def _indispensable(what: str) -> PluginError:
    return PluginError(
        f"the plugin {BUILTIN!r} {what}: recipes, formats, calibrators and runtimes come from it, besides "
        f"the layers of torch.nn. To leave such layers float, write quantize_modules(skip=['torch.nn.*']), "
        f"or build them in keep_float(); to use no other plugin, write plugins=[]",
        plugin=BUILTIN,
    )


#: The registry that blocks use.
registry = Registry()


def recipe(name: str | Recipe) -> Recipe:
    """A recipe by its name, to look at or to make another of: ``recipe("int8").replace(output=...)``.

    Args:
        name: Of a recipe of quantpatch's or of a plugin's; ``quantpatch recipes`` lists them. A
            recipe is its own.

    Raises:
        PluginError: A plugin failed.
        UnknownNameError: There is no such recipe.
    """
    return registry.recipe(name)
