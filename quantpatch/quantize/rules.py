"""Rules for a model's quantizers, checked: which they are for, and what becomes of those."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from quantpatch.errors import ArgumentError, ArgumentTypeError
from quantpatch.plugins.registry import registry
from quantpatch.recipes.descriptor import QuantDescriptor, Recipe

Matcher = str | type | Callable[[str, nn.Module], bool]
Value = QuantDescriptor | Recipe | str | None
#: Patterns for the first and the last quantized layer that has weights.
EDGES = (":first", ":last")
# A mapping of strings alone is not a Mapping[Matcher, ...]: the type of keys is invariant.
Rules = Mapping[str, Value] | Mapping[Matcher, Value] | Iterable[tuple[Matcher, Value]]


def checked_rules(rules: Rules) -> list[tuple[Matcher, Value]]:
    """The rules, with recipes in the place of their names.

    Raises:
        ArgumentError: One is malformed, or two contradict each other.
        ArgumentTypeError: A pattern or a value is of another type.
        UnknownNameError: There is no recipe of a name.
    """
    checked: list[tuple[Matcher, Value]] = []
    for pair in rules.items() if isinstance(rules, Mapping) else rules:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ArgumentTypeError(
                f"{pair!r} is not a rule; write ('encoder.*', 'int8') or ('head', None)", rules=pair
            )
        matcher, value = pair
        if not (isinstance(matcher, (str, type)) or callable(matcher)):
            raise ArgumentTypeError(
                f"rule {pair!r}: a pattern is a glob, 're:' and a regular expression, a class or a function "
                f"of a layer's name and the layer",
                rules=pair,
            )
        if isinstance(value, str):
            value = registry.recipe(value)
        if not (value is None or isinstance(value, (QuantDescriptor, Recipe))):
            raise ArgumentTypeError(
                f"rule {pair!r}: a value is None (float), a QuantDescriptor, a Recipe or a recipe's name",
                rules=pair,
            )
        if isinstance(value, Recipe) and value.rules:
            raise ArgumentError(
                f"rule {pair!r}: the recipe {value.name!r} has rules of its own, which cannot be part of "
                f"a rule; write recipe.replace(rules=())",
                rules=pair,
            )
        if isinstance(matcher, str) and matcher.startswith(":") and matcher not in EDGES:
            raise ArgumentError(f"{matcher!r} is not a pattern; write ':first' or ':last'", rules=pair)
        if isinstance(matcher, str):
            fits(matcher, "")  # so that a malformed one is reported even if there is nothing to match
        for earlier, other in checked:
            if earlier == matcher and other != value:
                raise ArgumentError(
                    f"two rules for {matcher!r} contradict each other: {other!r} and {value!r}", rules=pair
                )
        checked.append((matcher, value))
    return checked


def fits(pattern: str, name: str) -> bool:
    """Whether a name is one of a glob, or of a regular expression after ``re:``."""
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise ArgumentError(f"{pattern!r} is not a regular expression: {error}", rules=pattern) from error


def shown_matcher(matcher: Matcher) -> str:
    """A rule's pattern, for messages."""
    return matcher if isinstance(matcher, str) else str(getattr(matcher, "__qualname__", repr(matcher)))
