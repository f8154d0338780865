"""What ``calibrate`` returns: which quantizers got a range, and which did not and why."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from rich.table import Table

from quantpatch.report.report import Report, by_reason, outcome_table


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
