"""How to quantize, as values: ``descriptor.py`` has the types, ``builtin.py`` the recipes that come along."""

from quantpatch.recipes.builtin import BUILTIN_RECIPES, DEFAULT_RECIPE, active_recipe
from quantpatch.recipes.descriptor import Axis, QuantDescriptor, Recipe

__all__ = ["BUILTIN_RECIPES", "DEFAULT_RECIPE", "Axis", "QuantDescriptor", "Recipe", "active_recipe"]
