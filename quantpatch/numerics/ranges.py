"""The range of a tensor: what it is found to be, or given and checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantpatch.errors import ArgumentError, ArgumentTypeError, RangeError
from quantpatch.numerics.backends import select
from quantpatch.numerics.formats import Blocked, NumberFormat
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.numerics.modes import is_in_memory, is_jit_traced
from quantpatch.numerics.qparams import QParams, check_zero_point
from quantpatch.torch_tools.sharded import beside

#: The axes that are kept, each index along them with a range of its own.
Axis = int | tuple[int, ...] | None
ZeroPoint = Tensor | int | None


def reduce_amax(x: Tensor, *, axis: Axis = None) -> Tensor:
    """The largest magnitude of ``x``, or of each index along the kept axes.

    Args:
        x: Floating point, any shape. NaN gives NaN; an axis of no elements gives 0.
        axis: The axes that are kept; negative ones count from the end. None keeps none.

    Returns:
        float32, detached: 0-dim with ``axis=None``, else of ``x``'s number of dimensions with 1 on the axes
        not kept.

    Raises:
        ArgumentTypeError: ``x`` is not a tensor of real floating-point numbers.
        RangeError: ``axis`` does not exist.
    """
    check_operand(x)
    if isinstance(axis, GroupedAxes):
        return reduce_amax(axis.split(x), axis=axis.SPLIT).squeeze(1)
    kept = _axes(x, axis)
    reduced = [d for d in range(x.dim()) if d not in kept]
    x = x.detach()
    shape = [] if axis is None else [n if d in kept else 1 for d, n in enumerate(x.shape)]
    if any(x.shape[d] == 0 for d in reduced):
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    if not reduced or not x.numel():
        return x.abs().float() if not reduced else torch.empty(shape, dtype=torch.float32, device=x.device)
    return select(x).amax(x, shape)


def own_range(x: Tensor, format: NumberFormat, axis: Axis = None, zero_point: ZeroPoint = None) -> Tensor:
    """The range that :func:`fake_quantize` takes from a tensor, where it is given none.

    Args:
        x: As in :func:`fake_quantize`, like the rest; with an axis at least.
        format: See there.
        axis: See there.
        zero_point: See there.

    Returns:
        float32, 0-dim or of ``x``'s number of dimensions.
    """
    q = QParams(format, None, zero_point=zero_point_for(x, format, zero_point))
    values = q.magnitudes(x.detach())
    if not isinstance(format, Blocked):
        return q.upper_end(reduce_amax(values, axis=axis))
    dim = block_axis(x, axis)
    shape = shape_of_blocks(x, format, dim)
    if not x.numel():
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    return select(values).amax(values, shape, dim, format.block_size)


def range_shape(shape: Sequence[int], axis: Axis, block_size: int | None = None) -> tuple[int, ...] | None:
    """The shape of the ranges of a tensor of this shape; None if it has no such axes.

    Args:
        shape: The tensor's.
        axis: The axes that are kept; None keeps none. For a format in blocks the one that these run along,
            by default the last.
        block_size: Of such a format.
    """
    kept = -1 if axis is None and block_size is not None else axis
    axes = () if kept is None else kept if isinstance(kept, tuple) else (kept,)
    count = len(shape)
    if not all(-count <= a < count for a in axes):
        return None
    if isinstance(axis, GroupedAxes):  # neighbours along the first share a range
        return (axis.groups, shape[1], *[1] * (count - 2)) if shape[0] % axis.groups == 0 else None
    places = {a % count for a in axes}
    if block_size is not None:
        return tuple(-(-n // block_size) if d in places else n for d, n in enumerate(shape))
    return tuple(n if d in places else 1 for d, n in enumerate(shape)) if axes else ()


def shape_of_blocks(x: Tensor, format: Blocked, dim: int) -> tuple[int, ...]:
    """The shape of what there is one of for each block."""
    return tuple(-(-n // format.block_size) if d == dim else n for d, n in enumerate(x.shape))


def zero_point_for(x: Tensor, format: NumberFormat, zero_point: ZeroPoint) -> ZeroPoint:
    """A zero point for computing with ``x``: a number if the values of ``x`` are read as well."""
    if zero_point is None:
        return None
    check_zero_point(zero_point, format)
    if not isinstance(zero_point, Tensor):
        return zero_point
    if is_in_memory(x):
        return round(zero_point.item())
    if zero_point.device != x.device and not is_jit_traced():
        zero_point = zero_point.to(x.device)
    return beside(zero_point.round(), x)


# --- What is given ----------------------------------------------------------------------------------------


def check_operand(x: Any) -> None:
    """Checks that something can be quantized at all.

    Raises:
        ArgumentTypeError: It is not a tensor of real floating-point numbers.
    """
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"only tensors can be quantized, got {type(x).__name__}", x=type(x))
    if not x.is_floating_point():
        raise ArgumentTypeError(
            f"only real floating-point tensors can be quantized, got {x.dtype}", x=x.dtype
        )


def what_is_odd_about(x: Any) -> str | None:
    """What keeps torch's operations from a tensor that is not dense, and what to write; None if it is."""
    if not isinstance(x, Tensor):
        return None
    if isinstance(x, torch.masked.MaskedTensor):
        return "only dense tensors can be quantized, got a masked one; write x.to_tensor(0.0)"
    if x.is_nested:
        return (
            "only dense tensors can be quantized, got a nested one; write "
            "torch.nested.to_padded_tensor(x, 0.0), and hand on a mask of the padding"
        )
    if x.layout is not torch.strided:
        return f"only dense tensors can be quantized, got one of {x.layout}; write x.to_dense()"
    return None


