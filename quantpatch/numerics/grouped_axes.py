"""``GroupedAxes``: the output channels of a weight that has them along two axes.

With groups the weight of a transposed convolution is of shape (in, out / groups, ...). An output channel is
an index along the second axis within one of the groups that the first is made of, so its range is shared by
neighbours along the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantpatch.errors import RangeError


class GroupedAxes(tuple[int, ...]):
    """The axes ``(0, 1)``, of which the first is made of groups that share ranges.

    Ranges are of shape ``(groups, n, 1, ...)`` for a tensor of shape ``(in, n, ...)``. What knows no groups
    sees the two kept axes.

    Attributes:
        groups: Their number.
    """

    groups: int
    #: The kept axes of what ``split`` gives.
    SPLIT = (0, 2)

    def __new__(cls, groups: int) -> GroupedAxes:
        """Makes them."""
        made = super().__new__(cls, (0, 1))
        made.groups = groups
        return made

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, GroupedAxes) and other.groups == self.groups

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((GroupedAxes, self.groups))

    def __repr__(self) -> str:
        return f"GroupedAxes(groups={self.groups})"

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupedAxes, (self.groups,)

    def split(self, x: Tensor) -> Tensor:
        """A tensor of shape ``(in, n, ...)`` as ``(groups, in / groups, n, ...)``.

        Raises:
            RangeError: It has no two axes, or the first is not made of so many groups.
        """
        if x.dim() < 2 or x.shape[0] % self.groups:
            raise RangeError(
                f"a tensor of shape {tuple(x.shape)} cannot be split into {self.groups} groups along its "
                f"first axis",
                value=self.groups,
            )
        return torch.unflatten(x, 0, (self.groups, x.shape[0] // self.groups))

    def spread(self, ranges: Tensor, length: int) -> Tensor:
        """Ranges or scales repeated, so that there is one for each index along the first axis.

        Args:
            ranges: ``(groups, n, 1, ...)``, or one for all.
            length: Of that axis.
        """
        if not ranges.dim() or ranges.shape[0] in (1, length):
            return ranges
        return ranges.repeat_interleave(length // self.groups, 0)
