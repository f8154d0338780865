"""What really ran quantized, what did not, and why."""

from quantpatch.audit.coverage import CoverageReport, CoverageRow, audit

__all__ = ["CoverageReport", "CoverageRow", "audit"]
