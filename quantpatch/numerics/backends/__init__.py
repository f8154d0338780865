"""The arithmetic behind ``fake_quant.py``: to the grid of a format and back, with gradients.

================  ====================================================================================
round_trip.py     the trip and its gradients: which way it goes, and the way in plain operations
lsq.py            the gradients of learned ranges
eager.py          the way of tensors in main memory: in place, and only what has to be done
inductor.py       what helps torch.compile to make good code of plain operations on a CPU
clip_mask.py      which elements lie outside a range, in at most a byte an element
scales.py         scales, and the blocks of elements that share them
chunks.py         tensors cut into what a CPU's cache holds
modes.py          whether somebody records the operations
cuda.py           whether a tensor can go through the kernel
triton_kernel.py  one kernel for CUDA
================  ====================================================================================

Where numba is installed, ``kernels/`` does in one pass what eager.py takes several for.
"""

__all__: list[str] = []
