"""The largest magnitude seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytorch_quantization._descriptor import Axis, NumBits
from pytorch_quantization.calib.calibrator import _Calibrator
from pytorch_quantization.utils.reduce_amax import kept_to_reduced, reduce_amax

__all__ = ["MaxCalibrator"]


class MaxCalibrator(_Calibrator):
    """Keeps the largest magnitude, of the whole tensor or of each index along the kept axes.

    Args:
        num_bits: As of :class:`_Calibrator`.
        axis: As of :class:`_Calibrator`.
        unsigned: As of :class:`_Calibrator`.
        track_amax: Whether to keep the maximum of every tensor too.
    """

    def __init__(
        self, num_bits: NumBits = 8, axis: Axis = None, unsigned: bool = False, track_amax: bool = False
    ) -> None:
        super().__init__(num_bits, axis, unsigned)
        self._track_amax = track_amax
        self._calib_amax: Tensor | None = None
        self._amaxs: list[np.ndarray[Any, Any]] = []

    @property
    def amaxs(self) -> list[np.ndarray[Any, Any]]:
        """The maximum of each tensor, if they are tracked: copies."""
        return [amax.copy() for amax in self._amaxs]

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Takes in one tensor.

        Raises:
            RuntimeError: Its maximum has another shape than those before.
            ValueError: It holds NaN or infinity.
        """
        amax = reduce_amax(x, kept_to_reduced(self._axis, x.dim())).float()
        if not bool(amax.isfinite().all()):
            raise ValueError("the tensor to calibrate with holds NaN or infinity")
        if self._calib_amax is None:
            self._calib_amax = amax.clone()
        elif amax.shape != self._calib_amax.shape:
            raise RuntimeError(
                f"amax shape changed from {tuple(self._calib_amax.shape)} to {tuple(amax.shape)}: collect "
                f"tensors of the same length along axis={self._axis}, or call reset() first"
            )
        else:
            self._calib_amax = torch.maximum(self._calib_amax, amax.to(self._calib_amax.device))
        if self._track_amax:
            self._amaxs.append(amax.cpu().numpy().copy())

    def reset(self) -> None:
        """Forgets what was collected."""
        self._calib_amax = None
        self._amaxs = []

    def compute_amax(self) -> Tensor | None:
        """The largest magnitude: a copy, or None if nothing was collected."""
        return None if self._calib_amax is None else self._calib_amax.clone()
