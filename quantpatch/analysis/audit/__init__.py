"""What really ran quantized, what did not, and why."""

from quantpatch.analysis.audit import reasons
from quantpatch.analysis.audit.coverage import CoverageReport, CoverageRow, audit

__all__ = ["CoverageReport", "CoverageRow", "audit", "reasons"]
