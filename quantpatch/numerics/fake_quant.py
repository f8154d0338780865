"""Fake quantization: round a tensor to a number format and back, as pure functions on tensors.

With ``backends/``, the arithmetic, this is the only module that rounds. What it promises:

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
from typing import Any

import torch
from torch import Tensor

from quantpatch.errors import DescriptorError, OperandError, RangeError
from quantpatch.numerics.affine import magnitudes, upper_end
from quantpatch.numerics.backends.eager import Axis, round_trip_to_range
from quantpatch.numerics.backends.modes import is_in_memory, is_jit_traced
from quantpatch.numerics.backends.round_trip import round_trip
from quantpatch.numerics.backends.scales import block_views, divisor, rescale_, spread
from quantpatch.numerics.division import quotient
from quantpatch.numerics.formats import Blocked, Integer, NumberFormat
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.numerics.kernels import operations as kernels
from quantpatch.torch_tools.sharded import beside, is_sharded

__all__ = [
    "check_operand",
    "dequantize",
    "fake_quantize",
    "own_range",
    "quantize",
    "reduce_amax",
    "what_is_odd_about",
]


def fake_quantize(
    x: Tensor,
    amax: Tensor | None,
    format: NumberFormat,
    *,
    axis: Axis = None,
    batch_axis: int | None = None,
) -> Tensor:
    """Rounds ``x`` to what ``format`` can hold within the range ``amax``.

    ``scale = amax / format.max; q = clamp(round(x / scale), format.min, format.max); result = q * scale``.
    A range of 0 (a dead channel) gives 0. Infinities saturate, NaN stays NaN; a range that is not finite
    gives NaN. Zeros of integers are positive, as ONNX Runtime's are; those of floats keep their sign.

    ``amax`` is the upper end of the range. The lower one is ``amax * format.lower_end``: ``-amax``, 0 of
    unsigned integers, and with a zero point ``amax * format.min / format.max``.

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
        batch_axis: The axis of an activation's examples, however many of which give a learned range a
            gradient that is the sum of theirs. None: ``x`` is a weight, or a single example.

    Returns:
        A tensor of ``x``'s shape, dtype and memory format.

    Raises:
        OperandError: ``x`` is no tensor of real floating-point numbers.
        DescriptorError: The format cannot be used in this way.
        RangeError: ``amax`` does not fit ``x``, or ``axis`` does not exist.
    """
    check_operand(x)
    if amax is not None and (rounded := round_trip_to_range(x, amax, format, axis)) is not None:
        return rounded
    if isinstance(axis, GroupedAxes):
        split = fake_quantize(axis.split(x), _split_range(amax), format, axis=axis.SPLIT)
        return split.flatten(0, 1)
    if not isinstance(format, Blocked):
        range_, scale = _range_and_scale(x, amax, format, axis)
        return round_trip(x, range_, scale, format, batch_axis=batch_axis)
    if not x.dim():
        return fake_quantize(x.unsqueeze(0), amax, format, axis=axis).squeeze(0)
    dim = _block_axis(x, axis)
    range_, scale = _ranges_and_scales_of_blocks(x, amax, format, dim)
    return round_trip(x, range_, scale, format, dim, batch_axis)


def quantize(
    x: Tensor, amax: Tensor | None, format: NumberFormat, *, axis: Axis = None
) -> tuple[Tensor, Tensor]:
    """The numbers that :func:`fake_quantize` rounds to, and their scale, for export and packing.

    Args:
        x: As in :func:`fake_quantize`.
        amax: As in :func:`fake_quantize`.
        format: As in :func:`fake_quantize`.
        axis: As in :func:`fake_quantize`.

    Returns:
        ``(codes, scale)``. Codes have ``x``'s shape: int8 or uint8 for integers, with the zero point added
        as in ONNX's QuantizeLinear; else float32 values on the format's grid. The scale is float32 of the
        range's shape; for a blocked format of ``x``'s shape with the number of blocks on ``axis`` (NVFP4:
        block scale times tensor scale).

    Raises:
        OperandError: ``x`` is no tensor of real floating-point numbers.
        DescriptorError: As in :func:`fake_quantize`.
        RangeError: As in :func:`fake_quantize`.
    """
    check_operand(x)
    if isinstance(axis, GroupedAxes):
        codes, scale = quantize(axis.split(x), _split_range(amax), format, axis=axis.SPLIT)
        return codes.flatten(0, 1), axis.spread(scale.squeeze(1) if scale.dim() else scale, x.shape[0])
    with torch.no_grad():
        if not isinstance(format, Blocked):
            _, scale = _range_and_scale(x, amax, format, axis)
            return _codes(x, scale, format), scale
        if not x.dim():
            codes, scale = quantize(x.unsqueeze(0), amax, format, axis=axis)
            return codes.squeeze(0), scale
        dim = _block_axis(x, axis)
        _, scale = _ranges_and_scales_of_blocks(x, amax, format, dim)
        return _codes(x, spread(scale, x, format, dim), format.element), scale


def dequantize(codes: Tensor, scale: Tensor, format: NumberFormat, *, axis: Axis = None) -> Tensor:
    """Turns what :func:`quantize` returned back into values.

    Args:
        codes: From :func:`quantize`.
        scale: From :func:`quantize`.
        format: The format given to :func:`quantize`.
        axis: The axis given to :func:`quantize`.

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
        if type(format) is Integer and format.zero_point:
            values.sub_(format.zero_point)
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
        OperandError: ``x`` is no tensor of real floating-point numbers.
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
    if not reduced:
        return x.abs().float()
    if torch.compiler.is_compiling() or is_sharded(x):
        return x.abs().amax(reduced, keepdim=axis is not None).float()
    if x.numel() and is_in_memory(x) and (found := kernels.amax(x, shape)) is not None:
        return found
    # Two reductions rather than one of |x|, which would allocate as much as x again.
    if axis is None:
        low, high = torch.aminmax(x)
    else:
        low, high = x.amin(reduced, keepdim=axis is not None), x.amax(reduced, keepdim=axis is not None)
    return torch.maximum(low.abs(), high.abs()).float()


