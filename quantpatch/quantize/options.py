"""What ``quantize_modules`` and ``convert`` are given, as one value."""

from __future__ import annotations

import inspect
import reprlib
import sys
from collections.abc import Iterable
from typing import Any

import attrs
from torch import nn

from quantpatch.errors import ArgumentTypeError
from quantpatch.plugins.entry import Entry, EntryLike
from quantpatch.plugins.registry import registry
from quantpatch.quantize.compose import compose, load_all, outermost
from quantpatch.quantize.operations import OperationRules, OperationsOption
from quantpatch.quantize.reasons import Pattern
from quantpatch.quantize.resolve import Table
from quantpatch.recipes.descriptor import Recipe


@attrs.frozen
class Options:
    """What to quantize and how; ``quantize_modules`` says what each of these is.

    Attributes:
        recipe: A recipe or its name; None: that of the block around.
        skip: Targets to leave float.
        custom: Entries that override all others.
        include: Targets to replace although they are left float by default.
        plugins: Names of the plugins that take part; None: all of them.
        subclasses: Whether subclasses of targets are quantized as well; None: as in the block around.
        operations: Which operations inside forwards are quantized; None: as in the block around.
        strict: Whether what may multiply and cannot be followed is an error.
        keep_float: Whether nothing is replaced at all.
    """

    recipe: str | Recipe | None = None
    skip: tuple[Pattern, ...] = ()
    custom: tuple[EntryLike, ...] = ()
    include: tuple[Pattern, ...] = ()
    plugins: tuple[str, ...] | None = None
    subclasses: bool | None = None
    operations: OperationsOption | None = None
    strict: bool = False
    keep_float: bool = False

    @classmethod
    def of(
        cls,
        recipe: str | Recipe | None,
        skip: Iterable[Pattern] | Pattern,
        custom: Iterable[EntryLike] | EntryLike,
        include: Iterable[Pattern] | Pattern,
        plugins: Iterable[str] | None,
        subclasses: bool | None,
        operations: OperationRules | None = None,
        strict: bool = False,
    ) -> Options:
        """What a user gave, where a single item may stand for a list of one.

        Raises:
            ArgumentTypeError: One of them is of another type.
        """
        _demand_recipe(recipe)
        return cls(
            recipe=recipe,
            skip=_several(skip, "skip", (str, type)),
            custom=_several([custom] if _is_bare_entry(custom) else custom, "custom", (Entry,)),
            include=_several(include, "include", (str, type)),
            plugins=None if plugins is None else _several(plugins, "plugins", (str,)),
            subclasses=subclasses,
            operations=OperationsOption.of(operations),
            strict=strict,
        )

    def __str__(self) -> str:
        """As the call that they were given to, without what was not given."""
        if self.keep_float:
            return "keep_float()"
        given = ((field, getattr(self, field.name)) for field in attrs.fields(Options))
        arguments = (f"{field.name}={value!r}" for field, value in given if value != field.default)
        return f"quantize_modules({', '.join(arguments)})"

    def table(self, recipe: Recipe, around: Table | None = None) -> Table:
        """The loaded table.

        Args:
            recipe: The recipe in force.
            around: The table of the block around, if there is one.

        Raises:
            EntryConflictError: Two plugins want the same target.
            EntryError: An entry cannot be used.
            PluginError: A plugin failed.
            UnknownNameError: A name in ``skip``, ``include`` or ``plugins`` means nothing.
        """
        if self.keep_float:
            return around or Table()  # what a block inside starts from
        include = (*recipe.include, *self.include)
        changes_nothing = not (self.custom or self.skip or include) and self.plugins is None
        if (
            around
            and changes_nothing
            and self.subclasses in (None, around.subclasses)
            and sys.modules.keys().isdisjoint(around.waits_for)
        ):
            return around
        if not around and not self.custom:
            subclasses = bool(self.subclasses)
            return outermost(registry.entries(self.plugins), self.plugins, self.skip, include, subclasses)
        # A block inside another adds the plugins it names; otherwise what it starts from says it all.
        fresh = not around or self.plugins is not None
        return load_all(
            compose(
                registry.entries(self.plugins) if fresh else (),
                around=around,
                plugins=self.plugins,
                skip=self.skip,
                include=include,
                custom=self.custom,
                subclasses=self.subclasses,
            )
        )


def _several(given: Any, argument: str, single: tuple[type, ...]) -> tuple[Any, ...]:
    """A sequence, where one item may be given bare."""
    if isinstance(given, single):
        return (given,)
    if isinstance(given, Iterable) and not isinstance(given, (bytes, dict, nn.Module)):
        return tuple(given)
    raise ArgumentTypeError(f"{argument} takes a list, not {reprlib.repr(given)}", **{argument: given})


def _demand_recipe(given: Any) -> None:
    """Checks what came first, where users of other libraries expect a model, a function or a list."""
    if given is None or isinstance(given, (str, Recipe)):
        return
    if isinstance(given, nn.Module):
        raise ArgumentTypeError(
            f"quantize_modules takes a recipe, not a model ({type(given).__name__}). It is for code that "
            f"builds a model; one that is there already is quantized by qp.convert(model)",
            recipe=given,
        )
    if inspect.isfunction(given):
        hint = "write @quantize_modules() with parentheses"
    elif isinstance(given, (type, Iterable)):
        hint = "layers to leave float are given as skip=[...], entries as custom=[...]"
    else:
        hint = "such as recipe='int8', or Recipe(name='mine', input=QuantDescriptor(...))"
    raise ArgumentTypeError(
        f"recipe takes a recipe or its name, not {reprlib.repr(given)}: {hint}", recipe=given
    )


def _is_bare_entry(given: Any) -> bool:
    """Whether it is one ``(module, name, replacement)``, rather than a tuple of such."""
    return isinstance(given, tuple) and given != () and not any(isinstance(x, (Entry, tuple)) for x in given)
