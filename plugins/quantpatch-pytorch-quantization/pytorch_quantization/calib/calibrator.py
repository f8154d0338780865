"""What all calibrators have in common."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from pytorch_quantization._descriptor import Axis, NumBits

__all__ = ["_Calibrator"]


class _Calibrator(abc.ABC):
    """Base of calibrators.

    Args:
        num_bits: Number of bits of the format that the range is for, or ``(4, 3)``.
        axis: The axes kept, each index with a range of its own; None for one range.
        unsigned: Whether the format is unsigned.
    """

    def __init__(self, num_bits: NumBits, axis: Axis, unsigned: bool) -> None:
        self._num_bits = num_bits
        self._axis = axis
        self._unsigned = unsigned

    @abc.abstractmethod
    def collect(self, x: Tensor) -> None:
        """Takes in one tensor."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forgets what was collected."""

    @abc.abstractmethod
    def compute_amax(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The range, or None if nothing was collected. What was collected stays."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_bits={self._num_bits}, axis={self._axis})"
