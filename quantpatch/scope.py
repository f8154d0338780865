"""``with quantize_modules(): ...`` and ``with keep_float(): ...``."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import attrs

from quantpatch import interception
from quantpatch.descriptor import Recipe
from quantpatch.entries import Entry, EntryLike
from quantpatch.errors import EntryError, QuantPatchWarning, ScopeError
from quantpatch.interception import Activation, Binding, Slot
from quantpatch.lazy_imports import ImportWatch
from quantpatch.recipes import DEFAULT_RECIPE
from quantpatch.registry import Offer, registry
from quantpatch.table import (
    Choice,
    Pattern,
    Table,
    compose,
    load_checked,
    pending_modules,
    replaced_slots,
    slot_of,
)

__all__ = ["Replaced", "Scope", "Skipped", "keep_float", "quantize_modules"]

F = TypeVar("F", bound=Callable[..., Any])


@attrs.frozen
class Replaced:
    """A line of ``scope.replaced``.

    Attributes:
        target: Dotted name of the class or function.
        replacement: Dotted name of what took its place.
        entry: The entry that applied.
        plugin: The plugin it came from; None for an entry given as ``custom``.
        count: How many objects were built (or calls made).
    """

    target: str
    replacement: str
    entry: Entry
    plugin: str | None
    count: int


@attrs.frozen
class Skipped:
    """A line of ``scope.skipped``: what was built in the block and left float.

    Attributes:
        target: Dotted name of the class (or function).
        reason: Why it was left float.
        count: How many objects were built.
    """

    target: str
    reason: str
    count: int


def _dotted(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


class _Opening:
    """What belongs to one opening of a scope: its table, its recipe, and the watch for late imports."""

    def __init__(self, scope: Scope, table: Table, enclosing: Table, recipe: Recipe) -> None:
        self.scope = scope
        self.table = table
        self.inherited = enclosing if scope._floats_all else table  # what a block inside starts from
        self.recipe = recipe
        # Classes that are somebody's target or replacement: not to be reported as mere subclasses.
        self.targets: set[type] = set()
        self.replacements: set[type] = set()
        bindings: dict[Slot, Binding] = {
            slot: self._bind(slot, choice) for slot, choice in replaced_slots(table).items()
        }
        self.activation = Activation(bindings, payload=self)
        waiting = pending_modules(table)
        self.watch = ImportWatch(waiting, self._imported) if waiting else None
        if self.watch is not None:
            self.watch.start()

    def _bind(self, slot: Slot, choice: Choice, *, load: bool = True) -> _Decision:
        replacement = None if choice.float_because or not load else load_checked(choice.offer, slot)
        decision = _Decision(self, slot, choice, replacement)
        if isinstance(slot.target, type):
            self.targets.add(slot.target)
        return decision

    def _imported(self, module: ModuleType) -> None:
        """Takes up the entries that waited for a module."""
        for key, choice in list(self.table.items()):
            if isinstance(key, Slot) or choice.offer.entry.module_name != module.__name__:
                continue
            try:
                slot = slot_of(choice.offer)
            except EntryError as error:  # an exception here would break an import that is not ours
                warnings.warn(f"{error}; nothing was replaced", QuantPatchWarning, stacklevel=2)
                continue
            assert slot is not None
            del self.table[key]
            earlier = self.table.setdefault(slot, choice)
            if earlier is choice:
                # The replacement is imported at its first use: here its own imports may be half done.
                self.activation.bind(slot, self._bind(slot, choice, load=False))
            elif earlier.offer.plugin != choice.offer.plugin:
                warnings.warn(
                    f"{choice.offer.entry.dotted} is replaced by {earlier.offer.source}; the entry of "
                    f"{choice.offer.source} is not used",
                    QuantPatchWarning,
                    stacklevel=2,
                )

    def close(self) -> list[str]:
        """Ends it; returns the names of targets whose hook somebody else has displaced."""
        displaced = [c.offer.entry.dotted for s, c in replaced_slots(self.table).items() if s.is_displaced()]
        if self.watch is not None:
            self.watch.stop()
        self.activation.close()
        return displaced


class _Decision(Binding):
    """What an opening does about one target; counts what it did in the scope."""

    __slots__ = ("choice", "opening", "replacement", "slot")

    def __init__(self, opening: _Opening, slot: Slot, choice: Choice, replacement: Any) -> None:
        self.opening = opening
        self.slot = slot
        self.choice = choice
        self.replacement = replacement
        if isinstance(replacement, type):
            opening.replacements.add(replacement)

    def replacement_for(self, cls: type | None) -> Any | None:
        scope = self.opening.scope
        if cls is not None and cls is not self.slot.target:
            if self._is_mere_subclass(cls):
                target = self.choice.offer.entry.dotted
                scope._count((cls, f"a subclass of {target}, for which there is no entry"))
            return None
        if self.choice.float_because:
            scope._count((self.slot.target, self.choice.float_because))
            return None
        if self.replacement is None:
            self.replacement = load_checked(self.choice.offer, self.slot)
            if isinstance(self.replacement, type):
                self.opening.replacements.add(self.replacement)
        scope._count((self.choice.offer, self.replacement))
        return self.replacement

    def _is_mere_subclass(self, cls: type) -> bool:
        opening = self.opening
        if not opening.replacements.isdisjoint(cls.__mro__):
            return False
        return next(base for base in cls.__mro__ if base in opening.targets) is self.slot.target


class Scope:
    """A block in which layers come out quantized; made by ``quantize_modules`` or ``keep_float``.

    A context manager, a decorator, or (``start``/``stop``) a setting of the whole process. The same
    object can be entered again, also inside itself and in several threads.
    """

    def __init__(
        self,
        *,
        skip: Sequence[Pattern] = (),
        custom: Sequence[EntryLike] = (),
        recipe: str | Recipe | None = None,
        plugins: Sequence[str] | None = None,
        include: Sequence[Pattern] = (),
        floats_all: bool = False,
    ) -> None:
        self._skip = tuple(skip)
        self._custom = tuple(custom)
        self._recipe = recipe
        self._plugins = None if plugins is None else tuple(plugins)
        self._include = tuple(include)
        self._floats_all = floats_all
        self._openings: list[_Opening] = []
        self._started: _Opening | None = None
        self._counts: Counter[tuple[Any, Any]] = Counter()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        if self._floats_all:
            return "keep_float()"
        given = {
            name: getattr(self, f"_{name}") for name in ("skip", "custom", "recipe", "plugins", "include")
        }
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value not in ((), None))
        return f"quantize_modules({shown})"

    # --- opening and closing -------------------------------------------------------------------

    def _open(self) -> _Opening:
        around = interception.current()
        outer: _Opening | None = None if around is None else around.payload
        enclosing: Table = {} if outer is None else outer.inherited
        if self._floats_all:
            table = {k: attrs.evolve(c, float_because="keep_float()") for k, c in enclosing.items()}
            return _Opening(self, table, enclosing, DEFAULT_RECIPE if outer is None else outer.recipe)
        recipe = registry.recipe(self._recipe or (DEFAULT_RECIPE if outer is None else outer.recipe))
        # A block inside another adds the plugins it names; otherwise what it starts from says it all.
        fresh = not enclosing or self._plugins is not None
        table = compose(
            enclosing,
            registry.offers(self._plugins) if fresh else (),
            plugins=self._plugins,
            skip=self._skip,
            include=(*recipe.include, *self._include),
            custom=self._custom,
        )
        return _Opening(self, table, enclosing, recipe)

    def __enter__(self) -> Scope:
        opening = self._open()
        with self._lock:
            self._openings.append(opening)
        opening.activation.enter()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(self._opening_here(), warn=exc is None)

    def _opening_here(self) -> _Opening:
        """The innermost opening of this scope in the current context.

        An asynchronous generator may be closed in another context than it was opened in; then it is
        the one opened last.
        """
        activation = interception.current_in_context()
        while activation is not None:
            if not activation.closed and activation.payload in self._openings:
                found: _Opening = activation.payload
                return found
            activation = activation.parent
        with self._lock:
            if not self._openings:
                raise ScopeError(f"{self!r} is left without having been entered")
            return self._openings[-1]

    def _close(self, opening: _Opening, *, warn: bool) -> None:
        with self._lock:
            self._openings.remove(opening)
        displaced = opening.close()
        if displaced and warn:  # never in the way of an exception of the body
            warnings.warn(
                f"while {self!r} was open, other code replaced the __init__ of {', '.join(displaced)} for "
                f"good: what was built afterwards may be float; audit the model",
                QuantPatchWarning,
                stacklevel=3,
            )

    def start(self) -> Scope:
        """Opens the block for the whole process, in every context that has no block of its own.

        Raises:
            ScopeError: It is started already.
        """
        if self._started is not None:
            raise ScopeError(f"{self!r}.start() was called twice; call stop() in between")
        opening = self._open()
        with self._lock:
            self._openings.append(opening)
        interception.start(opening.activation)
        self._started = opening
        return self

    def stop(self) -> None:
        """Ends what ``start`` began.

        Raises:
            ScopeError: It is not started.
        """
        opening, self._started = self._started, None
        if opening is None:
            raise ScopeError(
                f"{self!r}.stop() without start(); keep the scope that was started: "
                f"scope = quantize_modules(); scope.start(); ...; scope.stop()"
            )
        interception.stop(opening.activation)
        self._close(opening, warn=True)

    # --- as a decorator ------------------------------------------------------------------------

    def __call__(self, function: F) -> F:
        """Runs every call of a function, plain or ``async``, in a fresh block of the same settings.

        Raises:
            ScopeError: It is a class or a generator function.
        """
        if isinstance(function, type):
            raise ScopeError(
                f"{self!r} cannot decorate the class {function.__qualname__}: it is not clear which of its "
                f"code should run in the block. Decorate the function that builds it, or its __init__"
            )
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ScopeError(
                f"{self!r} cannot decorate the generator function {function.__qualname__}: the block would "
                f"be open in the caller's code between two yields. Put a with-block inside it"
            )
        if not callable(function):
            raise ScopeError(f"{self!r} decorates functions, not {function!r}")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                with self._fresh():
                    return await function(*args, **kwargs)

            return run_async  # type: ignore[return-value]

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._fresh():
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    def _fresh(self) -> Scope:
        return Scope(
            skip=self._skip,
            custom=self._custom,
            recipe=self._recipe,
            plugins=self._plugins,
            include=self._include,
            floats_all=self._floats_all,
        )

    # --- what came out -------------------------------------------------------------------------

    def _count(self, what: tuple[Any, Any]) -> None:
        with self._lock:
            self._counts[what] += 1

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        """What was replaced in this scope so far, by which entry and plugin, and how often."""
        with self._lock:
            counts = list(self._counts.items())
        return tuple(
            Replaced(source.entry.dotted, _dotted(what), source.entry, source.plugin, count)
            for (source, what), count in counts
            if isinstance(source, Offer)
        )

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What was built in this scope so far and left float, why, and how often."""
        with self._lock:
            counts = list(self._counts.items())
        return tuple(
            Skipped(_dotted(source), what, count)
            for (source, what), count in counts
            if not isinstance(source, Offer)
        )


