"""From a trained model to files: checkpoints and ONNX, and the folding that they profit from."""

from quantpatch.export.batchnorm import FoldedBatchNorm, fold_batchnorm
from quantpatch.export.check import Comparison, ExportReport
from quantpatch.export.checkpoint import SaveReport, float_state_dict, load, save
from quantpatch.export.expected import expect_ranges
from quantpatch.export.fold import FoldedWeights, fold_weights
from quantpatch.export.onnx import export_onnx
from quantpatch.export.placement import Preparation, prepare

__all__ = [
    "Comparison",
    "ExportReport",
    "FoldedBatchNorm",
    "FoldedWeights",
    "Preparation",
    "SaveReport",
    "expect_ranges",
    "export_onnx",
    "float_state_dict",
    "fold_batchnorm",
    "fold_weights",
    "load",
    "prepare",
    "save",
]