def _split_range(amax: Tensor | None) -> Tensor | None:
    """A range for :class:`GroupedAxes` as one for what these split."""
    return amax.unsqueeze(1) if amax is not None and amax.dim() else amax


# --- Scales -----------------------------------------------------------------------------------------------


def own_range(x: Tensor, format: NumberFormat, axis: Axis = None) -> Tensor:
    """The range that :func:`fake_quantize` takes from a tensor, where it is given none.

    Args:
        x: As in :func:`fake_quantize`, like the rest; with an axis at least.
        format: See there.
        axis: See there.

    Returns:
        float32, 0-dim or of ``x``'s number of dimensions.
    """
    values = magnitudes(x.detach(), format)
    if isinstance(format, Blocked):
        return _block_amax(values, format.block_size, _block_axis(x, axis))
    return upper_end(reduce_amax(values, axis), format)


def _range_and_scale(
    x: Tensor, amax: Tensor | None, format: NumberFormat, axis: Axis
) -> tuple[Tensor | None, Tensor]:
    """The given range, if there is one, in float32, and the scale."""
    if amax is None:
        return None, quotient(own_range(x, format, axis), format.max)
    if amax.dim():
        kept = range(x.dim()) if axis is None else _axes(x, axis)
        amax = _checked_amax(amax, x, [n if d in kept else 1 for d, n in enumerate(x.shape)])
    else:
        amax = _checked_amax(amax, x, [])
    return amax, quotient(amax.detach(), format.max)


