"""The kernels themselves, in Python as numba compiles it: at their first use, then kept in its cache.

Each works on neighbours in a tensor's memory, so that threads can share one. Arithmetic is IEEE's, nothing is
reordered or fused, and so results have the bits that torch's own operations give. Elements that share a scale
lie as :class:`quantpatch.numerics.kernels.scale_layout.ScaleLayout` says: its attributes are arguments here.

===============  ====================================================================================
compilation.py   from functions to machine code that ctypes calls
elements.py      numbers, their bits, and rounding them to a grid
scale_layout.py  which elements share a scale
rounding.py      to the grid and back
clip_mask.py     which elements lie outside a range, and the gradient that is zero there
lsq.py           the gradients of learned ranges
reductions.py    largest magnitudes, histograms
===============  ====================================================================================
"""

from quantpatch.numerics.kernels.source import clip_mask, lsq, reductions, rounding
from quantpatch.numerics.kernels.source.compilation import KERNELS, kernel

__all__ = ["NAMES", "clip_mask", "kernel", "lsq", "reductions", "rounding"]

NAMES = tuple(KERNELS)
