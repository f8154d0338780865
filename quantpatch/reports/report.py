"""What all reports have in common, their tables, and those of functions that change models."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import attrs

from quantpatch.errors import listed
from quantpatch.reports.folding import folded_names
from quantpatch.torch_tools.notebooks import as_html

if TYPE_CHECKING:  # imported when a report is printed
    from rich.table import Table

_SHOWN = 10  # names of an outcome


class Report:
    """What a function did or found, as a frozen attrs class that prints.

    A subclass has ``__rich__``, which gives a table, or else ``__str__``. What was done is a field called
    after the verb (``changed``, ``folded``); what was not is ``skipped``, by name, with the reason.
    """

    __slots__ = ()

    #: Whether it is a table of names: see ``as_text``.
    _of_names: ClassVar[bool] = True
    #: The fields that hold its rows: values with fields, or names, with or without what is said of each.
    _rows: ClassVar[tuple[str, ...]] = ("rows",)

    def to_json(self) -> str:
        """The same as JSON; what is not a finite number is null."""
        return json.dumps(self._fields(), indent=2, default=str)

    def to_dicts(self) -> list[dict[str, Any]]:
        """A dictionary for each row, as ``pandas.DataFrame`` takes them; what is not a finite number is None.

        Names of fields within fields are joined by dots. In a report with several kinds of rows ``"outcome"``
        says which one is, such as ``"skipped"``; one without rows gives one dictionary.
        """
        written = self._fields()
        fields = [name for name in self._rows if name in written]
        if not fields:
            return [_flat(written)]
        kinds: list[dict[str, Any]] = [{"outcome": name} if len(fields) > 1 else {} for name in fields]
        return [
            kind | row
            for kind, name in zip(kinds, fields, strict=True)
            for row in _dicts(getattr(self, name, None), written[name])
        ]

    def _fields(self) -> dict[str, Any]:
        return attrs.asdict(cast(Any, self), value_serializer=_finite)

    def __rich__(self) -> Any:
        from rich.text import Text

        return Text(str(self))

    def __str__(self) -> str:
        from quantpatch.reports.render import as_text

        return as_text(self, of_names=self._of_names)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from quantpatch.reports.render import whole_or_folded

        return as_html(whole_or_folded(self))


def _dicts(value: Any, rows: Any) -> Iterator[dict[str, Any]]:
    """The rows of a field: its value, and the same as ``_fields`` gives it."""
    if isinstance(value, Report):
        yield from value.to_dicts()
        return
    if isinstance(rows, Mapping):
        for name, said in rows.items():
            yield {"name": name, **(_flat(said) if isinstance(said, Mapping) else {"detail": said})}
        return
    for row in rows:
        yield _flat(row) if isinstance(row, Mapping) else {"name": row}


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": x for inner, x in _flat(value).items()}
        else:
            found[name] = value
    return found


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
    from rich.table import Table

    table = Table(title=title, caption=caption)
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in right else "left")
    return table


def outcome_table(title: str, groups: Mapping[str, Sequence[str]]) -> Table:
    """A table with a line for each outcome: how many came to it, and the names of the first.

    Of many names those of alike blocks are one.

    Args:
        title: Stands above it.
        groups: Names by outcome; outcomes of nothing are left out.
    """
    found = {outcome: names for outcome, names in groups.items() if names}
    headings = ("outcome", "count", "names") if found else ()
    table = table_of(*headings, right=("count",), title=title)
    for outcome, names in found.items():
        shown = names if len(names) <= _SHOWN else folded_names(names)
        table.add_row(outcome, str(len(names)), listed(shown, _SHOWN))
    return table


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    """A table with a line for each thing to know; those that are None or empty are left out.

    Args:
        title: Stands above it.
        facts: What there is to say, by what it is about.
    """
    table = table_of("what", "value", title=title)
    for what, value in facts.items():
        if value not in (None, ""):
            table.add_row(what, str(value))
    return table


def _with_values(found: Mapping[str, int]) -> list[str]:
    return [f"{name}: {value}" for name, value in found.items()]


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

    _rows = ("changed", "skipped")

    def __rich__(self) -> Table:
        groups = {f"now {what}": names for what, names in by_reason(self.changed).items()}
        groups |= {f"still {what}": names for what, names in by_reason(self.skipped).items()}
        return outcome_table(f"{self.model}: {len(self.changed)} changed", groups)


@attrs.frozen
class ZeroPointReport(Report):
    """The zero points that were found for a model's quantizers, by their names; prints as a table.

    Attributes:
        model: Class of the model.
        fitted: Those of the quantizers that got one.
        skipped: Why the other symmetric ones of activations did not.
    """

    model: str
    fitted: Mapping[str, int] = attrs.field(factory=dict)
    skipped: Mapping[str, str] = attrs.field(factory=dict)

    def __rich__(self) -> Table:
        groups = {"with a zero point": _with_values(self.fitted), **by_reason(self.skipped)}
        return outcome_table(f"{self.model}: {len(self.fitted)} zero points", groups)


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

    _rows = ("calibrated", "skipped")

    def __rich__(self) -> Table:
        groups = {
            "calibrated": self.calibrated,
            "with a zero point": _with_values(self.zero_points),
            **by_reason(self.skipped),
        }
        return outcome_table(f"{self.model}: {len(self.calibrated)} quantizers calibrated", groups)
