"""Plain operations on whole tensors, for whatever has no backend of its own and for all that is recorded.

Nothing is read back to the host, so ``torch.compile``, ``torch.export``, ``torch.jit.trace`` and
``torch.func`` can record them, and they run on any device. By themselves they fuse with their neighbours;
two things have to be asked for to have few graphs and good C++ code, and no value depends on them. A number
of a layer's is a constant of its graph: zero points are tensors, or each block of a model would be compiled
anew. And bools are not vectorised: what lies outside a range is kept for the backward pass as int8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantpatch.numerics.backends import eager, lsq
from quantpatch.numerics.backends.clip_mask import ClipMask, is_clipped
from quantpatch.numerics.backends.scales import block_views, divisor, rescale_, spread
from quantpatch.numerics.division import quotient
from quantpatch.numerics.modes import is_compiled
from quantpatch.numerics.qparams import QParams
from quantpatch.torch_tools.sharded import is_sharded


def serves(x: Tensor, q: QParams | None = None) -> bool:
    """See :class:`quantpatch.numerics.backends.Backend`, like the rest."""
    return True


def round_trip(x: Tensor, q: QParams, *, trains: bool = False) -> Tensor:
    """``x`` to the grid and back."""
    x, scale, dim, element = x.detach(), q.scales(), q.dim, q.format.element
    sources, scales = [x], [scale]
    if dim is not None and q.format.block_size is not None and scale.dim():
        sources = block_views(x, dim, q.format.block_size)
        scale = scale.unsqueeze(dim + 1)
        counts = [s.shape[dim] for s in sources]
        scales = [*torch.split(scale, counts, dim)] if scale.shape[dim] > 1 else [scale] * len(sources)
    parts = [
        rescale_(q.round_(quotient(source.float(), divisor(s))), s, element)
        for source, s in zip(sources, scales, strict=True)
    ]
    if len(sources[0].shape) > x.dim() and dim is not None:
        parts = [p.flatten(dim, dim + 1) for p in parts]
    y = (parts[0] if len(parts) == 1 or dim is None else torch.cat(parts, dim)).to(x.dtype)
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return y.contiguous(memory_format=torch.channels_last)  # which joined blocks lose
    return y


def round_and_mask(x: Tensor, q: QParams) -> tuple[Tensor, ClipMask]:
    """The same, and what was clipped."""
    scale = q.scales()
    y = round_trip(x, QParams(q.format, q.amax, scale, q.dim, q.zero_point), trains=True)
    if not q.clips():
        return y, ClipMask()
    if is_compiled() and x.device.type == "cpu" and not scale.dim():
        # Not bools: one takes twenty times as long to write as an int8 that is made of a float.
        inside = torch.full_like(x, -1.0, dtype=torch.float32).masked_fill(is_clipped_by(x, q), 0.0)
        return y, ClipMask("bytes", inside.to(torch.int8))
    # Who records the operations decides what is kept.
    return y, ClipMask("values", x)


def zero_clipped(grad: Tensor, mask: ClipMask, q: QParams) -> Tensor:
    """``grad`` with 0 for what was clipped, from any backend's mask."""
    kept = mask.tensor
    if kept is None:
        return grad
    if mask.kind == "values":
        return grad.masked_fill(is_clipped_by(kept, q), 0.0)
    if mask.kind == "bytes" and is_compiled():
        return _masked_by_bits(grad, kept)
    grad = mask.ordered(grad)
    if mask.kind == "bits":
        bits = torch.arange(32, dtype=torch.int32, device="cpu")
        kept = (kept[:, None] >> bits & 1).view(-1)[: grad.numel()].view(grad.shape)
    return mask.restored(grad.masked_fill(kept == 0, 0.0))


#: LSQ's gradients, of whole tensors.
lsq_gradients = lsq.lsq_gradients


def amax(x: Tensor, shape: Sequence[int], dim: int | None = None, block_size: int = 0) -> Tensor:
    """The largest magnitudes."""
    if dim is not None or not (torch.compiler.is_compiling() or is_sharded(x)):
        return eager.amax(x, shape, dim, block_size)  # which allocates no |x| where nothing fuses
    reduced = [d for d in range(x.dim()) if not shape or shape[d] == 1]
    return x.abs().amax(reduced, keepdim=len(shape) > 0).float()


def is_clipped_by(x: Tensor, q: QParams) -> Tensor:
    """Which elements lie outside their range: bool of ``x``'s shape."""
    amax = None if q.amax is None else spread(q.amax, x, q.format, q.dim)
    zero_point = q.zero_point
    if not isinstance(zero_point, Tensor):
        return is_clipped(x, amax, lower_end=q.lower_end())
    values = x.float()
    if amax is None:
        return (values < 0) & (zero_point == 0)
    return (values > amax) | (values < torch.mul(amax, q.lower_end()))


def _masked_by_bits(grad: Tensor, mask: Tensor) -> Tensor:
    """The bits of ``grad`` and those of -1 or 0: with a bool the compiler would keep that for the mask."""
    if grad.dtype == torch.float64:
        return (grad.view(torch.int64) & mask.long()).view(torch.float64)
    return (grad.float().view(torch.int32) & mask.int()).view(torch.float32).to(grad.dtype)
