"""Rounding to a scaled grid and back, with its gradients: the arithmetic behind ``fake_quant.py``.

Two ways lead to the same bits. A plain tensor in main memory goes that of
``eager.py``; where its range is learned ``lsq.py`` has the
gradients, of which that to the range alone may differ in its last digits. Wherever somebody records the
operations (``torch.compile``, ``torch.export``, ``torch.jit.trace``, ``torch.func``, gradients of gradients)
or the tensor is on an accelerator, the same arithmetic is plain operations on the whole tensor and no value
is read back; on CUDA one kernel of our own (``triton_kernel.py``) does what is most
common.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from quantpatch.numerics.backends.cuda import fused_kernel
from quantpatch.numerics.backends.eager import forward_in_memory, round_trip_in_memory
from quantpatch.numerics.backends.inductor import (
    apart,
    as_it_lies,
    beyond,
    in_own_order,
    is_compiled_for_cpu,
    is_of_convolution,
    outside_mask,
    zero_masked,
)
from quantpatch.numerics.backends.lsq import divided_by, lsq_gradients, lsq_slopes
from quantpatch.numerics.backends.modes import is_in_memory, is_jit_traced
from quantpatch.numerics.backends.scales import block_views, divisor, rescale_, spread
from quantpatch.numerics.division import quotient
from quantpatch.numerics.formats import NumberFormat, element_of

__all__ = ["round_trip"]


def round_trip(
    x: Tensor,
    amax: Tensor | None,
    scale: Tensor,
    format: NumberFormat,
    dim: int | None = None,
    batch_axis: int | None = None,
) -> Tensor:
    """``x`` to the grid and back, with its gradient.

    Args:
        x: Floating point.
        amax: The range, float32, broadcastable to ``x``; None where it is that of ``x`` itself, so that
            nothing is outside.
        scale: float32, detached, broadcastable to ``x``.
        format: The number format.
        dim: For blocks that have scales of their own the axis they run along: there ``amax`` and ``scale``
            have the number of blocks, or 1.
        batch_axis: The axis of examples, see :func:`quantpatch.numerics.backends.lsq.divided_by`.
    """
    learned = isinstance(amax, Tensor) and amax.requires_grad
    recorded = learned and torch.is_grad_enabled()
    if forward_ad._current_level < 0 and not recorded and is_in_memory(x):
        return round_trip_in_memory(x, amax, scale, format, dim)
    kernel = fused_kernel(x)
    if kernel is not None and (fused := kernel(x, amax, scale, format, dim)) is not None:
        return fused
    transformed = not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )
    if dim is None and is_of_convolution(x, scale):
        amax, scale = apart(amax, scale)
    needs_gradient = transformed or learned or x.requires_grad
    # A model traced by torch.jit.trace is for inference: its graph cannot hold a function of Python's.
    if not (needs_gradient and torch.is_grad_enabled()) or is_jit_traced():
        return _forward(x.detach(), amax, scale, format, dim)
    result: Tensor
    if transformed:
        learned = amax is not None and _is_learned(amax)
        result = _TransformableRoundTrip.apply(x, amax, scale, format, dim, batch_axis, learned)  # type: ignore[no-untyped-call]
    else:
        result = _RoundTrip.apply(x, amax, scale, format, dim, batch_axis)  # type: ignore[no-untyped-call]
    return result


def _is_learned(amax: Tensor) -> bool:
    """Whether a range needs a gradient, be it of the transform at hand or outside of it.

    One that a function only refers to needs none where ``torch.func`` transforms that function.
    """
    while not amax.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(amax):
        amax = torch._C._functorch.get_unwrapped(amax)
    return amax.requires_grad


# --- Forward ----------------------------------------------------------------------------------------------


def _forward(x: Tensor, amax: Tensor | None, scale: Tensor, format: NumberFormat, dim: int | None) -> Tensor:
    """``x`` to the grid and back."""
    if is_in_memory(x):  # in training: else it went there at once
        return forward_in_memory(x, amax, scale, format, dim, trains=True)
    element = element_of(format)
    sources, scales = [x], [scale]
    if dim is not None and format.block_size is not None and scale.dim():
        sources = block_views(x, dim, format.block_size)
        scale = scale.unsqueeze(dim + 1)
        counts = [s.shape[dim] for s in sources]
        scales = [*torch.split(scale, counts, dim)] if scale.shape[dim] > 1 else [scale] * len(sources)
    parts = [
        rescale_(element.round_(quotient(source.float(), divisor(s))), s, element)
        for source, s in zip(sources, scales, strict=True)
    ]
    if len(sources[0].shape) > x.dim() and dim is not None:
        parts = [p.flatten(dim, dim + 1) for p in parts]
    y = parts[0] if len(parts) == 1 or dim is None else torch.cat(parts, dim)
    return _with_strides_of(x, y.to(x.dtype))


def _with_strides_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` in the memory format of ``x``, which joined blocks lose."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return y.contiguous(memory_format=torch.channels_last)
    return y


# --- Gradients --------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], *, learned: bool) -> None:
    """Keeps what backward needs."""
    x, amax, scale, ctx.format, ctx.dim, ctx.batch_axis = inputs
    ctx.learned = learned
    ctx.of_convolution = ctx.dim is None and is_of_convolution(x, scale)
    if is_compiled_for_cpu(x) and not learned and not scale.dim():
        ctx.save_for_backward(None, None, None, outside_mask(x, amax, ctx.format))
        return
    # Not a mask: who records the operations decides what is kept, and a learned range needs the values.
    kept = x if amax is not None or ctx.format.min >= 0 else None
    ctx.save_for_backward(kept, amax, scale if ctx.learned else None, None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Detached: the gradient of this gradient goes to the upstream one only.
    x, amax, scale, mask = (None if t is None else t.detach() for t in ctx.saved_tensors)
    grad_x: Tensor | None = grad
    grad_amax = None
    if mask is not None:
        grad_x = zero_masked(grad, mask)
    elif x is not None and amax is not None and scale is not None:
        grad_x, grad_amax = lsq_gradients(grad, x, amax, scale, ctx.format, ctx.dim, ctx.batch_axis)
    elif x is not None:
        wide = amax if amax is None else spread(amax, x, ctx.format, ctx.dim)
        grad_x = grad.masked_fill(beyond(x, wide, ctx.format), 0.0)
    if ctx.of_convolution and grad_x is not None:
        grad_x = in_own_order(grad_x)
    wanted = ctx.needs_input_grad
    return grad_x if wanted[0] else None, grad_amax if wanted[1] else None, None, None, None, None


def _tangent(ctx: Any, x_tangent: Tensor | None, amax_tangent: Tensor | None) -> Tensor:
    """What ``_backward`` does in the other direction: from tangents of the inputs to that of the result."""
    x, amax, scale = (None if t is None else t.detach() for t in ctx.saved_tensors)
    format, dim = ctx.format, ctx.dim
    assert x is not None
    assert scale is not None
    if x_tangent is None:
        x_tangent = torch.zeros_like(x)
    if amax is not None and (ctx.learned or amax_tangent is not None):
        outside, slope = lsq_slopes(x, scale, format, dim)
        tangent = x_tangent.masked_fill(outside, 0.0)
        if amax_tangent is not None:
            along_range = slope * (
                spread(amax_tangent, x, format, dim) / divided_by(x, amax, format, ctx.batch_axis)
            )
            tangent = tangent + along_range.to(tangent.dtype)
        return tangent
    if amax is None and format.min < 0:
        return x_tangent.clone()  # an input may not be handed out as a result
    wide = amax if amax is None else spread(amax, x, format, dim)
    return x_tangent.masked_fill(beyond(x, wide, format), 0.0)


class _RoundTrip(Function):
    """:func:`_forward` with the straight-through gradient, and LSQ's for a learned range."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        amax: Tensor | None,
        scale: Tensor,
        format: NumberFormat,
        dim: int | None,
        batch_axis: int | None,
    ) -> Tensor:
        learned = amax is not None and ctx.needs_input_grad[1]
        _save(ctx, (x, amax, scale, format, dim, batch_axis), learned=learned)
        if ctx.of_convolution:
            x = as_it_lies(x)
        return _forward(x, amax, scale, format, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad)


