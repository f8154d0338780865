"""``with quantize_modules(): ...`` and ``with keep_float(): ...``."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from quantpatch import interception, tracing
from quantpatch.classes import dotted
from quantpatch.descriptor import Recipe
from quantpatch.entries import Entry, EntryLike
from quantpatch.errors import EntryError, QuantPatchWarning, ScopeError
from quantpatch.interception import Activation, Policy, Slot
from quantpatch.lazy_imports import ImportWatch
from quantpatch.outcome import Outcome, Replaced, Skipped
from quantpatch.recipes import DEFAULT_RECIPE
from quantpatch.registry import registry
from quantpatch.table import Choice, Key, Pattern, Table, compose, load, load_all, outermost, slot_of

__all__ = ["Scope", "keep_float", "quantize_modules"]

F = TypeVar("F", bound=Callable[..., Any])


class _Opening(Policy):
    """What belongs to one opening of a scope: its table, its recipe, and the watch for late imports."""

    def __init__(self, scope: Scope, table: Table, recipe: Recipe) -> None:
        self.scope = scope
        self.table = table  # may be another opening's as well: copied before it is changed
        self.recipe = recipe
        waiting = {c.offer.entry.module_name for key, c in table.items() if isinstance(key, str)}
        self.activation = Activation([key for key in table if not isinstance(key, str)], payload=self)
        self.watch = ImportWatch(waiting, self._imported) if waiting else None
        if self.watch is not None:
            self.watch.start()
        if tracing.is_on():
            self._say_what_it_replaces()

    def _say_what_it_replaces(self) -> None:
        choices = self.table.values()
        float_ = sum(bool(self.scope._float_because or choice.float_because) for choice in choices)
        later = f"; waits for {', '.join(sorted(self.watch.names))}" if self.watch is not None else ""
        tracing.say(
            f"{self.scope!r} opened, recipe {self.recipe.name}: replaces {len(choices) - float_} targets, "
            f"leaves {float_} float{later}"
        )

    def replacement_for(self, slot: Slot, cls: type | None) -> Any | None:
        choice = self.table.get(slot)
        if choice is None:
            return None
        scope = self.scope
        if cls is not None and cls is not slot.target:
            if self._is_mere_subclass(slot, cls):
                target = choice.offer.entry.dotted
                scope._outcome.count(dotted(cls), f"a subclass of {target}, for which there is no entry")
            return None
        because = scope._float_because or choice.float_because
        if not because and choice.replacement is None:  # imported since the block was opened
            choice = load(slot, choice)
            self._put(slot, choice)
        scope._outcome.count(choice.offer, because)
        return None if because else choice.replacement

    def _is_mere_subclass(self, slot: Slot, cls: type) -> bool:
        """Whether it comes out float, and there is no nearer base that tells of it."""
        if any(choice.replacement in cls.__mro__ for choice in self.table.values()):
            return False
        targets = {key.target for key in self.table if isinstance(key, Slot)}
        return next(base for base in cls.__mro__ if base in targets) is slot.target

    def _put(self, key: Slot, choice: Choice, instead_of: Key | None = None) -> None:
        with interception.lock:
            table = {k: c for k, c in self.table.items() if k != instead_of}
            table[key] = choice
            self.table = table

    def _imported(self, module: ModuleType) -> None:
        """Takes up the entries that waited for a module."""
        for key, choice in self.table.items():
            if isinstance(key, Slot) or choice.offer.entry.module_name != module.__name__:
                continue
            try:
                slot = slot_of(choice.offer)
            except EntryError as error:  # an exception here would break an import that is not ours
                warnings.warn(f"{error}; nothing was replaced", QuantPatchWarning, stacklevel=2)
                continue
            assert slot is not None
            earlier = self.table.get(slot)
            # The replacement is imported at its first use: here its own imports may be half done.
            self._put(slot, earlier or choice, instead_of=key)
            self.activation.add(slot)
            if earlier is not None and earlier.offer.plugin != choice.offer.plugin:
                warnings.warn(
                    f"{choice.offer.entry.dotted} is replaced by {earlier.offer.source}; the entry of "
                    f"{choice.offer.source} is not used",
                    QuantPatchWarning,
                    stacklevel=2,
                )

    def close(self) -> list[str]:
        """Ends it; returns the names of targets whose hook somebody else has displaced."""
        if self.watch is not None:
            self.watch.stop()
        return sorted(self.table[slot].offer.entry.dotted for slot in self.activation.close())


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
        float_because: str = "",
    ) -> None:
        self._skip = tuple(skip)
        self._custom = tuple(custom)
        self._recipe = recipe
        self._plugins = None if plugins is None else tuple(plugins)
        self._include = tuple(include)
        self._float_because = float_because  # if not empty, nothing is replaced
        self._openings: list[_Opening] = []
        self._started: _Opening | None = None
        self._outcome = Outcome()

    def __repr__(self) -> str:
        if self._float_because:
            return self._float_because
        given = {
            name: getattr(self, f"_{name}") for name in ("skip", "custom", "recipe", "plugins", "include")
        }
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if value not in ((), None))
        return f"quantize_modules({shown})"

    # --- opening and closing -------------------------------------------------------------------

    def _open(self) -> _Opening:
        around = interception.current()
        outer: _Opening | None = None if around is None else around.payload
        enclosing: Table = {} if outer is None else outer.table
        recipe: str | Recipe = DEFAULT_RECIPE if outer is None else outer.recipe
        if self._float_because:
            return _Opening(self, enclosing, registry.recipe(recipe))
        recipe = registry.recipe(recipe if self._recipe is None else self._recipe)
        include = (*recipe.include, *self._include)
        if not enclosing and not self._custom:
            table = outermost(registry.offers(self._plugins), self._plugins, self._skip, include)
        else:
            # A block inside another adds the plugins it names; otherwise what it starts from says it all.
            fresh = not enclosing or self._plugins is not None
            table = load_all(
                compose(
                    enclosing,
                    registry.offers(self._plugins) if fresh else (),
                    plugins=self._plugins,
                    skip=self._skip,
                    include=include,
                    custom=self._custom,
                )
            )
        return _Opening(self, table, recipe)

    def __enter__(self) -> Scope:
        opening = self._open()
        with interception.lock:
            self._openings.append(opening)
        opening.activation.enter()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        opening = self._opening_here()
        with interception.lock:
            self._openings.remove(opening)
        self._close(opening, warn=exc is None)

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
        with interception.lock:
            if not self._openings:
                raise ScopeError(f"{self!r} is left without having been entered")
            return self._openings[-1]

    def _close(self, opening: _Opening, *, warn: bool) -> None:
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
        self._started = opening = self._open()
        opening.activation.start()
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
        if not callable(function):
            raise ScopeError(f"{self!r} decorates functions, not {function!r}")
        # Of an object that is called like a function, its class has the code.
        calls = (function, type(function).__call__)
        if any(inspect.isgeneratorfunction(call) or inspect.isasyncgenfunction(call) for call in calls):
            raise ScopeError(
                f"{self!r} cannot decorate the generator function {function!r}: the block would be open in "
                f"the caller's code between two yields. Put a with-block inside it"
            )
        if any(inspect.iscoroutinefunction(call) for call in calls):

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
            float_because=self._float_because,
        )

    # --- what came out -------------------------------------------------------------------------

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        """What was replaced in this scope so far, by which entry and plugin, and how often."""
        return self._outcome.replaced

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What was built in this scope so far and left float, why, and how often."""
        return self._outcome.skipped


