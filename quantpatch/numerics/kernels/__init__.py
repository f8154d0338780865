"""Kernels for plain tensors in main memory, which do in one pass what takes torch's operations several.

They are written in Python and compiled by numba, which the extra ``cpu`` brings; without it everything goes
through torch's operations, with the same bits: only gradients of learned ranges are summed more exactly here.
:mod:`quantpatch.numerics.backends.numba` is what calls them.
"""

__all__: list[str] = []
