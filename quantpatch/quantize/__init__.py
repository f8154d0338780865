"""The verbs: blocks, ``convert`` and ``revert``, ``configure``, ``calibrate``, ``explain``.

What decides is here too: ``targets.py`` what a target is, ``compose.py`` which entry wins for it,
``resolve.py`` what becomes of a class and ``reasons.py`` why, ``outcome.py`` what came of it.
"""

from quantpatch.quantize.calibrate import calibrate, calibrating
from quantpatch.quantize.calibration import Calibration
from quantpatch.quantize.calibration_report import CalibrationReport
from quantpatch.quantize.configure import configure
from quantpatch.quantize.convert import convert, quantized, revert
from quantpatch.quantize.explain import explain
from quantpatch.quantize.scope import keep_float, quantize_modules
from quantpatch.quantize.zero_points import fit_zero_points

__all__ = [
    "Calibration",
    "CalibrationReport",
    "calibrate",
    "calibrating",
    "configure",
    "convert",
    "explain",
    "fit_zero_points",
    "keep_float",
    "quantize_modules",
    "quantized",
    "revert",
]
