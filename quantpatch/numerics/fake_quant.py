"""Fake quantization: round a tensor to a number format and back, as pure functions on tensors.

``ranges.py`` finds or checks the range, this module the scale; ``gradients.py`` differentiates, and one of
``backends/`` rounds. What they promise:

- ``y = round(x / scale) * scale`` with a true division, ties to even, in float32 whatever the input's dtype:
  integer results equal ONNX's ``QuantizeLinear`` followed by ``DequantizeLinear`` bit for bit.
- The forward pass works in place in its own result. For the backward pass it keeps nothing where nothing
  lies outside the range, else at most a byte an element; a learned range keeps ``x``
  itself, the range and the scale.
- No value is read back to the host on an accelerator, and under ``torch.compile`` and ``torch.export`` the
  same arithmetic is plain operations, which fuse into their neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantpatch.errors import ArgumentError
from quantpatch.numerics.backends.scales import divisor, rescale_, spread
from quantpatch.numerics.division import quotient
from quantpatch.numerics.formats import Blocked, Integer, NumberFormat
from quantpatch.numerics.gradients import round_trip
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.numerics.qparams import QParams
from quantpatch.numerics.ranges import (
    Axis,
    ZeroPoint,
    block_axis,
    check_operand,
    checked_range,
    fitting,
    in_float32,
    own_range,
    shape_of_blocks,
    zero_point_for,
)


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
    laid_out, q = _with_qparams(x, amax, format, axis, zero_point)
    y = round_trip(laid_out, q, batch_axis)
    return y if laid_out is x else y.reshape(x.shape)


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
    with torch.no_grad():
        laid_out, q = _with_qparams(x, amax, format, axis, zero_point)
        scale = q.scales()
        codes = _codes(laid_out, spread(scale, laid_out, format, q.dim), q).reshape(x.shape)
        if isinstance(axis, GroupedAxes):
            scale = axis.spread(scale.squeeze(1) if scale.dim() else scale, x.shape[0])
        return codes, scale


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
        values = codes.to(torch.float32, copy=True)
        if zero_point is not None:
            values.sub_(zero_point)
        if isinstance(format, Blocked):
            values = values if codes.dim() else values.unsqueeze(0)
            scale = spread(scale, values, format, block_axis(values, axis))
        elif isinstance(axis, GroupedAxes):
            scale = axis.spread(scale, codes.shape[0])
        return rescale_(values, scale, format.element).reshape(codes.shape)


def _with_qparams(
    x: Tensor, amax: Tensor | None, format: NumberFormat, axis: Axis, zero_point: ZeroPoint
) -> tuple[Tensor, QParams]:
    """A tensor, with axes of their own for what is kept or in blocks, and what it is rounded by.

    That is the given range, in float32, or a scale of its own.
    """
    if isinstance(axis, GroupedAxes):
        x, axis = axis.split(x), axis.SPLIT
        amax = amax.unsqueeze(1) if amax is not None and amax.dim() else amax
    if zero_point is not None:
        zero_point = zero_point_for(x, format, zero_point)
    if format.block_size is not None:
        assert isinstance(format, Blocked)
        x = x if x.dim() else x.unsqueeze(0)
        return x, _qparams_of_blocks(x, amax, format, block_axis(x, axis))
    if amax is not None:
        return x, QParams(format, checked_range(amax, x, axis), None, None, zero_point)
    highest = QParams(format, None, zero_point=zero_point).max()
    scale = quotient(own_range(x, format, axis, zero_point), highest)
    return x, QParams(format, None, scale, None, zero_point)


def _qparams_of_blocks(x: Tensor, amax: Tensor | None, format: Blocked, dim: int) -> QParams:
    """The same, of ranges and scales that are 0-dim, or like ``x`` with the number of blocks on ``dim``."""
    if amax is not None:
        if amax.requires_grad and format.scale != "float32":
            raise ArgumentError(
                f"a learned range needs float32 scales; those of {format.name} are {format.scale}",
                format=format,
            )
        # That of the whole tensor, where the scales of blocks share one of its own.
        wanted = () if format.scale == "e4m3" else shape_of_blocks(x, format, dim)
        amax = in_float32(fitting(amax, x, wanted), x)
    if amax is not None and format.scale != "e4m3":
        return QParams(format, amax, format.block_scale(amax.detach()), dim)
    own = own_range(x, format, dim)
    if own.numel():
        own = format.block_scale(own, None if amax is None else amax.detach())
    return QParams(format, amax, own, dim)


def _codes(x: Tensor, scale: Tensor, q: QParams) -> Tensor:
    codes, element = q.round_(quotient(x.float(), divisor(scale))), q.format.element
    if q.zero_point is not None:
        return codes.add_(q.zero_point).to(torch.uint8)
    if type(element) is Integer:  # what a subclass rounds to need be no integers
        return codes.to(torch.uint8 if element.unsigned else torch.int8)
    return codes
