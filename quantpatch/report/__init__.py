"""What a model's quantizers are and do, for people and for programs."""

from quantpatch.report.summary import QuantizerRow, Summary, summary

__all__ = ["QuantizerRow", "Summary", "summary"]
