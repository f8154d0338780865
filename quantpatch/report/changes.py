"""What a function changed in a model, by name: the value it returns."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from rich.table import Table

from quantpatch.report.report import Report, by_reason, outcome_table


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