def _several(given: Any, argument: str, single: tuple[type, ...]) -> tuple[Any, ...]:
    """A sequence, where one item may be given bare."""
    if isinstance(given, single):
        return (given,)
    if isinstance(given, Iterable) and not isinstance(given, (bytes, dict)):
        return tuple(given)
    hint = "; write @quantize_modules() with parentheses" if inspect.isfunction(given) else ""
    raise ScopeError(f"{argument} takes a list, not {given!r}{hint}")


def quantize_modules(
    skip: Iterable[Pattern] | Pattern = (),
    custom: Iterable[EntryLike] = (),
    recipe: str | Recipe | None = None,
    plugins: Iterable[str] | None = None,
    *,
    include: Iterable[Pattern] | Pattern = (),
) -> Scope:
    """Every layer constructed inside the block comes out as its quantized version.

    ::

        with quantize_modules(skip=["ConvTranspose2d"], recipe="int8") as scope:
            model = build_model()

    The class itself is watched, not its name: it does not matter how the code imported its layers.
    Only this thread (or asyncio task) is concerned; when the block ends, PyTorch is exactly what it
    was. Inside another block, this one starts from what the other replaces.

    Args:
        skip: Targets to leave float: class names (``"Linear"``), dotted names (``"torch.nn.Linear"``),
            globs (``"AvgPool*"``) or classes.
        custom: Entries ``(module, name, replacement)`` of your own; they override plugins and
            built-ins, and ``skip`` does not remove them.
        recipe: How to quantize: a recipe or its name. Default: that of the enclosing block, else int8.
        plugins: Names of the installed plugins that take part; default: all of them.
        include: Targets that are left float by default and that you want replaced, such as
            ``"Embedding"``.

    Returns:
        The scope: a context manager, a decorator of functions, or something to ``start()`` and
        ``stop()``. Its ``replaced`` and ``skipped`` tell what came out of the block.

    Raises:
        EntryError: An entry cannot be used (on entering the block; nothing is replaced then).
        EntryConflictError: Two plugins replace the same target.
        PluginError: A plugin failed.
        UnknownNameError: Nothing goes by a name in ``skip``, ``include``, ``recipe`` or ``plugins``.
    """
    return Scope(
        skip=_several(skip, "skip", (str, type)),
        custom=_several(custom, "custom", (Entry,)),
        recipe=recipe,
        plugins=None if plugins is None else _several(plugins, "plugins", (str,)),
        include=_several(include, "include", (str, type)),
    )


def keep_float() -> Scope:
    """A block in which nothing is replaced, whatever blocks are around it.

    A ``quantize_modules()`` inside it starts again from what was replaced around it.
    """
    return Scope(floats_all=True)
