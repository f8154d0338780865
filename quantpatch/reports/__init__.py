"""What a model's quantizers are and do, for people and for programs."""

from quantpatch.reports.report import CalibrationReport, ChangeReport, ZeroPointReport
from quantpatch.reports.summary import QuantizerRow, Summary, summary

__all__ = ["CalibrationReport", "ChangeReport", "QuantizerRow", "Summary", "ZeroPointReport", "summary"]
