"""What ``quantpatch run`` was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from quantpatch.plugins.registry import registry
from quantpatch.quantize.rules import Rules
from quantpatch.quantize.scope import Scope, quantize_modules
from quantpatch.quantize.to_calibrate import Existing

#: Holds the settings, for every process that the script starts.
VARIABLE = "QUANTPATCH_RUN"


def _tuple(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(names)


def _entries(given: Iterable[Sequence[str]]) -> tuple[tuple[str, str, str], ...]:
    return tuple((module, name, replacement) for module, name, replacement in given)


@attrs.frozen(kw_only=True)
class RunSettings:
    """What ``quantpatch run`` was asked for.

    Attributes:
        recipe: As in ``quantize_modules``, like the next five.
        skip: See there.
        custom: See there.
        include: See there.
        plugins: See there.
        subclasses: See there.
        calibrate: How many calls of each model calibrate it; 0: none.
        method: As in ``calibrate``, like the next three.
        weight_method: See there.
        zero_points: See there.
        existing: See there.
        audit: Whether to audit the models that run.
        directory: Where the processes leave their reports.
    """

    recipe: str | None = None
    skip: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    custom: tuple[tuple[str, str, str], ...] = attrs.field(default=(), converter=_entries)
    include: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    plugins: tuple[str, ...] | None = attrs.field(default=None, converter=attrs.converters.optional(_tuple))
    subclasses: bool | None = None
    calibrate: int = 0
    method: str | None = None
    weight_method: str | None = None
    zero_points: bool = False
    existing: Existing = "keep"
    audit: bool = False
    directory: str = ""

    def scope(self) -> Scope:
        """The block to run the script in.

        It has no rules by name: a block applies them when it ends, which is when the script is over.
        """
        return quantize_modules(
            skip=self.skip,
            custom=self.custom,
            include=self.include,
            plugins=self.plugins,
            subclasses=self.subclasses,
            recipe=None if self.recipe is None else registry.recipe(self.recipe).replace(rules=()),
        )

    def calibration(self) -> dict[str, Any]:
        """How the calls that calibrate do so: keywords of ``Calibration``."""
        names = ("method", "weight_method", "zero_points", "existing")
        return {name: getattr(self, name) for name in names}

    def rules(self) -> Rules:
        """The rules of the recipe, for each model once it is built."""
        return () if self.recipe is None else registry.recipe(self.recipe).rules

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RunSettings:
        """The settings that ``to_json`` wrote."""
        return cls(**json.loads(text))
