"""Whether a tensor on CUDA can go through the kernel of :mod:`quantpatch.numerics.backends.triton_kernel`.

That module needs Triton, so nothing imports it before a CUDA tensor comes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from quantpatch.numerics.formats import Integer, NumberFormat

__all__ = ["fused_kernel"]

Kernel: TypeAlias = Callable[[Tensor, Tensor | None, Tensor, NumberFormat, int | None], Tensor | None]


def fused_kernel(x: Tensor) -> Kernel | None:
    """The kernel for ``x``; None where plain operations are to be used.

    That is: not on CUDA; while somebody records the operations, since they fuse with their neighbours then;
    under a transform of ``torch.func``; and where Triton is missing or does not work, which is told once.
    """
    if (
        x.device.type != "cuda"
        or torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    return _working_kernel(x.get_device())


@functools.cache
def _working_kernel(device: int) -> Kernel | None:
    try:
        from quantpatch.numerics.backends.triton_kernel import fake_quantize_fused
    except ImportError:
        return None  # a CUDA build of torch without Triton: on Windows, for one
    try:
        x = torch.ones(1, device=torch.device("cuda", device))
        fake_quantize_fused(x, None, x, Integer(8), None)
    except Exception as error:
        warnings.warn(
            f"quantpatch's CUDA kernel does not work here, so slower operations stand in for it: {error!r}",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    return fake_quantize_fused
