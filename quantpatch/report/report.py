"""What all reports have in common, their tables, and those of functions that change models."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, cast

import attrs
from rich.table import Table
from rich.text import Text

from quantpatch.errors import listed
from quantpatch.report.render import as_text


class Report:
    """What a function did or found, as a frozen attrs class that prints.

    A subclass has ``__rich__``, which gives a table, or else ``__str__``. What was done is a field called
    after the verb (``changed``, ``folded``); what was not is ``skipped``, by name, with the reason.
    """

    __slots__ = ()

    #: Whether it is a table of names: see ``as_text``.
    _of_names: ClassVar[bool] = True

    def to_json(self) -> str:
        """The same as JSON; what is not a finite number is null."""
        return json.dumps(self._fields(), indent=2, default=str)

    def _fields(self) -> dict[str, Any]:
        return attrs.asdict(cast(Any, self), value_serializer=_finite)

    def __rich__(self) -> Any:
        return Text(str(self))

    def __str__(self) -> str:
        return as_text(self, of_names=self._of_names)


def _finite(owner: Any, field: Any, value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table_of(
    *headings: str, right: Collection[str] = (), title: str | None = None, caption: Any = None
) -> Table:
    """A table without rows.

    Args:
        *headings: Of its columns.
        right: Those of columns that are set to the right.
        title: Stands above it.
        caption: Stands below it.
    """
    table = Table(title=title, caption=caption)
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in right else "left")
    return table


def outcome_table(title: str, groups: Mapping[str, Sequence[str]]) -> Table:
    """A table with a line for each outcome: how many came to it, and the names of the first.

    Args:
        title: Stands above it.
        groups: Names by outcome; outcomes of nothing are left out.
    """
    table = table_of("outcome", "count", "names", right=("count",), title=title)
    for outcome, names in groups.items():
        if names:
            table.add_row(outcome, str(len(names)), listed(names))
    return table


def by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """The names for each reason."""
    groups: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        groups.setdefault(reason, []).append(name)
    return groups


@attrs.frozen
class ChangeReport(Report):
    """What a function changed in a model, and what it left as it was; prints as a table.

    Attributes:
        model: Class of the model.
        changed: What each of the changed is now, by name.
        skipped: What each of the others still is, by name.
    """

    model: str
    changed: Mapping[str, str]
    skipped: Mapping[str, str]

    def __rich__(self) -> Table:
        groups = {f"now {what}": names for what, names in by_reason(self.changed).items()}
        groups |= {f"still {what}": names for what, names in by_reason(self.skipped).items()}
        return outcome_table(f"{self.model}: {len(self.changed)} changed", groups)


@attrs.frozen
class CalibrationReport(Report):
    """What a calibration did, by the names of the quantizers; prints as a table.

    Attributes:
        model: Class of the model.
        calibrated: Those that got a range.
        skipped: Why the others did not: they kept the one that they had, saw no data or only zeros, and stay
            as they were; or are switched off, since a forward reads the weight of their layer itself.
        zero_points: The zero points of those that got one.
        problem: Why quantizers that should have a range have none, in words; empty where all have one.
    """

    model: str
    calibrated: tuple[str, ...] = ()
    skipped: Mapping[str, str] = attrs.field(factory=dict)
    zero_points: Mapping[str, int] = attrs.field(factory=dict)
    problem: str = ""

    def __rich__(self) -> Table:
        groups = {
            "calibrated": self.calibrated,
            "with a zero point": tuple(f"{name}: {zero}" for name, zero in self.zero_points.items()),
            **by_reason(self.skipped),
        }
        return outcome_table(f"{self.model}: {len(self.calibrated)} quantizers calibrated", groups)
