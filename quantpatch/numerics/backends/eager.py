"""Plain tensors in main memory, in eager mode.

There every operation costs a pass over memory, and a small tensor the price of calling it. So the result is
worked on in place; a range of one number is a number of Python's; and what lies outside the range is looked
for before, because mostly nothing does: then nothing is clamped, kept for backward or masked there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantpatch.numerics.backends import lsq
from quantpatch.numerics.backends.clip_mask import ClipMask, find_clipped
from quantpatch.numerics.backends.scales import block_views, divisor, rescale_, spread
from quantpatch.numerics.division import float32
from quantpatch.numerics.formats import Blocked, Integer
from quantpatch.numerics.qparams import QParams
from quantpatch.torch_tools.sharded import is_sharded

Range = Tensor | float

# Integers of the size of an element.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_SMALLEST_NORMAL = 2.0**-126


def serves(x: Tensor, q: QParams | None = None) -> bool:
    """See :class:`quantpatch.numerics.backends.Backend`, like the rest."""
    return x.is_cpu


def round_trip(x: Tensor, q: QParams, *, trains: bool = False) -> Tensor:
    """``x`` to the grid and back."""
    _, scale = _range_and_scale(q)
    return _rounded(x, scale, q, all_inside=q.amax is None and not q.clips())


def round_and_mask(x: Tensor, q: QParams) -> tuple[Tensor, ClipMask]:
    """The same, and what was clipped."""
    amax, scale = _range_and_scale(q)
    wide = spread(amax, x, q.format, q.dim) if isinstance(amax, Tensor) else amax
    mask = find_clipped(x, wide, lower_end=q.lower_end())
    return _rounded(x, scale, q, all_inside=mask.kind == "nothing"), mask


def zero_clipped(grad: Tensor, mask: ClipMask, q: QParams) -> Tensor:
    """``grad`` with 0 for what was clipped."""
    if mask.tensor is None:
        return grad
    # torch's operations with masks are not vectorised, those with bits are, which infinities are to them too.
    return (grad.view(_BITS[grad.element_size()]) & mask.tensor).view(grad.dtype)


#: LSQ's gradients, of whole tensors.
lsq_gradients = lsq.lsq_gradients


def amax(x: Tensor, shape: Sequence[int], dim: int | None = None, block_size: int = 0) -> Tensor:
    """The largest magnitudes."""
    if dim is not None:
        ranges = [blocks.abs().amax(dim + 1) for blocks in block_views(x, dim, block_size)]
        return (ranges[0] if len(ranges) == 1 else torch.cat(ranges, dim)).float()
    # Two reductions rather than one of |x|, which would allocate as much as x again. DTensors have no aminmax
    # in torch 2.8.
    if not shape:
        low, high = (x.amin(), x.amax()) if is_sharded(x) else torch.aminmax(x)
    else:
        reduced = [d for d, n in enumerate(shape) if n == 1]
        low, high = x.amin(reduced, keepdim=True), x.amax(reduced, keepdim=True)
    return torch.maximum(low.abs(), high.abs()).float()


# --- To the grid and back ---------------------------------------------------------------------------------


def _range_and_scale(q: QParams) -> tuple[Range | None, Range]:
    """A range and its scale, as numbers if it is one."""
    if q.scale is not None:
        return q.amax, q.scale
    assert q.amax is not None
    if q.amax.dim():
        return q.amax, q.scales()
    end = q.amax.item()
    scale = float32(end / q.max())
    if 0.0 < scale < _SMALLEST_NORMAL:  # which tensors may have flushed to 0
        scale = q.scales().item()
    return end, scale


def _rounded(x: Tensor, scale: Range, q: QParams, *, all_inside: bool) -> Tensor:
    """``x`` to the grid and back; ``all_inside`` says that nothing lies outside, as far as that is known."""
    if not x.numel():
        return torch.empty_like(x)
    format, dim = q.format, q.dim
    factors: Range = scale.item() if isinstance(scale, Tensor) and scale.numel() == 1 else scale
    smallest = factors.min().item() if isinstance(factors, Tensor) else factors
    divisors = factors if smallest >= _SMALLEST_NORMAL else divisor(factors)
    # What is inside the range stays on the grid without a clamp: quotients of normal numbers are too near the
    # ends of the grid to round past them. Scales of blocks that are rounded themselves are another matter,
    # and a subclass rounds as it says.
    stays = all_inside and type(format.element) is Integer and divisors is factors
    clamps = not stays or (isinstance(format, Blocked) and format.scale != "float32")
    if dim is None or format.block_size is None or not isinstance(factors, Tensor):
        return _written(x, None, factors, divisors, q, clamps)
    assert isinstance(divisors, Tensor)
    out = torch.empty_like(x)
    sources, targets = (block_views(t, dim, format.block_size) for t in (x, out))
    counts = [source.shape[dim] for source in sources]
    parts = (
        torch.split(t.unsqueeze(dim + 1), counts, dim) if t.shape[dim] > 1 else [t.unsqueeze(dim + 1)] * 2
        for t in (factors, divisors)
    )
    for source, target, factor, by in zip(sources, targets, *parts, strict=False):
        _written(source, target, factor, by, q, clamps)
    return out


def _written(
    x: Tensor, out: Tensor | None, factors: Range, divisors: Range, q: QParams, clamps: bool
) -> Tensor:
    """``round(x / divisors) * factors``, clamped between; in ``out``, if there is one."""
    round_: Callable[[Tensor], Tensor] = q.round_ if clamps else Tensor.round_
    if x.dtype == torch.float32:
        return rescale_(round_(torch.div(x, divisors, out=out)), factors, q.format.element)
    y = rescale_(round_(x.float().div_(divisors)), factors, q.format.element)
    return y.to(x.dtype) if out is None else out.copy_(y)
