"""Models as programs of PyTorch's own: exported, and compiled to integer kernels by its compiler.

==============  ==============================================================================
export.py       ``export_program``, with torch's operators for quantized values
capture.py      the model traced, each quantizer as such operators
lower.py        ``lower``, the program compiled to integer kernels, and the report (report.py)
needs.py        what that needs of the machine
build.py        the program given to torch's compiler; inputs.py: what the result takes
passes.py       what is rewritten before the compiler gets it, and after it has fused
weight_only.py  layers of which the weights alone are quantized; weight_constants.py: weights as constants
kernels.py      the integer kernels in what it made
comparison.py   its results, and integers, beside the model's; measured.py: its latency
==============  ==============================================================================
"""

from quantpatch.export.program.export import export_program
from quantpatch.export.program.lower import LoweredModel, lower
from quantpatch.export.program.report import CompiledLatency, LoweringComparison, LoweringReport

__all__ = [
    "CompiledLatency",
    "LoweredModel",
    "LoweringComparison",
    "LoweringReport",
    "export_program",
    "lower",
]
