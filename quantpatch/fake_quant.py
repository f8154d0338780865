"""Fake quantization: round a tensor to a number format and back, as pure functions on tensors.

This is the only module that rounds. What it promises:

- ``y = round(x / scale) * scale`` with a true division, ties to even, in float32 whatever the input's dtype:
  integer results equal ONNX's ``QuantizeLinear`` followed by ``DequantizeLinear`` bit for bit.
- The forward pass works in place in its own result, and the backward pass keeps no tensor but ``x`` itself,
  which its owner mostly keeps anyway (a parameter, a ReLU's output); where the range is that of ``x``
  itself it keeps nothing.
- No value is read back to the host on an accelerator, and under ``torch.compile`` and ``torch.export`` the
  same arithmetic is plain operations, which fuse into their neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quantpatch.errors import DescriptorError, RangeError
from quantpatch.formats import Blocked, Integer, NumberFormat

__all__ = ["dequantize", "fake_quantize", "quantize", "reduce_amax"]

Axis = int | tuple[int, ...] | None

# Elements worked on at a time by the CPU in eager mode: 4 MiB of float32, which stay in the last-level cache
# from one operation to the next. Smaller pieces cost more in calls than they win.
_PIECE = 2**20
_SMALLEST = 2.0**-149  # The smallest positive float32.


def fake_quantize(x: Tensor, amax: Tensor | None, format: NumberFormat, *, axis: Axis = None) -> Tensor:
    """Rounds ``x`` to what ``format`` can hold within the range ``amax``.

    ``scale = amax / format.max; q = clamp(round(x / scale), format.min, format.max); result = q * scale``.
    A range of 0 (a dead channel) gives 0. Infinities saturate, NaN stays NaN; a range that is not finite
    gives NaN. Zeros in the result are positive.

    The gradient to ``x`` is the straight-through estimator of Bengio et al. 2013 (arXiv 1308.3432): it passes
    where ``|x| <= amax`` (unsigned: ``0 <= x <= amax``), and is zero outside. With ``amax=None`` nothing is
    outside but the negative values of an unsigned format. A range that requires a gradient gets that of
    LSQ (Esser et al. 2020, arXiv 1902.08153, equations 3 and 5), with its gradient scale
    ``1 / sqrt(N * format.max)``, where N is the number of elements that share the range.

    Args:
        x: float32, float16, bfloat16 or float64, any shape, strides and device.
        amax: The range. 0-dim, or of ``x``'s number of dimensions with 1 on the axes not kept. Computed
            in float32. None takes the range of ``x`` itself, with no gradient through it. For a
            :class:`~quantpatch.formats.Blocked` format None takes each block's own; a given range has the
            number of blocks on ``axis``, or is 0-dim; for ``"e4m3"`` scales (NVFP4) it is the range of the
            whole tensor, 0-dim.
        format: The number format.
        axis: The axes that are *kept*, each index along them with a range of its own; negative ones count
            from the end. None keeps none. For a blocked format: the one axis that blocks run along,
            by default the last; its end may be a shorter block.

    Returns:
        A tensor of ``x``'s shape, dtype and memory format.

    Raises:
        DescriptorError: ``x`` is not floating point, or the format cannot be used in this way.
        RangeError: ``amax`` does not fit ``x``, or ``axis`` does not exist.
    """
    _check_floating(x)
    if isinstance(format, Blocked):
        dim = _block_axis(x, axis)
        blocks, ranges, scale = _blocks_and_scale(x, amax, format, dim)
        return _unblock(_round_trip(blocks, ranges, scale, format), x, dim)
    if amax is None:
        return _round_trip(x, None, reduce_amax(x, axis) / format.max, format)
    amax = _checked_amax(x, amax, axis)
    return _round_trip(x, amax, amax.detach() / format.max, format)


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
        ``(codes, scale)``. Codes have ``x``'s shape: int8 or uint8 for integers, else float32 values on the
        format's grid. The scale is float32 of ``amax``'s shape; for a blocked format of ``x``'s shape
        with the number of blocks on ``axis`` (NVFP4: block scale times tensor scale).

    Raises:
        DescriptorError: As in :func:`fake_quantize`.
        RangeError: As in :func:`fake_quantize`.
    """
    _check_floating(x)
    with torch.no_grad():
        if isinstance(format, Blocked):
            dim = _block_axis(x, axis)
            blocks, _, scale = _blocks_and_scale(x, amax, format, dim)
            codes = _unblock(format.round_(blocks.float() / _divisor(scale)), x, dim)
            scale = scale.squeeze(dim + 1) if scale.dim() else scale
        else:
            range_ = reduce_amax(x, axis) if amax is None else _checked_amax(x, amax, axis)
            scale = range_ / format.max
            codes = format.round_(x.float() / _divisor(scale))
        element = format.element if isinstance(format, Blocked) else format
        if isinstance(element, Integer):
            codes = codes.to(torch.uint8 if element.unsigned else torch.int8)
        return codes, scale


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
        values = codes.float()
        if format.block_size is None or scale.dim() == 0:
            return _rescale_(values, scale)
        dim = _block_axis(codes, axis)
        blocks = _to_blocks(values, format.block_size, dim) * scale.unsqueeze(dim + 1)
        return _unblock(blocks.add_(0.0), codes, dim)


