"""Ranges from the largest magnitudes: the running maximum and the moving average of the maxima."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from quantpatch.calibrators.base import AllReduce, Calibrator
from quantpatch.errors import ArgumentError
from quantpatch.numerics.formats import NumberFormat


class MaxCalibrator(Calibrator):
    """The largest magnitude seen: nothing is clipped."""

    def _start(self, shape: torch.Size, device: torch.device) -> None:
        self._amax = torch.zeros(shape, dtype=torch.float32, device=device)

    def _update(self, x: Tensor, amax: Tensor) -> None:
        self._amax = torch.maximum(self._amax, amax)

    def _range(self) -> Tensor:
        return self._amax

    def _reduce(self, all_reduce: AllReduce) -> None:
        self._amax = all_reduce(self._amax, dist.ReduceOp.MAX)


class MovingAverageCalibrator(Calibrator):
    """The exponential moving average of the batches' largest magnitudes.

    ``amax += averaging_constant * (max |x| - amax)``, from the first batch's maximum on, as
    ``torch.ao.quantization.MovingAverageMinMaxObserver`` averages its minimum and maximum.

    An average depends on the order of the batches, which several processes do not have among them:
    :meth:`synchronize` takes the mean of the ranks' averages, weighted by their numbers of batches.

    Args:
        format: The number format that the range is for.
        axis: The axes kept; None for one range.
        averaging_constant: Weight of a new batch, above 0 and at most 1.

    Raises:
        ArgumentError: The constant is out of range.
    """

    def __init__(
        self,
        format: NumberFormat,
        axis: int | tuple[int, ...] | None = None,
        *,
        averaging_constant: float = 0.01,
    ) -> None:
        if not 0.0 < averaging_constant <= 1.0:
            raise ArgumentError(
                f"averaging_constant must be above 0 and at most 1, got {averaging_constant!r}",
                averaging_constant=averaging_constant,
            )
        super().__init__(format, axis)
        self.averaging_constant = averaging_constant

    def _start(self, shape: torch.Size, device: torch.device) -> None:
        self._average = torch.zeros(shape, dtype=torch.float32, device=device)
        self._averaged = 0

    def _update(self, x: Tensor, amax: Tensor) -> None:
        weight = self.averaging_constant if self._averaged else 1.0
        self._average = torch.lerp(self._average, amax, weight)
        self._averaged += 1

    def _range(self) -> Tensor:
        return self._average

    def _reduce(self, all_reduce: AllReduce) -> None:
        count = torch.tensor(self._averaged, dtype=torch.int64, device=self._average.device)
        total = all_reduce(count, dist.ReduceOp.SUM)
        weighted = all_reduce(self._average.double() * count, dist.ReduceOp.SUM)
        self._average = (weighted / total).float()
        self._averaged = int(total)
