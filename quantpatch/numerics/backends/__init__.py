"""Backends of rounding, each a module with the same functions, and the one place that selects.

================  ====================================================================================
eager.py          plain tensors in main memory: in place, and only what has to be done
numba.py          the same in one pass, by kernels of our own for CPUs (``kernels/``)
triton.py         CUDA, by one kernel of our own (``triton_kernel.py``)
inductor.py       plain operations for everything else: what ``torch.compile`` and others record and fuse
================  ====================================================================================

What they share: ``clip_mask.py`` (which elements lie outside a range, kept for the backward pass),
``lsq.py`` (the gradients of learned ranges) and ``scales.py``.

All give the same bits, but for the last digits of the gradient to a learned range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from quantpatch.numerics.backends import eager, inductor, numba, triton
from quantpatch.numerics.backends.clip_mask import ClipMask
from quantpatch.numerics.modes import is_readable
from quantpatch.numerics.qparams import QParams

__all__ = ["Backend", "select"]


class Backend(Protocol):
    """What each of the modules has."""

    def serves(self, x: Tensor, q: QParams | None = None) -> bool:
        """Whether it can work on ``x``, which is a plain tensor that can be read.

        Args:
            x: Floating point.
            q: What it would be rounded by; None for a reduction.
        """

    def round_trip(self, x: Tensor, q: QParams, *, trains: bool = False) -> Tensor:
        """``x`` to the grid and back; ``trains`` says that there will be a gradient."""

    def round_and_mask(self, x: Tensor, q: QParams) -> tuple[Tensor, ClipMask]:
        """The same with a gradient to come, and what that is to be zero for."""

    def zero_clipped(self, grad: Tensor, mask: ClipMask, q: QParams) -> Tensor:
        """The straight-through gradient: ``grad``, but 0 for what was clipped.

        Args:
            grad: Of the shape of ``x``, any strides.
            mask: What :meth:`round_and_mask` returned.
            q: What it was given.
        """

    def lsq_gradients(
        self, grad: Tensor, x: Tensor, q: QParams, batch_axis: int | None
    ) -> tuple[Tensor, Tensor]:
        """LSQ's gradients to ``x`` and to the range."""

    def amax(self, x: Tensor, shape: Sequence[int], dim: int | None = None, block_size: int = 0) -> Tensor:
        """The largest magnitudes; NaN where there is one.

        Args:
            x: Any shape; no axis that is reduced is empty.
            shape: That of the result: 1 on axes that are reduced, the number of blocks on ``dim``; or empty.
            dim: The axis that blocks run along, if there are any: then no other is reduced.
            block_size: Elements in a block.
        """


def select(x: Tensor, q: QParams | None = None) -> Backend:
    """The backend for a tensor.

    Args:
        x: Floating point.
        q: What it is to be rounded by; None for a reduction.
    """
    if is_readable(x):
        if x.is_cpu:
            return numba if numba.serves(x, q) else eager
        if x.is_cuda and triton.serves(x, q):
            return triton
    return inductor
