"""Number formats and the arithmetic of fake quantization, on tensors alone.

``formats.py`` has the formats. ``fake_quant.py`` is the one door to the arithmetic: it finds ranges and
scales, ``gradients.py`` differentiates, one of ``backends/`` computes; ``kernels/`` has the code for CPUs.
"""

from quantpatch.numerics.fake_quant import dequantize, fake_quantize, quantize
from quantpatch.numerics.formats import BUILTIN_FORMATS, Blocked, Float, Integer, NumberFormat, OnnxCodes
from quantpatch.numerics.ranges import reduce_amax

__all__ = [
    "BUILTIN_FORMATS",
    "Blocked",
    "Float",
    "Integer",
    "NumberFormat",
    "OnnxCodes",
    "dequantize",
    "fake_quantize",
    "quantize",
    "reduce_amax",
]
