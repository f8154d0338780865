"""The arithmetic behind :mod:`quantpatch.fake_quant`: to the grid of a format and back, with gradients.

================  ====================================================================================
round_trip.py     the trip and its gradients: which way it goes, and the way in plain operations
lsq.py            the gradients of learned ranges
in_memory.py      the way of tensors in main memory: in place, and only what has to be done
compiled.py       what helps torch.compile to make good code of plain operations on a CPU
outside.py        which elements lie outside a range, in at most a byte an element
scales.py         scales, and the blocks of elements that share them
pieces.py         tensors cut into what a CPU's cache holds
modes.py          whether somebody records the operations
cuda.py           whether a tensor can go through the kernel
triton_kernel.py  one kernel for CUDA
================  ====================================================================================

Where numba is installed, :mod:`quantpatch.kernels` does in one pass what in_memory.py takes several for.
"""
