"""Quantized models in files, and back, without running code that a file names."""

from quantpatch.export.checkpoint.expected_ranges import expect_ranges
from quantpatch.export.checkpoint.save_load import SaveReport, float_state_dict, load, save

__all__ = ["SaveReport", "expect_ranges", "float_state_dict", "load", "save"]
