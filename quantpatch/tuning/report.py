"""What ``tune`` did, by method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from rich.table import Table

from quantpatch.errors import listed
from quantpatch.quantize.reasons import Reason
from quantpatch.reports.report import Report, by_reason, table_of


@attrs.frozen
class Tuned:
    """What was done to one tensor, or to several together.

    Attributes:
        before: What the method minimizes, without it; relative, so that 0 is nothing lost.
        after: The same with it. Never more, but for one of several that are equalized together, of which the
            sum is less.
        note: What is special about it, such as a damping above the one asked for.
    """

    before: float
    after: float
    note: str = ""


def relative(cost: float, size: float) -> float:
    """The root of a squared error over what there is."""
    return (max(cost, 0.0) / size) ** 0.5 if size > 0 else 0.0


@attrs.frozen
class TuningStep:
    """What one method did.

    Attributes:
        method: Its name.
        tuned: What was tuned, by name.
        skipped: What was not, by name, and why.
    """

    method: str
    tuned: Mapping[str, Tuned]
    skipped: Mapping[str, Reason]


@attrs.frozen
class TuningReport(Report):
    """What ``tune`` did; prints as a table.

    Attributes:
        model: Class of the model.
        steps: What each method did, in their order.
    """

    model: str
    steps: tuple[TuningStep, ...]

    @property
    def tuned(self) -> dict[str, Tuned]:
        """What was tuned by any method, by name; of several the last."""
        return {name: tuned for step in self.steps for name, tuned in step.tuned.items()}

    @property
    def skipped(self) -> dict[str, Reason]:
        """What no method tuned, by name, and why the last of them did not."""
        tuned = self.tuned
        pairs = (pair for step in self.steps for pair in step.skipped.items())
        return {name: reason for name, reason in pairs if name not in tuned}

    def _fields(self) -> dict[str, Any]:
        steps = [
            {
                "method": step.method,
                "tuned": {name: attrs.asdict(tuned) for name, tuned in step.tuned.items()},
                "skipped": {name: str(reason) for name, reason in step.skipped.items()},
            }
            for step in self.steps
        ]
        return {"model": self.model, "steps": steps}

    def to_dicts(self) -> list[dict[str, Any]]:
        """A dictionary for each tensor and method."""
        return [
            {"method": step.method, "outcome": outcome, "name": name, **said}
            for step in self.steps
            for outcome, found in (
                ("tuned", {name: attrs.asdict(tuned) for name, tuned in step.tuned.items()}),
                ("skipped", {name: {"detail": str(reason)} for name, reason in step.skipped.items()}),
            )
            for name, said in found.items()
        ]

    def __rich__(self) -> Table:
        title = f"{self.model}: {len(self.tuned)} tuned"
        table = table_of("method", "outcome", "count", "names", right=("count",), title=title)
        for step in self.steps:
            notes: dict[str, list[str]] = {}
            for name, tuned in step.tuned.items():
                notes.setdefault(f"tuned, {tuned.note}" if tuned.note else "tuned", []).append(name)
            reasons = by_reason({name: str(reason) for name, reason in step.skipped.items()})
            groups = notes | {f"not: {reason}": names for reason, names in reasons.items()}
            for outcome, names in groups.items():
                table.add_row(step.method, outcome, str(len(names)), listed(names))
        return table
