"""Division that is rounded correctly wherever it runs.

On CUDA torch divides by a number by multiplying with its reciprocal, eager and compiled, and what
``torch.compile`` makes of a division by a tensor is Triton's ``/``: an approximation that is off by up to 2
units in the last place (``torch._inductor.config.eager_numerics.division_rounding`` is off by default). A
scale that is off by one bit moves ties, and what was trained is then not what is deployed.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def quotient(a: Tensor, b: Tensor | float) -> Tensor:
    """``a / b`` of float32, rounded once, to nearest, ties to even."""
    if a.device.type != "cuda":
        return a / b
    if not isinstance(b, Tensor):
        b = torch.full((), b, dtype=a.dtype, device=a.device)
    if torch.compiler.is_compiling():
        # An operation of which the compiler divides exactly. Adding -0 changes nothing, not even a zero.
        return torch.addcdiv(torch.full((), -0.0, dtype=a.dtype, device=a.device), a, b)
    return a / b


def float32(number: float) -> float:
    """A number of Python's, rounded to float32.

    Of two numbers that are float32, quotient and product come out as float32 arithmetic has them: a double
    has more than twice the digits and two, so rounding to it first changes nothing.
    """
    return ctypes.c_float(number).value