def _axes(x: Tensor, axis: Axis) -> tuple[int, ...]:
    """``axis`` as non-negative numbers."""
    if axis is None:
        return ()
    axes = axis if isinstance(axis, tuple) else (axis,)
    for a in axes:
        if not -x.dim() <= a < x.dim():
            raise RangeError(f"axis {a} does not exist in a tensor of shape {tuple(x.shape)}", value=axis)
    return tuple(a % x.dim() for a in axes)


def block_axis(x: Tensor, axis: Axis) -> int:
    """The one axis that blocks run along."""
    if isinstance(axis, tuple) and len(axis) != 1:
        raise ArgumentError(f"blocks run along one axis, got {axis}", axis=axis)
    return _axes(x, -1 if axis is None else axis)[0]


def checked_range(amax: Tensor, x: Tensor, axis: Axis) -> Tensor:
    """A range in float32, if it fits the kept axes of a tensor."""
    if amax.dim():
        # The compiler's shapes are symbols, which nothing can remember.
        fits = _fits.__wrapped__ if torch.compiler.is_compiling() else _fits
        if is_jit_traced() or not fits(amax.shape, x.shape, axis):
            kept = range(x.dim()) if axis is None else _axes(x, axis)
            amax = fitting(amax, x, [n if d in kept else 1 for d, n in enumerate(x.shape)])
    return in_float32(amax, x)


@lru_cache(maxsize=1024)
def _fits(ranges: tuple[int, ...], shape: tuple[int, ...], axis: Axis) -> bool:
    """Whether there is one range for each index along the axes that are kept, or for all of an axis."""
    count = len(shape)
    axes = range(count) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if len(ranges) != count or any(not -count <= a < count for a in axes):
        return False
    kept = {a % count for a in axes}
    return all(m == 1 or (m == n and d in kept) for d, (m, n) in enumerate(zip(ranges, shape, strict=True)))


def fitting(amax: Tensor, x: Tensor, wanted: Sequence[int]) -> Tensor:
    """The range, if it is 0-dim or of the shape wanted, with 1 in any place."""
    sizes = zip(amax.shape, wanted, strict=False)
    # While torch.jit.trace runs, sizes are tensors, whose comparison it would warn of.
    if is_jit_traced():
        return amax
    if amax.dim() and (amax.dim() != len(wanted) or any(m not in (1, n) for m, n in sizes)):
        expected = f"() or {tuple(wanted)}" if wanted else "(), the range of the whole tensor"
        raise RangeError(
            f"a range of shape {tuple(amax.shape)} does not fit a tensor of shape {tuple(x.shape)}: "
            f"expected {expected}",
            value=tuple(amax.shape),
        )
    return amax


def in_float32(amax: Tensor, x: Tensor) -> Tensor:
    """A range for computing with a tensor: on its device, and on all ranks where that is in pieces."""
    if amax.dtype is torch.float32 and amax.is_cpu and x.is_cpu and type(x) in (Tensor, torch.nn.Parameter):
        return amax
    # A number on the CPU goes with a tensor anywhere, as in torch's own operations; but of those, a division
    # by such a number is not exact.
    if not amax.dim() and amax.device != x.device and not is_jit_traced():
        amax = amax.to(x.device)
    if amax.dtype is not torch.float32:
        amax = amax.float()
    return beside(amax, x)