def reduce_amax(x: Tensor, axis: Axis = None) -> Tensor:
    """The largest magnitude of ``x``, or of each index along the kept axes.

    Args:
        x: Floating point, any shape. NaN gives NaN; an axis of no elements gives 0.
        axis: The axes that are kept; negative ones count from the end. None keeps none.

    Returns:
        float32, detached: 0-dim with ``axis=None``, else of ``x``'s number of dimensions with 1 on the axes
        not kept.

    Raises:
        RangeError: ``axis`` does not exist.
    """
    kept = _axes(x, axis)
    reduced = [d for d in range(x.dim()) if d not in kept]
    x = x.detach()
    if any(x.shape[d] == 0 for d in reduced):
        shape = [] if axis is None else [n if d in kept else 1 for d, n in enumerate(x.shape)]
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    if not reduced:
        return x.abs().float()
    # Two reductions rather than one of |x|, which would allocate as much as x again.
    if axis is None and not torch.compiler.is_compiling():
        low, high = torch.aminmax(x)
    else:
        low, high = x.amin(reduced, keepdim=axis is not None), x.amax(reduced, keepdim=axis is not None)
    return torch.maximum(low.abs(), high.abs()).float()


# --- Rounding ---------------------------------------------------------------------------------------------


def _round_trip(x: Tensor, amax: Tensor | None, scale: Tensor, format: NumberFormat) -> Tensor:
    """``x`` to the grid and back, with its gradient. ``amax`` None: nothing is outside the range."""
    if torch.is_grad_enabled() and (x.requires_grad or (amax is not None and amax.requires_grad)):
        result: Tensor = _RoundTrip.apply(x, amax, scale, format)  # type: ignore[no-untyped-call]
        return result
    return _forward(x.detach(), scale, format)


def _forward(x: Tensor, scale: Tensor, format: NumberFormat) -> Tensor:
    """Rounds without a gradient: one allocation, of the result."""
    if not _is_plain_cpu(x):
        y = x.float() / _divisor(scale)
        return _rescale_(format.round_(y), scale).to(x.dtype)
    if x.dtype == torch.float32 and x.numel() <= 2 * _PIECE:
        return _rescale_(format.round_(x / _divisor(scale)), scale)
    result = torch.empty_like(x)
    scratch = None if x.dtype == torch.float32 else torch.empty(min(x.numel(), _PIECE), dtype=torch.float32)
    if scale.dim() != x.dim():
        scale = scale.reshape([1] * (x.dim() - scale.dim()) + list(scale.shape))
    # Slowest axis first, so that pieces are runs of memory.
    order = sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)
    for source, target, factor in _pieces(x.permute(order), result.permute(order), scale.permute(order)):
        if scratch is None:
            y = torch.div(source, _divisor(factor), out=target)
        else:
            y = scratch[: source.numel()].view(source.shape).copy_(source).div_(_divisor(factor))
        _rescale_(format.round_(y), factor)
        if scratch is not None:
            target.copy_(y)
    return result


