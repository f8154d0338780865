"""The arithmetic behind :mod:`quantpatch.fake_quant`: to the grid of a format and back, with gradients.

================  ====================================================================================
round_trip.py     the trip, in place on a CPU, in plain operations elsewhere, and its gradients
outside.py        which elements lie outside a range, in at most a byte an element
pieces.py         tensors cut into what a CPU's cache holds
cuda.py           whether a tensor can go through the kernel
triton_kernel.py  one kernel for CUDA
================  ====================================================================================
"""
