"""From a trained model to files: checkpoints and ONNX, and the folding that they profit from."""

from quantpatch.export.benchmark import BenchReport, BenchRow, bench
from quantpatch.export.checkpoint import (
    SaveReport,
    StructurePlan,
    describe,
    expect_ranges,
    float_state_dict,
    load,
    save,
)
from quantpatch.export.onnx import Comparison, ExportReport, export_onnx
from quantpatch.export.prepare import (
    FoldedBatchNorm,
    FoldedWeights,
    Preparation,
    fold_batchnorm,
    folded_weights,
    prepare,
)
from quantpatch.export.program import (
    CompiledLatency,
    LoweredModel,
    LoweringComparison,
    LoweringReport,
    export_program,
    lower,
)

__all__ = [
    "BenchReport",
    "BenchRow",
    "Comparison",
    "CompiledLatency",
    "ExportReport",
    "FoldedBatchNorm",
    "FoldedWeights",
    "LoweredModel",
    "LoweringComparison",
    "LoweringReport",
    "Preparation",
    "SaveReport",
    "StructurePlan",
    "bench",
    "describe",
    "expect_ranges",
    "export_onnx",
    "export_program",
    "float_state_dict",
    "fold_batchnorm",
    "folded_weights",
    "load",
    "lower",
    "prepare",
    "save",
]
