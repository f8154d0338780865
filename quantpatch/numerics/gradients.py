"""To the grid and back with gradients: the straight-through one, and LSQ's for a learned range.

A backend computes; what it must know of a tensor is in :class:`quantpatch.numerics.qparams.QParams`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from quantpatch.numerics.backends import Backend, inductor, select
from quantpatch.numerics.backends.clip_mask import ClipMask
from quantpatch.numerics.backends.lsq import divided_by, lsq_slopes
from quantpatch.numerics.backends.scales import spread
from quantpatch.numerics.formats import NumberFormat
from quantpatch.numerics.modes import is_jit_traced, is_plain_gradient
from quantpatch.numerics.qparams import QParams


def round_trip(x: Tensor, q: QParams, batch_axis: int | None = None) -> Tensor:
    """``x`` to the grid and back, with its gradient.

    Args:
        x: Floating point.
        q: What it is rounded by. A range that requires a gradient is learned.
        batch_axis: The axis of examples, see :func:`quantpatch.numerics.backends.lsq.divided_by`.
    """
    amax, backend = q.amax, select(x, q)
    learned = amax is not None and amax.requires_grad
    needs_gradient = (x.requires_grad or learned) and torch.is_grad_enabled()
    if forward_ad._current_level >= 0 or (backend is inductor and _is_transformed()):
        if not torch.is_grad_enabled():
            return inductor.round_trip(x, q)
        learned = learned or (amax is not None and _is_learned(amax))
        result: Tensor = _TransformableRoundTrip.apply(  # type: ignore[no-untyped-call]
            x, amax, q.scales(), q.zero_point, q.format, q.dim, batch_axis, learned
        )
        return result
    # A model traced by torch.jit.trace is for inference: its graph cannot hold a function of Python's.
    if not needs_gradient or is_jit_traced():
        return backend.round_trip(x, q)
    apply = _RoundTrip.apply if torch.compiler.is_compiling() else _apply
    return apply(x, amax, q.scale, q.zero_point, q.format, q.dim, batch_axis, backend)


def _is_transformed() -> bool:
    """Whether ``torch.func`` transforms what runs, and does not have it compiled, which follows it itself."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _is_learned(amax: Tensor) -> bool:
    """Whether a range needs a gradient, be it of the transform at hand or outside of it.

    One that a function only refers to needs none where ``torch.func`` transforms that function.
    """
    while not amax.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(amax):
        amax = torch._C._functorch.get_unwrapped(amax)
    return amax.requires_grad


