"""Tensors on CUDA, by the kernel of :mod:`quantpatch.numerics.backends.triton_kernel`.

That module needs Triton, so nothing imports it before a CUDA tensor comes.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from quantpatch.numerics.backends.clip_mask import ClipMask
from quantpatch.numerics.backends.inductor import amax as amax
from quantpatch.numerics.backends.inductor import lsq_gradients as lsq_gradients
from quantpatch.numerics.formats import Float, Integer
from quantpatch.numerics.qparams import QParams

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def serves(x: Tensor, q: QParams | None = None) -> bool:
    """See :class:`quantpatch.numerics.backends.Backend`, like the rest.

    The kernel does integers and floats, with one scale, with one for each index of an axis, and with one for
    each block of the last axis; not float64, several kept axes, or blocks with a shorter tail.
    """
    return (
        q is not None
        and x.dtype in _DTYPES
        and type(q.format.element) in (Integer, Float)
        and _elements_per_scale(x if _is_dense(x) else torch.empty_like(x, device="meta"), q) is not None
        and _works(x.get_device())
    )


def round_trip(x: Tensor, q: QParams, *, trains: bool = False) -> Tensor:
    """``x`` to the grid and back."""
    return _rounded(x, q, masked=False)[0]


def round_and_mask(x: Tensor, q: QParams) -> tuple[Tensor, ClipMask]:
    """The same, and what was clipped: a byte an element, written in the same pass."""
    result, inside = _rounded(x, q, masked=q.clips())
    return result, ClipMask() if inside is None else ClipMask("bytes", inside)


def zero_clipped(grad: Tensor, mask: ClipMask, q: QParams) -> Tensor:
    """``grad`` with 0 for what was clipped: one pass, whatever the layout of the gradient."""
    return grad if mask.tensor is None else torch.where(mask.tensor, grad, 0.0)


def _rounded(x: Tensor, q: QParams, *, masked: bool) -> tuple[Tensor, Tensor | None]:
    from quantpatch.numerics.backends.triton_kernel import launch

    dense = x if _is_dense(x) else torch.empty_like(x).copy_(x)
    count = _elements_per_scale(dense, q)
    assert count is not None
    return launch(dense, q.amax, q.scales(), count, q, masked=masked)


def _elements_per_scale(x: Tensor, q: QParams) -> int | None:
    """How many elements in a row share a scale in the memory of ``x``; None if no one number says so."""
    scale = q.amax if q.scale is None else q.scale
    assert scale is not None
    if q.amax is not None and q.amax.numel() not in (1, scale.numel()):
        return None
    if scale.numel() == 1:
        return max(1, x.numel())
    block_size = q.format.block_size
    if q.dim is not None and block_size is not None:
        whole = q.dim == x.dim() - 1 and x.shape[-1] % block_size == 0 and x.is_contiguous()
        return block_size if whole and scale.numel() * block_size == x.numel() else None
    kept = [d for d, n in enumerate(scale.shape) if n > 1]
    if len(kept) == 1 and scale.shape[kept[0]] == x.shape[kept[0]]:
        return x.stride(kept[0])
    return None


def _is_dense(x: Tensor) -> bool:
    """Whether the elements lie in memory without gaps or overlaps, in any order of the axes."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(x))


@functools.cache
def _works(device: int) -> bool:
    """Whether the kernel works on a device; if not, that is reported once."""
    try:
        from quantpatch.numerics.backends.triton_kernel import launch
    except ImportError:
        return False  # a CUDA build of torch without Triton: on Windows, for one
    try:
        x = torch.ones(1, device=torch.device("cuda", device))
        launch(x, None, x, 1, QParams(Integer(8), None), masked=False)
    except Exception as error:
        warnings.warn(
            f"quantpatch's CUDA kernel does not work here, so slower operations are used instead: {error!r}",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return True
