"""What ``quantize_modules`` and ``convert`` are given, as one value."""

from __future__ import annotations

import inspect
import reprlib
import sys
from collections.abc import Iterable
from typing import Any

import attrs
from torch import nn

from quantpatch.errors import ScopeError
from quantpatch.plugins.entry import Entry, EntryLike
from quantpatch.plugins.registry import registry
from quantpatch.quantize.resolve import Pattern, Table, compose, load_all, outermost
from quantpatch.recipes.descriptor import Recipe

__all__ = ["Settings"]


@attrs.frozen
class Settings:
    """What to quantize and how; ``quantize_modules`` says what each of these is.

    Attributes:
        skip: Targets to leave float.
        custom: Entries that override all others.
        recipe: A recipe or its name; None: that of the block around.
        plugins: Names of the plugins that take part; None: all of them.
        include: Targets to replace although they are left float by default.
        subclasses: Whether subclasses of targets are quantized as well; None: as in the block around.
    """

    skip: tuple[Pattern, ...] = ()
    custom: tuple[EntryLike, ...] = ()
    recipe: str | Recipe | None = None
    plugins: tuple[str, ...] | None = None
    include: tuple[Pattern, ...] = ()
    subclasses: bool | None = None

    @classmethod
    def of(
        cls,
        skip: Iterable[Pattern] | Pattern,
        custom: Iterable[EntryLike] | EntryLike,
        recipe: str | Recipe | None,
        plugins: Iterable[str] | None,
        include: Iterable[Pattern] | Pattern,
        subclasses: bool | None,
    ) -> Settings:
        """What a user gave, where a single item may stand for a list of one.

        Raises:
            ScopeError: One of them is of another type.
        """
        return cls(
            skip=_several(skip, "skip", (str, type)),
            custom=_several([custom] if _is_bare_entry(custom) else custom, "custom", (Entry,)),
            recipe=recipe,
            plugins=None if plugins is None else _several(plugins, "plugins", (str,)),
            include=_several(include, "include", (str, type)),
            subclasses=subclasses,
        )

    def __str__(self) -> str:
        """As the arguments of a call, leaving out what was not given."""
        given = {field.name: getattr(self, field.name) for field in attrs.fields(Settings)}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value not in ((), None))

    def table(self, recipe: Recipe, enclosing: Table | None = None) -> Table:
        """The loaded table; not to be changed.

        Args:
            recipe: The recipe in force.
            enclosing: The table of the block around, if there is one.

        Raises:
            EntryError: An entry cannot be used.
            EntryConflictError: Two plugins want the same target.
            PluginError: A plugin failed.
            UnknownNameError: A name in ``skip``, ``include`` or ``plugins`` means nothing.
        """
        include = (*recipe.include, *self.include)
        changes_nothing = not (self.custom or self.skip or include) and self.plugins is None
        if enclosing and changes_nothing and sys.modules.keys().isdisjoint(enclosing.waits_for):
            return enclosing
        if not enclosing and not self.custom:
            return outermost(registry.offers(self.plugins), self.plugins, self.skip, include)
        # A block inside another adds the plugins it names; otherwise what it starts from says it all.
        fresh = not enclosing or self.plugins is not None
        return load_all(
            compose(
                enclosing or Table(),
                registry.offers(self.plugins) if fresh else (),
                plugins=self.plugins,
                skip=self.skip,
                include=include,
                custom=self.custom,
            )
        )


def _several(given: Any, argument: str, single: tuple[type, ...]) -> tuple[Any, ...]:
    """A sequence, where one item may be given bare."""
    if isinstance(given, single):
        return (given,)
    if isinstance(given, Iterable) and not isinstance(given, (bytes, dict, nn.Module)):
        return tuple(given)
    if isinstance(given, nn.Module):
        raise ScopeError(
            f"{argument} takes a list, not a model ({type(given).__name__}). quantize_modules() is for "
            f"code that builds a model; one that is there already is quantized by qp.convert(model)"
        )
    hint = "; write @quantize_modules() with parentheses" if inspect.isfunction(given) else ""
    raise ScopeError(f"{argument} takes a list, not {reprlib.repr(given)}{hint}")


def _is_bare_entry(given: Any) -> bool:
    """Whether it is one ``(module, name, replacement)``, rather than a tuple of such."""
    return isinstance(given, tuple) and given != () and not any(isinstance(x, (Entry, tuple)) for x in given)
