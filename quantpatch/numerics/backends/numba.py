"""Plain tensors in main memory, in one pass, by kernels that numba compiles (``kernels/``).

They serve tensors of float32 and bfloat16 without gaps and not too small, and the integers and floats of
``formats.py`` themselves: a subclass may round in its own way. The environment variable
``QUANTPATCH_KERNELS=0`` turns them off.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from quantpatch.numerics.backends import eager
from quantpatch.numerics.backends.clip_mask import NOTHING, ClipMask
from quantpatch.numerics.backends.lsq import divided_by
from quantpatch.numerics.division import float32
from quantpatch.numerics.formats import Float, Integer, NumberFormat
from quantpatch.numerics.kernels import buffers
from quantpatch.numerics.kernels.scale_layout import ScaleLayout, flat, memory_order, ordered_scales
from quantpatch.numerics.kernels.threads import for_parts, in_steps
from quantpatch.numerics.qparams import QParams

Kernels: TypeAlias = dict[str, Callable[..., Any]]
Grid: TypeAlias = tuple[float, float, int, int]

# Below it torch's operations are fast enough: loading takes half a second and, the first time, compiling some
# more. By size and not by what a process has done so far: a checkpointed part is computed twice, in one way.
_SMALLEST = 2**12
# Elements, and parts, of what is summed in parts.
_PART, _MOST_PARTS = 2**18, 64
_WANTED = os.environ.get("QUANTPATCH_KERNELS") != "0"

_RARE = ("lsq",)
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def _load(dtype: torch.dtype, *rare: str) -> Kernels | None:
    """The kernels by name; None without numba, or if they do not work here, which is reported once.

    Those that few have a use for are left out: they are compiled when they are asked for.
    """
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from quantpatch.numerics.kernels import source

        names = rare or [name for name in source.NAMES if name not in _RARE]
        return {name: source.kernel(name, _NAMES[dtype]) for name in names}
    except Exception as error:
        warnings.warn(
            f"quantpatch's CPU kernels do not work here, so slower operations are used instead: {error!r}",
            RuntimeWarning,
            stacklevel=4,
        )
        return None


def _kernels(x: Tensor) -> Kernels:
    """Those for a tensor that they serve."""
    kernels = _load(x.dtype)
    assert kernels is not None
    return kernels


def serves(x: Tensor, q: QParams | None = None) -> bool:
    """See :class:`quantpatch.numerics.backends.Backend`, like the rest."""
    return (
        _WANTED
        and x.numel() >= _SMALLEST
        and x.dtype in _NAMES
        and (q is None or (_grid(q.format, q.zero_point) is not None and (q.amax is None or q.amax.is_cpu)))
        and (x.is_contiguous() or x.permute(memory_order(x)).is_contiguous())
        and _load(x.dtype) is not None
    )


def round_trip(x: Tensor, q: QParams, *, trains: bool = False) -> Tensor:
    """``x`` to the grid and back."""
    return _rounded(x, q, trains)[0]


def round_and_mask(x: Tensor, q: QParams) -> tuple[Tensor, ClipMask]:
    """The same, and what was clipped."""
    result, is_clipped = _rounded(x, q, trains=True)
    return result, _mask(x, q) if is_clipped else NOTHING


def _rounded(x: Tensor, q: QParams, trains: bool) -> tuple[Tensor, bool]:
    """The result, and whether anything lies outside the range.

    In as few calls and with as little memory touched as can be: after a matrix product nothing of the
    interpreter is left in a core's caches, and each step takes ten times as long.
    """
    out = buffers.like(x, trains=trains)
    layout, scales, ranges, step, lower_end = _laid_out(x, q)
    grid = _grid(q.format, q.zero_point)
    assert grid is not None
    kernel, at_x, at_out, size = _kernels(x)["round_trip"], x.data_ptr(), out.data_ptr(), x.element_size()
    numbers = (
        scales.data_ptr(), ranges.data_ptr(), step, q.scale is None, *layout, lower_end, *grid
    )  # fmt: skip

    def part(start: int, n: int) -> Any:
        return kernel(at_x + start * size, at_out + start * size, start, n, *numbers)

    return out, any(for_parts(x.numel(), part))


def _laid_out(x: Tensor, q: QParams) -> tuple[ScaleLayout, Tensor, Tensor, int, float]:
    """How scales lie over a tensor, they and the ranges, how far these are apart, and where one begins."""
    amax, scale = q.amax, q.scale
    if scale is None:  # the kernel divides the ranges
        assert amax is not None
        layout, ranges = _ordered(x, amax, q)
        return layout, ranges, ranges, 1, q.lower_end()
    if amax is not None and amax.numel() > 1:
        shape = [max(sizes) for sizes in zip(amax.shape, scale.shape, strict=True)]
        amax, scale = amax.expand(shape), scale.expand(shape)
    layout, scales = _ordered(x, scale, q)
    _, ranges, step, lower_end = _ranges(x, q._replace(amax=amax))
    if layout.width > 1 and not step:  # one for each of the scales
        ranges, step = ranges.reshape(1).expand(layout.scales).contiguous(), 1
    return layout, scales, ranges, step, lower_end


def _mask(x: Tensor, q: QParams) -> ClipMask:
    """Which elements lie inside the range, as bits, in the order of memory."""
    words = torch.empty(-(-x.numel() // 32), dtype=torch.int32, device="cpu")
    layout, ranges, _, lower_end = _ranges(x, q)
    kernel, at_x, at_words, size = _kernels(x)["mark"], x.data_ptr(), words.data_ptr(), x.element_size()

    def part(start: int, n: int) -> None:
        kernel(at_x + start * size, at_words + start // 8, start, n, ranges.data_ptr(), *layout, lower_end)

    for_parts(x.numel(), part)
    return ClipMask("bits", words, None if x.is_contiguous() else memory_order(x))


def zero_clipped(grad: Tensor, mask: ClipMask, q: QParams) -> Tensor:
    """``grad`` with 0 for what was clipped."""
    if mask.tensor is None:
        return grad
    grad = mask.ordered(grad).contiguous()
    out = torch.empty_like(grad)
    kernel, size = _kernels(grad)["keep"], grad.element_size()
    at_grad, at_out, at_bits = grad.data_ptr(), out.data_ptr(), mask.tensor.data_ptr()

    def part(start: int, n: int) -> None:
        kernel(at_grad + start * size, at_out + start * size, at_bits + start // 8, n)

    for_parts(grad.numel(), part)
    return mask.restored(out)


def lsq_gradients(grad: Tensor, x: Tensor, q: QParams, batch_axis: int | None) -> tuple[Tensor, Tensor]:
    """LSQ's gradients, of which that to the range is summed in float64."""
    kernels = _load(x.dtype, "lsq")
    if kernels is None:
        return eager.lsq_gradients(grad, x, q, batch_axis)
    kernel, grid, scale = kernels["lsq"], _grid(q.format, q.zero_point), q.scales()
    assert q.amax is not None
    assert grid is not None
    order = ordered_scales(x, scale.shape if scale.numel() > 1 else (), q.dim, q.format.block_size or 0)
    layout, scales, out = order.layout, order.spread(scale), torch.empty_like(x)
    grad = (grad if order.order is None else grad.permute(order.order)).contiguous()
    at_x, at_grad, at_out, size = x.data_ptr(), grad.data_ptr(), out.data_ptr(), x.element_size()

    def add(start: int, n: int, first: int, sums: Tensor) -> None:
        at = start * size
        kernel(
            at_x + at, at_grad + at, at_out + at, start, n, sums.data_ptr(), first, sums.numel(),
            scales.data_ptr(), *layout, *grid,
        )  # fmt: skip

    def part(start: int, n: int) -> tuple[int, Tensor]:
        first, touched = layout.touched(start, n)
        sums = torch.zeros(touched, dtype=torch.float64, device="cpu")
        add(start, n, first, sums)
        return first, sums

    total = torch.zeros(layout.scales, dtype=torch.float64, device="cpu")
    # Sums of parts are added in their order, so parts must not depend on the number of threads. Those of
    # few rows have nearly as many sums as elements.
    step = max(_PART, 16 * layout.width, x.numel() // _MOST_PARTS)
    if x.numel() <= step:
        add(0, x.numel(), 0, total)
    else:
        for first, sums in in_steps(x.numel(), step, part):
            total[first : first + sums.numel()] += sums
    to_scale = order.gather(total, torch.sum).reshape(scale.shape)
    return out, to_scale.div_(divided_by(x, q, batch_axis)).float()


def amax(x: Tensor, shape: Sequence[int], dim: int | None = None, block_size: int = 0) -> Tensor:
    """The largest magnitudes."""
    order = ordered_scales(x, shape, dim, block_size)
    kernel, at_x, size, layout = _kernels(x)["amax"], x.data_ptr(), x.element_size(), order.layout

    def part(start: int, n: int) -> Tensor:
        peaks = torch.zeros(layout.scales, dtype=torch.int32, device="cpu")
        kernel(at_x + start * size, start, n, peaks.data_ptr(), *layout)
        return peaks

    found = functools.reduce(torch.maximum, for_parts(x.numel(), part)).view(torch.float32)
    return order.gather(found, torch.amax).reshape(tuple(shape))


def count(x: Tensor, factors: Tensor, counts: Tensor) -> bool:
    """Adds to the histograms of rows; returns whether it did.

    Args:
        x: ``(rows, values)``; the bin of a value is the integer part of its magnitude times the factor.
        factors: ``(rows,)``, float32.
        counts: ``(rows, bins)``, int64, contiguous.
    """
    if not x.is_cpu or not serves(x):
        return False
    kernels, x, factors = _kernels(x), x.contiguous(), factors.contiguous()
    (rows, length), bins = x.shape, counts.shape[1]
    at_x, size, at_factors = x.data_ptr(), x.element_size(), factors.data_ptr()
    if rows > 1:
        kernels["count"](at_x, rows, length, at_factors, counts.data_ptr(), bins)
        return True

    def part(start: int, n: int) -> Tensor:
        own = torch.zeros(bins, dtype=torch.int64, device="cpu")
        kernels["count"](at_x + start * size, 1, n, at_factors, own.data_ptr(), bins)
        return own

    counts[0].add_(sum(for_parts(length, part)))
    return True


# --- Arguments of kernels ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _grid(format: NumberFormat, zero_point: int | None) -> Grid | None:
    """Ends of the grid, bits of the mantissa (-1: integers), and the bits of the smallest normal number."""
    element = format.element
    if type(element) is Integer:
        q = QParams(format, None, zero_point=zero_point)
        return q.min(), q.max(), -1, 0
    if type(element) is Float:
        return element.min, element.max, element.mantissa_bits, element.min_exponent + 127 << 23
    return None


def _ordered(x: Tensor, t: Tensor, q: QParams) -> tuple[ScaleLayout, Tensor]:
    """How scales or ranges lie over a tensor, and they themselves in that order."""
    if t.numel() == 1:
        return flat(x.numel()), t
    order = ordered_scales(x, t.shape, q.dim, q.format.block_size or 0)
    return order.layout, order.spread(t)


def _ranges(x: Tensor, q: QParams) -> tuple[ScaleLayout, Tensor, int, float]:
    """How ranges lie over a tensor, they, how far they are apart (0: one for all), and where one begins."""
    lower_end = float32(q.lower_end())
    if q.amax is None:  # nothing lies outside but, of unsigned integers, what is negative
        return flat(x.numel()), _INFINITE, 0, 0.0 if lower_end == 0.0 else -1.0
    return *_ordered(x, q.amax, q), int(q.amax.numel() > 1), lower_end


_INFINITE = torch.full((1,), math.inf, device="cpu")
