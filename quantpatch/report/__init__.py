"""What a model's quantizers are and do, for people and for programs."""

from quantpatch.report.changes import ChangeReport
from quantpatch.report.summary import QuantizerRow, Summary, summary

__all__ = ["ChangeReport", "QuantizerRow", "Summary", "summary"]