class _TransformableRoundTrip(Function):
    """The same for ``torch.func`` and forward-mode differentiation, which need ``setup_context``.

    Not for all: with it Dynamo fails on dynamic shapes, and a call takes 0.1 ms more.
    """

    @staticmethod
    def forward(
        x: Tensor,
        amax: Tensor | None,
        scale: Tensor,
        format: NumberFormat,
        dim: int | None,
        batch_axis: int | None,
        learned: bool,
    ) -> Tensor:
        return _forward(x, amax, scale, format, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *inputs_, learned = inputs
        _save(ctx, tuple(inputs_), learned=learned or (inputs[1] is not None and ctx.needs_input_grad[1]))
        ctx.save_for_forward(*inputs[:3])
        ctx.set_materialize_grads(False)  # whether the range has a tangent decides which rule holds

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * 7 if grad is None else (*_backward(ctx, grad), None)

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, amax_tangent: Tensor | None, *others: None) -> Tensor:
        return _tangent(ctx, x_tangent, amax_tangent)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        amax: Tensor | None,
        scale: Tensor,
        format: NumberFormat,
        dim: int | None,
        batch_axis: int | None,
        learned: bool,
    ) -> tuple[Any, int]:
        n = info.batch_size
        x = x.expand(n, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        if amax is not None:
            shared = amax.requires_grad and in_dims[1] is None
            amax = _batch_first(amax, in_dims[1], x)
            if shared:
                # Each member of the batch gives the one range a gradient, scaled by its own size.
                amax = amax.expand(n, *(amax.shape[1:] if amax.dim() else [1] * (x.dim() - 1)))
        scale = _batch_first(scale, in_dims[2], x)
        dim, batch_axis = (None if axis is None else axis + 1 for axis in (dim, batch_axis))
        result = _TransformableRoundTrip.apply(x, amax, scale, format, dim, batch_axis, learned)  # type: ignore[no-untyped-call]
        return result, 0


def _batch_first(t: Tensor, batch: int | None, x: Tensor) -> Tensor:
    """``t`` with its batch axis in front, of the dimensions of ``x``, whose batch is there already."""
    if batch is None:
        # Blocks index axes: the dimensions must agree. A 0-dim tensor fits everything.
        return t.unsqueeze(0) if t.dim() else t
    t = t.movedim(batch, 0)
    return t.reshape(-1, *[1] * (x.dim() - 1)) if t.dim() == 1 else t
