"""What ``calibrate`` returns: which quantizers got a range, which kept theirs, and which have none."""

from __future__ import annotations

import json
from collections.abc import Mapping

import attrs
from rich.table import Table

from quantpatch.report.changes import outcome_table
from quantpatch.report.render import as_text


@attrs.frozen
class CalibrationReport:
    """What a calibration did, by the names of the quantizers; prints as a table.

    Attributes:
        model: Class of the model.
        calibrated: Those that got a range.
        kept: Those that had one and kept it.
        without_data: Those that saw no data, and stay as they were.
        only_zeros: Those that saw nothing but zeros, and stay as they were.
        switched_off: Those of layers that do not run since a forward reads their weight itself.
        zero_points: The zero points of those that got one.
        problem: Why quantizers that should have a range have none, in words; empty where all have one.
    """

    model: str
    calibrated: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    without_data: tuple[str, ...] = ()
    only_zeros: tuple[str, ...] = ()
    switched_off: tuple[str, ...] = ()
    zero_points: Mapping[str, int] = attrs.field(factory=dict)
    problem: str = ""

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(attrs.asdict(self), indent=2)

    def __rich__(self) -> Table:
        groups = {
            "calibrated": self.calibrated,
            "with a zero point": tuple(f"{name}: {zero}" for name, zero in self.zero_points.items()),
            "kept their ranges": self.kept,
            "saw no data": self.without_data,
            "saw only zeros": self.only_zeros,
            "switched off": self.switched_off,
        }
        return outcome_table(f"{self.model}: {len(self.calibrated)} quantizers calibrated", groups)

    def __str__(self) -> str:
        return as_text(self, of_names=True)
