"""Fake quantization: round a tensor to a number format and back, as pure functions on tensors.

This module finds ranges and scales, ``gradients.py`` differentiates, and one of ``backends/`` rounds. What
they promise:

- ``y = round(x / scale) * scale`` with a true division, ties to even, in float32 whatever the input's dtype:
  integer results equal ONNX's ``QuantizeLinear`` followed by ``DequantizeLinear`` bit for bit.
- The forward pass works in place in its own result. For the backward pass it keeps nothing where nothing
  lies outside the range, else at most a byte an element; a learned range keeps ``x``
  itself, the range and the scale.
- No value is read back to the host on an accelerator, and under ``torch.compile`` and ``torch.export`` the
  same arithmetic is plain operations, which fuse into their neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantpatch.errors import ArgumentError, ArgumentTypeError, RangeError
from quantpatch.numerics.backends import select
from quantpatch.numerics.backends.scales import divisor, rescale_, spread
from quantpatch.numerics.division import quotient
from quantpatch.numerics.formats import Blocked, Integer, NumberFormat
from quantpatch.numerics.gradients import round_trip
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.numerics.modes import is_in_memory, is_jit_traced
from quantpatch.numerics.qparams import QParams
from quantpatch.numerics.zero_point import check_zero_point, magnitudes, upper_end
from quantpatch.torch_tools.sharded import beside

#: The axes that are kept, each index along them with a range of its own.
Axis = int | tuple[int, ...] | None
ZeroPoint = Tensor | int | None


def fake_quantize(
    x: Tensor,
    amax: Tensor | None,
    format: NumberFormat,
    *,
    axis: Axis = None,
    zero_point: ZeroPoint = None,
    batch_axis: int | None = None,
) -> Tensor:
    """Rounds ``x`` to what ``format`` can hold within the range ``amax``.

    ``scale = amax / format.max; q = clamp(round(x / scale), format.min, format.max); result = q * scale``.
    A range of 0 (a dead channel) gives 0. Infinities saturate, NaN stays NaN; a range that is not finite
    gives NaN. Zeros of integers are positive, as ONNX Runtime's are; those of floats keep their sign.

    ``amax`` is the upper end of the range. The lower one is ``-amax``, and 0 of unsigned integers. With a
    zero point ``z`` integers are unsigned, the grid goes from ``-z`` to ``2**bits - 1 - z``, which take the
    place of ``format.min`` and ``format.max``, and the range begins at ``amax * min / max``.

    The gradient to ``x`` is the straight-through estimator of Bengio et al. 2013 (arXiv 1308.3432): it passes
    inside the range, both ends included, and is zero outside. With ``amax=None`` nothing is outside but the
    negative values of unsigned integers without a zero point. A range that requires a gradient makes both
    gradients those of LSQ (Esser et al. 2020, arXiv 1902.08153, equations 3 and 5), which call inside what
    ``format.min < x / scale < format.max`` is, with its gradient scale ``1 / sqrt(N * steps)``, where N
    is the number of elements that share the range (of activations those of one example: the paper's number of
    features in the layer), and the steps are those of the range's longer side. LSQ learns
    ``scale``; the gradient to ``amax`` is ``format.max`` times that to ``scale``, by which gradient descent
    moves both alike. (The chain rule's is ``format.max ** 2`` times smaller and hardly moves a range.)

    Args:
        x: float32, float16, bfloat16 or float64, any shape, strides and device.
        amax: The range. 0-dim, or of ``x``'s number of dimensions with 1 on the axes not kept. Computed
            in float32. None takes the range of ``x`` itself, with no gradient through it: the smallest that
            clips nothing, but for negative values of unsigned integers without a zero point. For a
            ``Blocked`` format None takes each block's own; a given range has the
            number of blocks on ``axis``, or is 0-dim; for ``"e4m3"`` scales (NVFP4) it is the range of the
            whole tensor, 0-dim.
        format: The number format.
        axis: The axes that are *kept*, each index along them with a range of its own; negative ones count
            from the end. None keeps none. For a blocked format: the one axis that blocks run along,
            by default the last; its end may be a shorter block.
        zero_point: Which of the unsigned integers stands for 0, so that the grid fits a range that is not
            symmetric: from 0 to ``2**bits - 2``; with 128 of 8 bits the grid is that of int8. A number, or a
            0-dim tensor, of uint8 for one. None: integers are what the format says.
        batch_axis: The axis of an activation's examples, however many of which give a learned range a
            gradient that is the sum of theirs. None: ``x`` is a weight, or a single example.

    Returns:
        A tensor of ``x``'s shape, dtype and memory format.

    Raises:
        ArgumentTypeError: ``x`` is not a tensor of real floating-point numbers.
        ArgumentError: The format cannot be used in this way.
        RangeError: ``amax`` does not fit ``x``, or ``axis`` does not exist.
    """
    check_operand(x)
    if isinstance(axis, GroupedAxes):
        split = fake_quantize(
            axis.split(x), _split_range(amax), format, axis=axis.SPLIT, zero_point=zero_point
        )
        return split.flatten(0, 1)
    if not x.dim() and isinstance(format, Blocked):
        return fake_quantize(x.unsqueeze(0), amax, format, axis=axis).squeeze(0)
    return round_trip(x, _qparams(x, amax, format, axis, zero_point), batch_axis)


def quantize(
    x: Tensor,
    amax: Tensor | None,
    format: NumberFormat,
    *,
    axis: Axis = None,
    zero_point: ZeroPoint = None,
) -> tuple[Tensor, Tensor]:
    """The numbers that :func:`fake_quantize` rounds to, and their scale, for export and packing.

    Args:
        x: As in :func:`fake_quantize`.
        amax: As in :func:`fake_quantize`.
        format: As in :func:`fake_quantize`.
        axis: As in :func:`fake_quantize`.
        zero_point: As in :func:`fake_quantize`.

    Returns:
        ``(codes, scale)``. Codes have ``x``'s shape: int8 or uint8 for integers, with the zero point added
        as in ONNX's QuantizeLinear; else float32 values on the format's grid. The scale is float32 of the
        range's shape; for a blocked format of ``x``'s shape with the number of blocks on ``axis`` (NVFP4:
        block scale times tensor scale).

    Raises:
        ArgumentTypeError: ``x`` is not a tensor of real floating-point numbers.
        ArgumentError: As in :func:`fake_quantize`.
        RangeError: As in :func:`fake_quantize`.
    """
    check_operand(x)
    if isinstance(axis, GroupedAxes):
        codes, scale = quantize(
            axis.split(x), _split_range(amax), format, axis=axis.SPLIT, zero_point=zero_point
        )
        return codes.flatten(0, 1), axis.spread(scale.squeeze(1) if scale.dim() else scale, x.shape[0])
    with torch.no_grad():
        if not x.dim() and isinstance(format, Blocked):
            codes, scale = quantize(x.unsqueeze(0), amax, format, axis=axis)
            return codes.squeeze(0), scale
        q = _qparams(x, amax, format, axis, zero_point)
        scale = q.scales()
        return _codes(x, spread(scale, x, format, q.dim), q), scale


def dequantize(
    codes: Tensor,
    scale: Tensor,
    format: NumberFormat,
    *,
    axis: Axis = None,
    zero_point: ZeroPoint = None,
) -> Tensor:
    """Turns what :func:`quantize` returned back into values.

    Args:
        codes: From :func:`quantize`.
        scale: From :func:`quantize`.
        format: The format given to :func:`quantize`.
        axis: The axis given to :func:`quantize`.
        zero_point: The zero point given to :func:`quantize`.

    Returns:
        float32 of the codes' shape, equal to ``fake_quantize`` of the float32 input.
    """
    with torch.no_grad():
        if isinstance(format, Blocked):
            if not codes.dim():
                return dequantize(codes.unsqueeze(0), scale, format, axis=axis).squeeze(0)
            scale = spread(scale, codes, format, _block_axis(codes, axis))
            format = format.element
        if isinstance(axis, GroupedAxes):
            scale = axis.spread(scale, codes.shape[0])
        values = codes.to(torch.float32, copy=True)
        if zero_point is not None:
            values.sub_(zero_point)
        return rescale_(values, scale, format)


def reduce_amax(x: Tensor, axis: Axis = None) -> Tensor:
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
        return reduce_amax(axis.split(x), axis.SPLIT).squeeze(1)
    kept = _axes(x, axis)
    reduced = [d for d in range(x.dim()) if d not in kept]
    x = x.detach()
    shape = [] if axis is None else [n if d in kept else 1 for d, n in enumerate(x.shape)]
    if any(x.shape[d] == 0 for d in reduced):
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    if not reduced or not x.numel():
        return x.abs().float() if not reduced else torch.empty(shape, dtype=torch.float32, device=x.device)
    return select(x).amax(x, shape)


def _split_range(amax: Tensor | None) -> Tensor | None:
    """A range for :class:`GroupedAxes` as one for what these split."""
    return amax.unsqueeze(1) if amax is not None and amax.dim() else amax


# --- Scales -----------------------------------------------------------------------------------------------


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
    q = QParams(format, None, zero_point=_zero_point_for(x, format, zero_point))
    values = magnitudes(x.detach(), q)
    if not isinstance(format, Blocked):
        return upper_end(reduce_amax(values, axis), q)
    dim = _block_axis(x, axis)
    shape = _shape_of_blocks(x, format, dim)
    if not x.numel():
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    return select(values).amax(values, shape, dim, format.block_size)


def _qparams(
    x: Tensor, amax: Tensor | None, format: NumberFormat, axis: Axis, zero_point: ZeroPoint
) -> QParams:
    """What a tensor is rounded by: the given range, if there is one, in float32, or a scale of its own."""
    if zero_point is not None:
        zero_point = _zero_point_for(x, format, zero_point)
    if isinstance(format, Blocked):
        return _qparams_of_blocks(x, amax, format, _block_axis(x, axis))
    if amax is None:
        highest = QParams(format, None, zero_point=zero_point).max()
        scale = quotient(own_range(x, format, axis, zero_point), highest)
        return QParams(format, None, scale, None, zero_point)
    return QParams(format, _checked_range(amax, x, axis), None, None, zero_point)


def _zero_point_for(x: Tensor, format: NumberFormat, zero_point: ZeroPoint) -> ZeroPoint:
    """A zero point for computing with ``x``: a number if the values of ``x`` are read as well."""
    if zero_point is None:
        return None
    check_zero_point(zero_point, format)
    if not isinstance(zero_point, Tensor):
        return zero_point
    if is_in_memory(x):
        return int(zero_point.item())
    if zero_point.device != x.device and not is_jit_traced():
        zero_point = zero_point.to(x.device)
    return beside(zero_point, x)


def _qparams_of_blocks(x: Tensor, amax: Tensor | None, format: Blocked, dim: int) -> QParams:
    """The same, of ranges and scales that are 0-dim, or like ``x`` with the number of blocks on ``dim``."""
    if amax is not None:
        if amax.requires_grad and format.scale != "float32":
            raise ArgumentError(
                f"a learned range needs float32 scales; those of {format.name} are {format.scale}",
                format=format,
            )
        # That of the whole tensor, where the scales of blocks share one of its own.
        wanted = () if format.scale == "e4m3" else _shape_of_blocks(x, format, dim)
        amax = _in_float32(_fitting(amax, x, wanted), x)
    if amax is not None and format.scale != "e4m3":
        return QParams(format, amax, format.block_scale(amax.detach()), dim)
    own = own_range(x, format, dim)
    if own.numel():
        own = format.block_scale(own, None if amax is None else amax.detach())
    return QParams(format, amax, own, dim)


def _shape_of_blocks(x: Tensor, format: Blocked, dim: int) -> tuple[int, ...]:
    return tuple(-(-n // format.block_size) if d == dim else n for d, n in enumerate(x.shape))


def _codes(x: Tensor, scale: Tensor, q: QParams) -> Tensor:
    codes, element = q.round_(quotient(x.float(), divisor(scale))), q.element()
    if q.zero_point is not None:
        return codes.add_(q.zero_point).to(torch.uint8)
    if type(element) is Integer:  # what a subclass rounds to need be no integers
        return codes.to(torch.uint8 if element.unsigned else torch.int8)
    return codes


# --- Arguments --------------------------------------------------------------------------------------------


def _axes(x: Tensor, axis: Axis) -> tuple[int, ...]:
    """``axis`` as non-negative numbers."""
    if axis is None:
        return ()
    axes = axis if isinstance(axis, tuple) else (axis,)
    for a in axes:
        if not -x.dim() <= a < x.dim():
            raise RangeError(f"axis {a} does not exist in a tensor of shape {tuple(x.shape)}", value=axis)
    return tuple(a % x.dim() for a in axes)


def _block_axis(x: Tensor, axis: Axis) -> int:
    """The one axis that blocks run along."""
    if isinstance(axis, tuple) and len(axis) != 1:
        raise ArgumentError(f"blocks run along one axis, got {axis}", axis=axis)
    return _axes(x, -1 if axis is None else axis)[0]


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


def _checked_range(amax: Tensor, x: Tensor, axis: Axis) -> Tensor:
    """A range in float32, if it fits the kept axes of a tensor."""
    if amax.dim():
        # The compiler's shapes are symbols, which nothing can remember.
        fits = _fits.__wrapped__ if torch.compiler.is_compiling() else _fits
        if is_jit_traced() or not fits(amax.shape, x.shape, axis):
            kept = range(x.dim()) if axis is None else _axes(x, axis)
            amax = _fitting(amax, x, [n if d in kept else 1 for d, n in enumerate(x.shape)])
    return _in_float32(amax, x)


@lru_cache(maxsize=1024)
def _fits(ranges: tuple[int, ...], shape: tuple[int, ...], axis: Axis) -> bool:
    """Whether there is one range for each index along the axes that are kept, or for all of an axis."""
    count = len(shape)
    axes = range(count) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if len(ranges) != count or any(not -count <= a < count for a in axes):
        return False
    kept = {a % count for a in axes}
    return all(m == 1 or (m == n and d in kept) for d, (m, n) in enumerate(zip(ranges, shape, strict=True)))


def _fitting(amax: Tensor, x: Tensor, wanted: Sequence[int]) -> Tensor:
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


def _in_float32(amax: Tensor, x: Tensor) -> Tensor:
    if amax.dtype is torch.float32 and amax.is_cpu and x.is_cpu and type(x) in (Tensor, torch.nn.Parameter):
        return amax
    # A number on the CPU goes with a tensor anywhere, as in torch's own operations; but of those, a division
    # by such a number is not exact.
    if not amax.dim() and amax.device != x.device and not is_jit_traced():
        amax = amax.to(x.device)
    if amax.dtype is not torch.float32:
        amax = amax.float()
    return beside(amax, x)
