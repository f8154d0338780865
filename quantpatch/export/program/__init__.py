"""Models as programs of PyTorch's own: exported, and compiled to integer kernels by its compiler.

==============  ==============================================================================
export.py       ``export_program``, with torch's operators for quantized values
capture.py      the model traced, each quantizer as such operators
==============  ==============================================================================
"""

from quantpatch.export.program.export import export_program

__all__ = ["export_program"]
