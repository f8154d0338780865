"""Quantized models in files, and back, without running code that a file names."""

from quantpatch.export.checkpoint.description import describe
from quantpatch.export.checkpoint.expected_ranges import expect_ranges
from quantpatch.export.checkpoint.save_load import SaveReport, float_state_dict, load, save
from quantpatch.export.checkpoint.structure import StructurePlan

__all__ = ["SaveReport", "StructurePlan", "describe", "expect_ranges", "float_state_dict", "load", "save"]