def _pieces(x: Tensor, y: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cuts along the first axes until pieces have at most ``_PIECE`` elements."""
    if x.numel() <= _PIECE:
        yield x, y, scale
        return
    dim = next(d for d, n in enumerate(x.shape) if n > 1)
    step = max(1, _PIECE * x.shape[dim] // x.numel())
    xs, ys = torch.split(x, step, dim), torch.split(y, step, dim)
    scales = torch.split(scale, step, dim) if scale.shape[dim] > 1 else (scale,) * len(xs)
    for piece in zip(xs, ys, scales, strict=True):
        yield from _pieces(*piece)


def _divisor(scale: Tensor) -> Tensor:
    """``scale`` where it is not 0: there any number will do, since the quotient is multiplied by 0."""
    return scale.masked_fill(scale == 0, 1.0)


def _rescale_(y: Tensor, scale: Tensor) -> Tensor:
    """``y * scale`` in place, with -0 made 0: what integers and ONNX Runtime give."""
    if scale.numel() == 1 and _is_plain_cpu(y):
        # One operation for both: 0 + scale * y is rounded once, and 0 + -0 is 0.
        return torch.add(y.new_zeros(()), y, alpha=scale.item(), out=y)
    return y.mul_(scale).add_(0.0)


def _is_plain_cpu(x: Tensor) -> bool:
    """Whether values may be read and pieces looped over: eager mode, a real tensor in main memory."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
    )


class _RoundTrip(torch.autograd.Function):
    """:func:`_forward` with the straight-through gradient, and LSQ's for a learned range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor | None, scale: Tensor, format: NumberFormat) -> Tensor:
        ctx.format = format
        ctx.learned = amax is not None and ctx.needs_input_grad[1]
        # x itself, not a mask: a mask of one byte an element costs more time than the whole forward pass.
        ctx.save_for_backward(
            x if amax is not None or format.min >= 0 else None, amax, scale if ctx.learned else None
        )
        return _forward(x, scale, format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, amax, scale = ctx.saved_tensors
        grad_amax = None
        if ctx.learned:
            grad_amax = _lsq_gradient(grad, x, amax, scale, ctx.format)
        if not ctx.needs_input_grad[0]:
            return None, grad_amax, None, None
        if x is not None:
            grad = _zero_outside(grad, x, amax, unsigned=ctx.format.min >= 0)
        return grad, grad_amax, None, None


def _zero_outside(grad: Tensor, x: Tensor, amax: Tensor | None, *, unsigned: bool) -> Tensor:
    """``grad`` where x is in the range, ends included, else 0. NaN counts as inside."""
    if _is_plain_cpu(x) and x.dtype == grad.dtype == torch.float32:
        # The cheapest masks on a CPU. Their ends are excluded, hence the neighbours of ours.
        if amax is None or amax.numel() == 1:
            high = math.inf if amax is None else torch.nextafter(amax, amax.new_tensor(math.inf)).item()
            low = -_SMALLEST if unsigned else -high
            passed: Tensor = torch.ops.aten.hardtanh_backward(grad, x, low, high)
            return passed
        room = x.clone() if unsigned else x.abs()
        torch.sub(amax, room, out=room)
        if unsigned:
            torch.minimum(room, x, out=room)
        torch.ops.aten.threshold_backward.grad_input(grad, room, -_SMALLEST, grad_input=room)
        return room
    values = x.float()
    if amax is None:
        return grad.masked_fill(values < 0, 0.0)
    outside = (values if unsigned else values.abs()) > amax
    return grad.masked_fill(outside | (values < 0) if unsigned else outside, 0.0)


def _lsq_gradient(grad: Tensor, x: Tensor, amax: Tensor, scale: Tensor, format: NumberFormat) -> Tensor:
    """Gradient to a learned range: equation 3 of LSQ times its gradient scale, through scale = amax / max."""
    v = x.float() / _divisor(scale)
    q = format.round_(v.clone())
    v.masked_fill_((v <= format.min) | (v >= format.max), 0.0)
    per_scale = (q.sub_(v).mul_(grad)).sum_to_size(amax.shape)
    return per_scale / (format.max * math.sqrt(max(1, x.numel()) / amax.numel() * format.max))


# --- Blocks -----------------------------------------------------------------------------------------------


def _blocks_and_scale(
    x: Tensor, amax: Tensor | None, format: Blocked, dim: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``x`` with ``dim`` split into (blocks, elements), the given range and the scale shaped to match."""
    blocks = _to_blocks(x, format.block_size, dim)
    if amax is not None:
        if amax.requires_grad and format.scale != "float32":
            raise DescriptorError(
                f"a learned range needs float32 scales; those of {format.name} are {format.scale}",
                field="format",
                value=format,
            )
        if format.scale == "e4m3" and amax.dim():
            raise RangeError(
                f"the range of {format.name} is that of the whole tensor, 0-dim; got shape "
                f"{tuple(amax.shape)}. Leave it None to take it from the tensor.",
                value=tuple(amax.shape),
            )
        amax = amax.float() if amax.dim() == 0 else amax.float().unsqueeze(dim + 1)
        amax = _checked_amax(blocks, amax, None)
    if amax is not None and format.scale != "e4m3":
        return blocks, amax, format.block_scale(amax.detach())
    own = reduce_amax(blocks, tuple(d for d in range(blocks.dim()) if d != dim + 1))
    if own.numel() == 0:
        return blocks, amax, own
    return blocks, amax, format.block_scale(own, None if amax is None else amax.detach())


