"""What ``quantpatch run`` was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from quantpatch.plugins.registry import registry
from quantpatch.quantize.operations import OperationsOption, quantize_operations
from quantpatch.quantize.outcome import Outcome
from quantpatch.quantize.rules import Rules
from quantpatch.quantize.scope import Scope, quantize_modules
from quantpatch.recipes.builtin import DEFAULT_RECIPE
from quantpatch.recipes.descriptor import Recipe

#: Holds the settings, for every process that the script starts.
VARIABLE = "QUANTPATCH_RUN"


@attrs.frozen(kw_only=True)
class RunSettings:
    """What ``quantpatch run`` was asked for; all of it can be JSON.

    Attributes:
        block: What ``quantize_modules`` takes, by name.
        calibrate: How many calls of each model calibrate it; 0: none.
        calibration: How these do so: keywords of ``Calibration``, such as the method.
        audit: Whether to audit the models that run.
        report: Where to write a page about each; empty for none.
        directory: Where the processes leave their reports.
    """

    block: Mapping[str, Any] = attrs.field(factory=dict)
    calibrate: int = 0
    calibration: Mapping[str, Any] = attrs.field(factory=lambda: {"existing": "keep"})
    audit: bool = False
    report: str = ""
    directory: str = ""

    def scope(self) -> Scope:
        """The block to run the script in.

        It has no rules by name and no operations: a block applies them when it ends, which is when the
        script is over.
        """
        entries = [tuple(entry) for entry in self.block.get("custom", ())]
        recipe = self._recipe
        return quantize_modules(
            **{
                **{name: value for name, value in self.block.items() if name != "operations"},
                "custom": entries,
                "recipe": None if recipe is None else recipe.replace(rules=()),
            }
        )

    def rules(self) -> Rules:
        """The rules of the recipe, for each model once it is built."""
        return () if self._recipe is None else self._recipe.rules

    @property
    def _recipe(self) -> Recipe | None:
        name = self.block.get("recipe")
        return None if name is None else registry.recipe(name)

    def quantize_operations(self, model: nn.Module) -> None:
        """Has a model that is built quantize the operations inside its forwards.

        Raises:
            ConversionError: Something may multiply and cannot be followed, and ``strict`` was asked for.
        """
        option = OperationsOption.of(self.operations)
        assert option is not None
        option = attrs.evolve(option, demands=False)  # each of several models has some of them
        recipe = self._recipe or registry.recipe(DEFAULT_RECIPE)
        quantize_operations([model], option, recipe, Outcome(), strict=self.block.get("strict", False))

    @property
    def operations(self) -> Mapping[str, Sequence[str]] | Sequence[str] | None:
        """What ``quantize_modules`` takes as ``operations``."""
        return self.block.get("operations")

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunSettings:
        """The settings that ``to_json`` wrote."""
        return cls(**json.loads(text))
