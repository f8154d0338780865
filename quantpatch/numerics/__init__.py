"""Number formats and the arithmetic of fake quantization, on tensors alone.

===================  ============================================================================
formats.py           number formats as values
fake_quant.py        the one door to the arithmetic
ranges.py            the range of a tensor: found, or given and checked
qparams.py           what a tensor is rounded by: format, range, scale and zero point
gradients.py         to the grid and back with gradients; backends/ compute, kernels/ for CPUs
grouped_axes.py      the axes of weights whose output channels lie along two
division.py          division that is rounded correctly wherever it runs
modes.py             what records or transforms the operations at the moment
===================  ============================================================================
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
