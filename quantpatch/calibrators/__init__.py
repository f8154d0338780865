"""Calibrators: the statistics of what quantizers see, and the ranges computed from them."""

from collections.abc import Mapping
from types import MappingProxyType

from quantpatch.calibrators.base import Calibrator, warn_of_negatives
from quantpatch.calibrators.histogram import (
    EntropyCalibrator,
    HistogramCalibrator,
    MSECalibrator,
    PercentileCalibrator,
    SQNRCalibrator,
)
from quantpatch.calibrators.max import MaxCalibrator, MovingAverageCalibrator
from quantpatch.calibrators.thresholds import (
    entropy_threshold,
    mse_threshold,
    percentile_threshold,
    sqnr_threshold,
)

__all__ = [
    "BUILTIN_CALIBRATORS",
    "Calibrator",
    "EntropyCalibrator",
    "HistogramCalibrator",
    "MSECalibrator",
    "MaxCalibrator",
    "MovingAverageCalibrator",
    "PercentileCalibrator",
    "SQNRCalibrator",
    "entropy_threshold",
    "mse_threshold",
    "percentile_threshold",
    "sqnr_threshold",
    "warn_of_negatives",
]

BUILTIN_CALIBRATORS: Mapping[str, type[Calibrator]] = MappingProxyType(
    {
        "max": MaxCalibrator,
        "moving_average": MovingAverageCalibrator,
        "entropy": EntropyCalibrator,
        "mse": MSECalibrator,
        "percentile": PercentileCalibrator,
        "sqnr": SQNRCalibrator,
    }
)
"""Every calibrator that comes with quantpatch, by the name of its method."""
