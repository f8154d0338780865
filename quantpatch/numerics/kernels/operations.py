"""What the kernels do, as functions on tensors that return None where they do not serve.

They serve tensors of float32 and bfloat16 in main memory, without gaps and not too small, and the integers
and floats of ``formats.py`` themselves: of a subclass nobody knows how it rounds. The environment
variable ``QUANTPATCH_KERNELS=0`` turns them off.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from quantpatch.numerics.affine import bottom
from quantpatch.numerics.division import float32
from quantpatch.numerics.formats import Float, Integer, NumberFormat, element_of
from quantpatch.numerics.kernels import buffers
from quantpatch.numerics.kernels.scale_layout import Runs, flat, layout_of, memory_order
from quantpatch.numerics.kernels.threads import for_parts, in_steps, is_shared_out

__all__ = ["Rounded", "amax", "count", "keep", "lsq", "mark", "round_to_range", "round_trip"]

Range: TypeAlias = Tensor | float
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
    """The kernels by name; None without numba, or if they do not work here, which is told once.

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
            f"quantpatch's CPU kernels do not work here, so slower operations stand in for them: {error!r}",
            RuntimeWarning,
            stacklevel=4,
        )
        return None


def _kernels(x: Tensor) -> Kernels | None:
    """The kernels, if there are any and they serve ``x``."""
    if (
        not _WANTED
        or x.numel() < _SMALLEST
        or x.dtype not in _NAMES
        or not (x.is_contiguous() or x.permute(memory_order(x)).is_contiguous())
    ):
        return None
    return _load(x.dtype)


def _loaded(x: Tensor) -> Kernels:
    """Those that served before."""
    kernels = _load(x.dtype)
    assert kernels is not None
    return kernels


class Rounded(NamedTuple):
    """What :func:`round_trip` returns.

    Attributes:
        values: The result.
        is_hit: Whether anything lies outside the range.
    """

    values: Tensor
    is_hit: bool


def round_trip(
    x: Tensor,
    amax: Range | None,
    scale: Range,
    format: NumberFormat,
    dim: int | None,
    *,
    trains: bool = False,
) -> Rounded | None:
    """As :func:`quantpatch.numerics.backends.round_trip.round_trip`, without its gradient.

    ``trains`` says that there will be one.
    """
    element = element_of(format)
    grid = _grid(element)
    if grid is None or (kernels := _kernels(x)) is None:
        return None
    number, end = _number(scale), _number(amax)
    if number is not None and isinstance(amax, Tensor) and end is None:
        return None
    out = buffers.like(x, trains=trains)
    at_x, at_out, size = x.data_ptr(), out.data_ptr(), x.element_size()
    if number is not None:
        high = math.inf if end is None else end
        low = bottom(end, element.lower_end)

        def whole(start: int, n: int) -> Any:
            return kernels["round_flat"](
                at_x + start * size, at_out + start * size, n, number, low, high, *grid
            )

        return Rounded(out, any(for_parts(x.numel(), whole)))
    assert isinstance(scale, Tensor)
    if isinstance(amax, Tensor) and end is None:
        shape = [max(sizes) for sizes in zip(amax.shape, scale.shape, strict=True)]
        amax, scale = amax.expand(shape), scale.expand(shape)
    runs, scales = _lay(x, scale, format, dim)
    _, ranges, step, lower_end = _ranges(x, amax, format, dim)
    if runs.width > 1:  # one for each of the scales
        ranges, step = ranges.expand(runs.scales).contiguous(), 1

    def several(start: int, n: int) -> Any:
        return kernels["round_runs"](
            at_x + start * size, at_out + start * size, start, n, scales.data_ptr(), ranges.data_ptr(), step,
            False, *runs, lower_end, *grid,
        )  # fmt: skip

    return Rounded(out, any(for_parts(x.numel(), several)))


