"""What a function changed in a model, by name: the value it returns, and the table of such values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import attrs
from rich.table import Table

from quantpatch.errors import listed
from quantpatch.report.render import as_text


@attrs.frozen
class ChangeReport:
    """What a function changed in a model, and what it left as it was; prints as a table.

    Attributes:
        model: Class of the model.
        changed: What each of the changed is now, by name.
        unchanged: What each of the others is, by name.
    """

    model: str
    changed: Mapping[str, str]
    unchanged: Mapping[str, str]

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(attrs.asdict(self), indent=2)

    def __rich__(self) -> Table:
        groups: dict[str, list[str]] = {}
        for prefix, found in (("now ", self.changed), ("still ", self.unchanged)):
            for name, what in found.items():
                groups.setdefault(prefix + what, []).append(name)
        return outcome_table(f"{self.model}: {len(self.changed)} changed", groups)

    def __str__(self) -> str:
        return as_text(self, of_names=True)


def outcome_table(title: str, groups: Mapping[str, Sequence[str]]) -> Table:
    """A table with a line for each outcome: how many came to it, and the names of the first.

    Args:
        title: Stands above it.
        groups: Names by outcome; outcomes of nothing are left out.
    """
    table = Table(title=title)
    table.add_column("outcome")
    table.add_column("count", justify="right")
    table.add_column("names", overflow="fold")
    for outcome, names in groups.items():
        if names:
            table.add_row(outcome, str(len(names)), listed(names))
    return table