def _to_blocks(x: Tensor, size: int, dim: int) -> Tensor:
    """A view with ``dim`` split in two; a copy filled up with zeros where the last block is shorter."""
    missing = -x.shape[dim] % size
    if missing:
        x = torch.nn.functional.pad(x, [0, 0] * (x.dim() - dim - 1) + [0, missing])
    return x.reshape([*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1 :]])


def _unblock(blocks: Tensor, x: Tensor, dim: int) -> Tensor:
    """Undoes :func:`_to_blocks` to the shape and memory format of ``x``."""
    y = blocks.flatten(dim, dim + 1)
    if y.shape[dim] != x.shape[dim]:
        y = y.narrow(dim, 0, x.shape[dim])
        channels_last = (
            x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        )
        y = y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return y


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
    if x.dim() == 0:
        raise RangeError("blocks run along an axis, but the tensor is 0-dim", value=axis)
    return _axes(x, -1 if axis is None else axis)[0]


def _check_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise DescriptorError(
            f"fake quantization takes floating point, got {x.dtype}. Leave this input's quantizer out.",
            field="x",
            value=x.dtype,
        )


def _checked_amax(x: Tensor, amax: Tensor, axis: Axis) -> Tensor:
    """``amax`` in float32, if it broadcasts to ``x`` without making it larger."""
    kept = _axes(x, axis)
    fits = amax.dim() in (0, x.dim()) and all(
        m == 1 or (m == n and (axis is None or d in kept))
        for d, (m, n) in enumerate(zip(amax.shape, x.shape, strict=False))
    )
    if not fits:
        wanted = [n if axis is None or d in kept else 1 for d, n in enumerate(x.shape)]
        raise RangeError(
            f"a range of shape {tuple(amax.shape)} does not fit a tensor of shape {tuple(x.shape)} "
            f"with axis={axis}: expected () or {tuple(wanted)}",
            value=tuple(amax.shape),
        )
    return amax.float()