class _RoundTrip(Function):
    """To the grid and back by the backend that serves a tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        amax: Tensor | None,
        scale: Tensor | None,
        zero_point: Tensor | int | None,
        format: NumberFormat,
        dim: int | None,
        batch_axis: int | None,
        backend: Backend,
    ) -> Tensor:
        q = QParams(format, amax, scale, dim, zero_point)
        # One of the two: a number is kept as it is.
        of_host, on_device = (None, zero_point) if isinstance(zero_point, Tensor) else (zero_point, None)
        ctx.call = backend, format, dim, batch_axis, of_host
        if ctx.needs_input_grad[1]:
            scale = q.scales()
            ctx.mask = None
            ctx.save_for_backward(x, amax, scale, on_device)
            return backend.round_trip(x, QParams(format, amax, scale, dim, zero_point), trains=True)
        result, mask = backend.round_and_mask(x, q)
        if mask.tensor is not None:
            by_range = mask.kind == "values"
            ctx.save_for_backward(
                mask.tensor, amax if by_range else None, None, on_device if by_range else None
            )
            mask = ClipMask(mask.kind, None, mask.order)
        ctx.mask = mask
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask = ctx.mask
        if mask is not None and mask.kind == "nothing":
            return grad, *[None] * 7
        backend, format, dim, batch_axis, zero_point = ctx.call
        if backend is not inductor and not is_plain_gradient(grad):
            backend = inductor
        # Detached: the gradient of this gradient goes to the upstream one only.
        kept, amax, scale, on_device = (
            None if t is None else t.detach() for t in (*ctx.saved_tensors, None, None, None, None)[:4]
        )
        q = QParams(format, amax, scale, dim, zero_point if on_device is None else on_device)
        if mask is None:
            grad_x, grad_amax = backend.lsq_gradients(grad, kept, q, batch_axis)
            return grad_x if ctx.needs_input_grad[0] else None, grad_amax, *[None] * 6
        return backend.zero_clipped(grad, ClipMask(mask.kind, kept, mask.order), q), *[None] * 7


# What Function.apply does beside is for torch.func, which has the other one.
_apply: Callable[..., Tensor] = super(Function, _RoundTrip).apply


class _TransformableRoundTrip(Function):
    """The same for ``torch.func`` and forward-mode differentiation, which need ``setup_context``.

    Not for all: with it Dynamo fails on dynamic shapes, and a call takes longer.
    """

    @staticmethod
    def forward(
        x: Tensor,
        amax: Tensor | None,
        scale: Tensor,
        zero_point: Tensor | int | None,
        format: NumberFormat,
        dim: int | None,
        batch_axis: int | None,
        learned: bool,
    ) -> Tensor:
        return inductor.round_trip(x, QParams(format, amax, scale, dim, zero_point))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, amax, scale, zero_point, ctx.format, ctx.dim, ctx.batch_axis, learned = inputs
        ctx.learned = learned or (amax is not None and ctx.needs_input_grad[1])
        of_host, on_device = (None, zero_point) if isinstance(zero_point, Tensor) else (zero_point, None)
        ctx.zero_point = of_host
        ctx.save_for_backward(x, amax, scale, on_device)
        ctx.save_for_forward(x, amax, scale, on_device)
        ctx.set_materialize_grads(False)  # whether the range has a tangent decides which rule holds

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        x, q = _saved(ctx)
        if ctx.learned:
            return *inductor.lsq_gradients(grad, x, q, ctx.batch_axis), *[None] * 6
        mask = ClipMask("values", x) if q.clips() else ClipMask()
        return inductor.zero_clipped(grad, mask, q), *[None] * 7

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, amax_tangent: Tensor | None, *others: None) -> Tensor:
        x, q = _saved(ctx)
        amax, scale = q.amax, q.scale
        if x_tangent is None:
            x_tangent = torch.zeros_like(x)
        if amax is None or scale is None or not (ctx.learned or amax_tangent is not None):
            if not q.clips():
                return x_tangent.clone()  # an input may not be handed out as a result
            return inductor.zero_clipped(x_tangent, ClipMask("values", x), q)
        outside, slope = lsq_slopes(x, scale, q)
        tangent = x_tangent.masked_fill(outside, 0.0)
        if amax_tangent is not None:
            divided = divided_by(x, q, ctx.batch_axis)
            along_range = slope * (spread(amax_tangent, x, ctx.format, ctx.dim) / divided)
            tangent = tangent + along_range.to(tangent.dtype)
        return tangent

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        amax: Tensor | None,
        scale: Tensor,
        zero_point: Tensor | int | None,
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
        if isinstance(zero_point, Tensor):
            zero_point = _batch_first(zero_point, in_dims[3], x)
        dim, batch_axis = (None if axis is None else axis + 1 for axis in (dim, batch_axis))
        result = _TransformableRoundTrip.apply(x, amax, scale, zero_point, format, dim, batch_axis, learned)  # type: ignore[no-untyped-call]
        return result, 0


def _saved(ctx: Any) -> tuple[Tensor, QParams]:
    """What was kept of a call, with no gradients to it."""
    x, amax, scale, zero_point = (None if t is None else t.detach() for t in ctx.saved_tensors)
    assert x is not None
    return x, QParams(ctx.format, amax, scale, ctx.dim, ctx.zero_point if zero_point is None else zero_point)


def _batch_first(t: Tensor, batch: int | None, x: Tensor) -> Tensor:
    """``t`` with its batch axis in front, of the dimensions of ``x``, whose batch is there already."""
    if batch is None:
        # Blocks index axes: the dimensions must agree. A 0-dim tensor fits everything.
        return t.unsqueeze(0) if t.dim() else t
    t = t.movedim(batch, 0)
    return t.reshape(-1, *[1] * (x.dim() - 1)) if t.dim() == 1 else t