def round_to_range(x: Tensor, amax: Tensor, format: NumberFormat, *, trains: bool = False) -> Rounded | None:
    """:func:`round_trip` by ranges that were found before, whose scales follow from them.

    What quantizers mostly do, in as few calls and with as little memory touched as can be: after a matrix
    product nothing of the interpreter is left in a core's caches, and each step takes ten times as long.

    Args:
        x: As in :func:`round_trip`.
        amax: float32, in main memory: 0-dim, or of ``x``'s dimensions with 1 where an axis shares a range.
        format: Not in blocks.
        trains: As in :func:`round_trip`.
    """
    grid = _grid(format)
    if grid is None or (kernels := _kernels(x)) is None:
        return None
    size, runs, ranges = x.numel(), flat(x.numel()), amax
    if amax.dim():
        layout = layout_of(x, amax.shape, None, 0)
        runs = layout.runs
        if layout.order or runs.scales != amax.numel() or not amax.is_contiguous():
            ranges = layout.spread(amax)
    out = buffers.like(x, trains=trains)
    kernel, at_x, at_out, step = kernels["round_runs"], x.data_ptr(), out.data_ptr(), x.element_size()
    numbers = ranges.data_ptr(), ranges.data_ptr(), 1, True, *runs, format.lower_end, *grid

    def part(start: int, n: int) -> Any:
        return kernel(at_x + start * step, at_out + start * step, start, n, *numbers)

    return Rounded(out, any(for_parts(size, part)) if is_shared_out(size) else part(0, size))


