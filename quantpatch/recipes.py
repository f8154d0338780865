"""The recipes that come with quantpatch, and the one in force."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from quantpatch import interception
from quantpatch.descriptor import CHANNEL, QuantDescriptor, Recipe

__all__ = ["BUILTIN_RECIPES", "DEFAULT_RECIPE", "active_recipe"]

_WEIGHT8 = QuantDescriptor(axis=CHANNEL, narrow_range=True)
_WEIGHT4 = QuantDescriptor(num_bits=4, axis=CHANNEL, narrow_range=True)

#: What a layer uses that is built outside any block.
DEFAULT_RECIPE = Recipe(name="int8")

BUILTIN_RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            DEFAULT_RECIPE,
            Recipe(name="int8-weight-only", input=None, weight=_WEIGHT8),
            Recipe(name="int4", input=QuantDescriptor(num_bits=4), weight=_WEIGHT4),
        )
    }
)


def active_recipe() -> Recipe:
    """The recipe of the block in force here; ``int8`` outside any block."""
    activation = interception.current()
    return DEFAULT_RECIPE if activation is None else activation.payload.recipe  # type: ignore[no-any-return]
