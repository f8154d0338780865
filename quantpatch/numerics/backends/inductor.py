"""What helps ``torch.compile`` to make few graphs and good C++ code; no value depends on it.

Plain operations fuse by themselves. Three things have to be asked for. A number of a layer's is a constant of
its graph: zero points are tensors here, or each block of a model would be compiled anew. Bools are not
vectorised: what lies outside a range is kept for the backward pass as int8. And convolutions are computed
channels last, so weights and their gradients are reordered: that can be done in the same pass over memory as
the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantpatch.numerics.backends.clip_mask import is_outside
from quantpatch.numerics.division import quotient
from quantpatch.numerics.formats import Integer, NumberFormat

__all__ = [
    "ZeroPointAsData",
    "apart",
    "as_it_lies",
    "beyond",
    "in_own_order",
    "is_compiled",
    "is_compiled_for_cpu",
    "is_of_convolution",
    "outside_mask",
    "zero_masked",
]


_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # came with torch 2.7


def is_compiled() -> bool:
    """Whether it is ``torch.compile`` that records the operations, and not ``torch.export``."""
    return torch.compiler.is_compiling() and not _is_exporting()


def is_compiled_for_cpu(x: Tensor) -> bool:
    """Whether ``torch.compile`` makes C++ code of what is done with ``x``."""
    return is_compiled() and x.device.type == "cpu"


# --- Zero points ------------------------------------------------------------------------------------------


class ZeroPointAsData(Integer):
    """Unsigned integers whose zero point is in a tensor, so that one graph serves layers that differ in it.

    The ends of the grid are then tensors too.

    Args:
        bits: 2 to 8.
        zero_point: 0-dim, of any dtype.
    """

    def __init__(self, bits: int, zero_point: Tensor) -> None:
        for name, value in (("bits", bits), ("unsigned", True), ("narrow_range", False)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "zero_point", zero_point.float())

    @property
    def max(self) -> Any:
        """float32, 0-dim."""
        return 2.0**self.bits - 1.0 - self.zero_point

    @property
    def min(self) -> Any:
        """float32, 0-dim."""
        return -self.zero_point

    @property
    def lower_end(self) -> Any:
        """float32, 0-dim."""
        return quotient(self.min, self.max)


# --- What lies outside a range ----------------------------------------------------------------------------


def beyond(x: Tensor, amax: Tensor | None, format: NumberFormat) -> Tensor:
    """Which elements lie outside a range of a format: bool of ``x``'s shape."""
    if amax is None or not isinstance(format, ZeroPointAsData):
        return is_outside(x, amax, lower_end=format.lower_end)
    values, bottom = x.float(), torch.mul(amax, format.lower_end)
    return (values > amax) | (values < bottom)


def outside_mask(x: Tensor, amax: Tensor | None, format: NumberFormat) -> Tensor | None:
    """What lies outside a range of a format: int8 of ``x``'s shape, 1 there; None if nothing can.

    A bool takes twenty times as long to write as an int8 that is made of a float.
    """
    if amax is None and format.lower_end < 0:
        return None
    outside = beyond(x, amax, format)
    zeros = torch.zeros_like(x, dtype=torch.float32)
    return zeros.masked_fill(outside, 1.0).to(torch.int8)


def zero_masked(grad: Tensor, mask: Tensor) -> Tensor:
    """``grad`` with 0 where the mask is 1.

    Its bits and those of -1 or 0: with a bool in between, the compiler would keep that instead of the mask.
    """
    if grad.dtype == torch.float64:
        return (grad.view(torch.int64) & (mask.long() - 1)).view(torch.float64)
    bits = grad.float().view(torch.int32) & (mask.int() - 1)
    return bits.view(torch.float32).to(grad.dtype)


# --- The order of a convolution's weight in memory --------------------------------------------------------


def is_of_convolution(x: Tensor, scale: Tensor) -> bool:
    """Whether ``x`` looks like a two-dimensional convolution's weight, with a scale for each channel."""
    return is_compiled_for_cpu(x) and scale.dim() == 4 and x.is_contiguous()


def apart(amax: Tensor | None, scale: Tensor) -> tuple[Tensor | None, Tensor]:
    """Both, with their elements apart in memory.

    The compiler reorders tile by tile where there are two axes along which elements are neighbours. That of
    the ranges would be a third, and elements then be stored singly, which takes three times as long.
    """
    if amax is None or amax.requires_grad:
        return amax, torch.stack([scale, scale], -1).select(-1, 0)
    amax, scale = torch.stack([amax, scale], -1).unbind(-1)
    return amax, scale


def as_it_lies(weight: Tensor) -> Tensor:
    """The weight, as the forward pass is to see it.

    It is kept for the backward pass, and the compiler would keep a copy channels last, as of all that leads
    to a convolution; but not of what is seen through ``as_strided``.
    """
    return weight.as_strided(weight.shape, weight.stride())


def in_own_order(grad: Tensor) -> Tensor:
    """The gradient of a contiguous weight, contiguous.

    The compiler has it channels last, and autograd would copy it singly to the parameter's order. A copy to
    that order is left out as needless, but not one of what was made channels last before.
    """
    return grad.contiguous(memory_format=torch.channels_last).contiguous()