def mark(x: Tensor, amax: Range | None, format: NumberFormat, dim: int | None) -> Tensor:
    """Which elements lie inside the range, as bits, where :func:`round_trip` served.

    Returns:
        int32, ``(elements / 32,)`` rounded up: the elements as they lie in memory, from the lowest bit on.
    """
    words = torch.empty(-(-x.numel() // 32), dtype=torch.int32, device="cpu")
    runs, ranges, _, lower_end = _ranges(x, amax, format, dim)
    kernel, at_x, at_words, size = _loaded(x)["mark"], x.data_ptr(), words.data_ptr(), x.element_size()

    def part(start: int, n: int) -> None:
        kernel(at_x + start * size, at_words + start // 8, start, n, ranges.data_ptr(), *runs, lower_end)

    for_parts(x.numel(), part)
    return words


def keep(grad: Tensor, marks: Tensor) -> Tensor:
    """``grad`` where :func:`mark` found elements inside, else 0.

    Args:
        grad: float32 or bfloat16, any strides, its axes in the order in which the marks are.
        marks: The marks.
    """
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    kernel, size = _loaded(grad)["keep"], grad.element_size()
    at_grad, at_out, at_marks = grad.data_ptr(), out.data_ptr(), marks.data_ptr()

    def part(start: int, n: int) -> None:
        kernel(at_grad + start * size, at_out + start * size, at_marks + start // 8, n)

    for_parts(grad.numel(), part)
    return out


def lsq(
    grad: Tensor, x: Tensor, scale: Tensor, format: NumberFormat, dim: int | None
) -> tuple[Tensor, Tensor] | None:
    """LSQ's gradients to ``x`` and to its scales, see :mod:`quantpatch.numerics.backends.lsq`.

    Returns:
        That to ``x``, which lies as ``x`` does; and that to the scales, in float64 and of their shape.
    """
    grid = _grid(element_of(format))
    if grid is None or grad.dtype != x.dtype or _kernels(x) is None:
        return None
    if (kernels := _load(x.dtype, "lsq")) is None:
        return None
    kernel = kernels["lsq"]
    layout = layout_of(x, scale.shape if scale.numel() > 1 else (), dim, format.block_size or 0)
    runs, scales, out = layout.runs, layout.spread(scale), torch.empty_like(x)
    grad = (grad if layout.order is None else grad.permute(layout.order)).contiguous()
    at_x, at_grad, at_out, size = x.data_ptr(), grad.data_ptr(), out.data_ptr(), x.element_size()

    def add(start: int, n: int, first: int, sums: Tensor) -> None:
        at = start * size
        kernel(
            at_x + at, at_grad + at, at_out + at, start, n, sums.data_ptr(), first, sums.numel(),
            scales.data_ptr(), *runs, *grid,
        )  # fmt: skip

    def part(start: int, n: int) -> tuple[int, Tensor]:
        first, touched = runs.touched(start, n)
        sums = torch.zeros(touched, dtype=torch.float64, device="cpu")
        add(start, n, first, sums)
        return first, sums

    total = torch.zeros(runs.scales, dtype=torch.float64, device="cpu")
    # Sums of parts are added in their order, so parts must not depend on the number of threads. Those of
    # few rows have nearly as many sums as elements.
    step = max(_PART, 16 * runs.width, x.numel() // _MOST_PARTS)
    if x.numel() <= step:
        add(0, x.numel(), 0, total)
    else:
        for first, sums in in_steps(x.numel(), step, part):
            total[first : first + sums.numel()] += sums
    return out, layout.gather(total, torch.sum).reshape(scale.shape)


def amax(x: Tensor, kept: Sequence[int], dim: int | None = None, block_size: int = 0) -> Tensor | None:
    """The largest magnitudes; NaN where there is one.

    Args:
        x: Any shape.
        kept: The shape of the result: 1 on axes that are reduced, the number of blocks on ``dim``; or empty.
        dim: The axis that blocks run along.
        block_size: Elements in a block.

    Returns:
        float32, of the shape ``kept``.
    """
    if (kernels := _kernels(x)) is None:
        return None
    layout = layout_of(x, kept, dim, block_size)
    at_x, size = x.data_ptr(), x.element_size()

    def part(start: int, n: int) -> Tensor:
        peaks = torch.zeros(layout.runs.scales, dtype=torch.int32, device="cpu")
        kernels["amax"](at_x + start * size, start, n, peaks.data_ptr(), *layout.runs)
        return peaks

    found = functools.reduce(torch.maximum, for_parts(x.numel(), part)).view(torch.float32)
    return layout.gather(found, torch.amax).reshape(tuple(kept))


def count(x: Tensor, factors: Tensor, counts: Tensor) -> bool:
    """Adds to the histograms of rows; returns whether it did.

    Args:
        x: ``(rows, values)``; the bin of a value is the integer part of its magnitude times the factor.
        factors: ``(rows,)``, float32.
        counts: ``(rows, bins)``, int64, contiguous.
    """
    if not x.is_cpu or (kernels := _kernels(x)) is None:
        return False
    x, factors = x.contiguous(), factors.contiguous()
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
def _grid(element: NumberFormat) -> Grid | None:
    """Ends of the grid, bits of the mantissa (-1: integers), and the bits of the smallest normal number."""
    if type(element) is Integer:
        return element.min, element.max, -1, 0
    if type(element) is Float:
        return element.min, element.max, element.mantissa_bits, element.min_exponent + 127 << 23
    return None


def _number(t: Range | None) -> float | None:
    """The number of one element; None for more, and for None."""
    if isinstance(t, Tensor):
        return t.item() if t.numel() == 1 else None
    return t


def _lay(x: Tensor, t: Tensor, format: NumberFormat, dim: int | None) -> tuple[Runs, Tensor]:
    """How scales or ranges lie over a tensor, and they themselves in that order."""
    layout = layout_of(x, t.shape if t.numel() > 1 else (), dim, format.block_size or 0)
    return layout.runs, layout.spread(t)


def _ranges(
    x: Tensor, amax: Range | None, format: NumberFormat, dim: int | None
) -> tuple[Runs, Tensor, int, float]:
    """How ranges lie over a tensor, they, how far they are apart (0: one for all), and where one begins."""
    below = float32(format.lower_end)
    if isinstance(amax, Tensor) and amax.numel() > 1:
        return *_lay(x, amax, format, dim), 1, below
    end = _number(amax)
    if end is None:  # nothing lies outside but, of unsigned integers, what is negative
        end, below = math.inf, 0.0 if below == 0.0 else -1.0
    return flat(x.numel()), _of_one(end), 0, below


@functools.lru_cache(maxsize=256)
def _of_one(number: float) -> Tensor:
    return torch.tensor([number], dtype=torch.float32, device="cpu")
