"""The verbs: blocks, ``convert`` and ``revert``, ``configure``, ``calibrate``, ``explain``.

======================  ===========================================================================
scope.py                ``quantize_modules`` and ``keep_float``; options.py what they are given
quantizing_block.py     one block: what it replaces, and its end
resolve.py              what becomes of a class, with the reason (reasons.py) as a value;
                        what ``skip`` and ``include`` mean
compose.py              the table that it decides by
targets.py              what a target is, and whether a replacement can take its place
outcome.py              what came out
convert.py, explain.py  the same for models that exist, and in words
configure.py            quantizers by name; rules.py checks the rules
calibrate.py            ranges from data; calibration.py is one calibration, to_calibrate.py of what
call_ranges.py          what a calibration reports: layers called on tensors of several ranges,
weight_reads.py         and weights that a forward reads itself
zero_points.py          ``fit_zero_points``
======================  ===========================================================================
"""

from quantpatch.quantize import reasons
from quantpatch.quantize.calibrate import calibrate, calibrating
from quantpatch.quantize.calibration import Calibration
from quantpatch.quantize.configure import configure
from quantpatch.quantize.convert import convert, quantized, revert
from quantpatch.quantize.explain import explain
from quantpatch.quantize.quantizing_block import quantize_operations_early
from quantpatch.quantize.scope import keep_float, quantize_modules
from quantpatch.quantize.zero_points import fit_zero_points
from quantpatch.reports.report import CalibrationReport, ZeroPointReport

__all__ = [
    "Calibration",
    "CalibrationReport",
    "ZeroPointReport",
    "calibrate",
    "calibrating",
    "configure",
    "convert",
    "explain",
    "fit_zero_points",
    "keep_float",
    "quantize_modules",
    "quantize_operations_early",
    "quantized",
    "reasons",
    "revert",
]
