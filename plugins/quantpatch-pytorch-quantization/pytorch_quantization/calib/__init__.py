"""Calibrators: statistics of tensors, and the ranges that follow from them."""

from pytorch_quantization.calib.calibrator import _Calibrator
from pytorch_quantization.calib.histogram import HistogramCalibrator, calibrate_weights
from pytorch_quantization.calib.max import MaxCalibrator

__all__ = ["HistogramCalibrator", "MaxCalibrator", "_Calibrator", "calibrate_weights"]