def _several(given: Any, argument: str, single: tuple[type, ...]) -> tuple[Any, ...]:
    """A sequence, where one item may be given bare."""
    if isinstance(given, single):
        return (given,)
    if isinstance(given, Iterable) and not isinstance(given, (bytes, dict)):
        return tuple(given)
    hint = "; write @quantize_modules() with parentheses" if inspect.isfunction(given) else ""
    raise ScopeError(f"{argument} takes a list, not {given!r}{hint}")


def _is_bare_entry(given: Any) -> bool:
    """Whether it is one ``(module, name, replacement)``, rather than a tuple of such."""
    return isinstance(given, tuple) and given != () and not any(isinstance(x, (Entry, tuple)) for x in given)


def quantize_modules(
    skip: Iterable[Pattern] | Pattern = (),
    custom: Iterable[EntryLike] | EntryLike = (),
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
        custom=_several([custom] if _is_bare_entry(custom) else custom, "custom", (Entry,)),
        recipe=recipe,
        plugins=None if plugins is None else _several(plugins, "plugins", (str,)),
        include=_several(include, "include", (str, type)),
    )


def keep_float() -> Scope:
    """A block in which nothing is replaced, whatever blocks are around it.

    A ``quantize_modules()`` inside it starts again from what was replaced around it.
    """
    return Scope(float_because="keep_float()")