def _ranges_and_scales_of_blocks(
    x: Tensor, amax: Tensor | None, format: Blocked, dim: int
) -> tuple[Tensor | None, Tensor]:
    """The given ranges and the scales: 0-dim, or like ``x`` with the number of blocks on ``dim``."""
    if amax is not None:
        if amax.requires_grad and format.scale != "float32":
            raise DescriptorError(
                f"a learned range needs float32 scales; those of {format.name} are {format.scale}",
                field="format",
                value=format,
            )
        count = -(-x.shape[dim] // format.block_size)
        shape = [count if d == dim else n for d, n in enumerate(x.shape)]
        # That of the whole tensor, where the scales of blocks share one of its own.
        amax = _checked_amax(amax, x, [] if format.scale == "e4m3" else shape)
    if amax is not None and format.scale != "e4m3":
        return amax, format.block_scale(amax.detach())
    own = own_range(x, format, dim)
    if own.numel() == 0:
        return amax, own
    return amax, format.block_scale(own, None if amax is None else amax.detach())


def _block_amax(x: Tensor, size: int, dim: int) -> Tensor:
    """The ranges of blocks: float32 of the shape of ``x`` with the number of blocks on ``dim``."""
    if x.numel() and is_in_memory(x):
        shape = [-(-n // size) if d == dim else n for d, n in enumerate(x.shape)]
        if (found := kernels.amax(x, shape, dim, size)) is not None:
            return found
    ranges = [_amax_along(b, dim + 1) for b in block_views(x, dim, size)]
    return (ranges[0] if len(ranges) == 1 else torch.cat(ranges, dim)).float()


def _amax_along(x: Tensor, dim: int) -> Tensor:
    """The largest magnitudes along an axis that is not empty."""
    length = x.shape[dim]
    if not is_in_memory(x):
        return x.abs().amax(dim)
    if x.stride(dim) == 1 and length >= 16:
        return torch.maximum(x.amax(dim).abs(), x.amin(dim).abs())
    # Folding halves onto each other is an elementwise operation, which is faster than torch's reductions of
    # few elements or along other axes than the last.
    half = length // 2
    folded = x.narrow(dim, half, length - half).abs()
    if half:
        first = folded.narrow(dim, length - 2 * half, half)
        torch.maximum(first, x.narrow(dim, 0, half).abs(), out=first)
    length -= half
    while length > 1:
        half = length // 2
        first = folded.narrow(dim, 0, half)
        torch.maximum(first, folded.narrow(dim, length - half, half), out=first)
        length -= half
    return folded.select(dim, 0)


def _codes(x: Tensor, scale: Tensor, format: NumberFormat) -> Tensor:
    codes = format.round_(quotient(x.float(), divisor(scale)))
    if type(format) is Integer:  # what a class of somebody else's rounds to need be no integers
        return codes.add_(format.zero_point).to(torch.uint8 if format.unsigned else torch.int8)
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
        raise DescriptorError(f"blocks run along one axis, got {axis}", field="axis", value=axis)
    return _axes(x, -1 if axis is None else axis)[0]


def check_operand(x: Any) -> None:
    """Checks that something can be quantized at all.

    Raises:
        OperandError: It is no tensor of real floating-point numbers.
    """
    if not isinstance(x, Tensor):
        raise OperandError(f"only tensors can be quantized, got {type(x).__name__}", value=type(x))
    if not x.is_floating_point():
        raise OperandError(f"only real floating-point tensors can be quantized, got {x.dtype}", value=x.dtype)


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


def _checked_amax(amax: Tensor, x: Tensor, wanted: Sequence[int]) -> Tensor:
    """``amax`` in float32, if it is 0-dim or of the shape wanted, with 1 in any place."""
    sizes = zip(amax.shape, wanted, strict=False)
    # While torch.jit.trace runs, sizes are tensors, whose comparison it would warn of.
    if is_jit_traced():
        return amax.float()
    if amax.dim() and (amax.dim() != len(wanted) or any(m not in (1, n) for m, n in sizes)):
        expected = f"() or {tuple(wanted)}" if wanted else "(), the range of the whole tensor"
        raise RangeError(
            f"a range of shape {tuple(amax.shape)} does not fit a tensor of shape {tuple(x.shape)}: "
            f"expected {expected}",
            value=tuple(amax.shape),
        )
    # A number on the CPU goes with a tensor anywhere, as in torch's own operations; but of those, a division
    # by such a number is not exact.
    amax = amax.float() if amax.dim() else amax.to(x.device, torch.float32)
    return beside(amax, x)
