"""ONNX files that compute the model's integers, and the checks that they do."""

from quantpatch.export.onnx.comparison import Comparison, ExportReport
from quantpatch.export.onnx.export import export_onnx

__all__ = ["Comparison", "ExportReport", "export_onnx"]
