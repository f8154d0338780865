"""What ``quantpatch run`` was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable

import attrs

from quantpatch.scope import Scope, quantize_modules

__all__ = ["VARIABLE", "Settings"]

#: Holds the settings, for every process that the script starts.
VARIABLE = "QUANTPATCH_RUN"


def _tuple(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(names)


@attrs.frozen
class Settings:
    """What ``quantpatch run`` was asked for.

    Attributes:
        recipe: As in ``quantize_modules``, like the next three.
        skip: See there.
        include: See there.
        plugins: See there.
        calibrate: How many calls of each model calibrate it; 0: none.
        audit: Whether to audit the models that run.
        directory: Where the processes leave what they have to tell.
    """

    recipe: str | None = None
    skip: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    include: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    plugins: tuple[str, ...] | None = attrs.field(default=None, converter=attrs.converters.optional(_tuple))
    calibrate: int = 0
    audit: bool = False
    directory: str = ""

    def scope(self) -> Scope:
        """The block to run the script in."""
        return quantize_modules(
            skip=self.skip, include=self.include, plugins=self.plugins, recipe=self.recipe
        )

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that ``to_json`` wrote."""
        return cls(**json.loads(text))
