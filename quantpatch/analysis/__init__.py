"""Where quantization hurts: layer against layer, and layer by layer."""

from quantpatch.analysis.audit import CoverageReport, CoverageRow, reasons
from quantpatch.analysis.compare import ComparisonReport, ComparisonRow, compare
from quantpatch.analysis.sensitivity import SensitivityReport, SensitivityRow, sensitivity

__all__ = [
    "ComparisonReport",
    "ComparisonRow",
    "CoverageReport",
    "CoverageRow",
    "SensitivityReport",
    "SensitivityRow",
    "compare",
    "reasons",
    "sensitivity",
]
