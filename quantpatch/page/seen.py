"""What the quantizers of a model see in a run: histograms, their ranges, and what these cut off."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from quantpatch.layers.base import quantized_weights, weight_quantizers
from quantpatch.layers.before_tuning import held
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.numerics.grouped_axes import GroupedAxes
from quantpatch.torch_tools.forward import evaluating

_BINS = 48


@attrs.frozen
class Seen:
    """What a quantizer saw, in its first call.

    Attributes:
        quantizer: Its name.
        of_weight: Whether it is for a weight.
        edges: Of the histogram's bars.
        counts: How many values lie in each.
        low: The lower end of its range, the lowest of several; None where each tensor has its own.
        high: The upper end, the highest of several.
        clipped: The share of the values outside of the range; None where that is not known.
        zero_point: The zero point, or None.
        before: Of a weight that was tuned: how many of its values lay in each bar before; else empty.
    """

    quantizer: str
    of_weight: bool
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    low: float | None
    high: float | None
    clipped: float | None
    zero_point: int | None
    before: tuple[int, ...] = ()


@contextlib.contextmanager
def seeing(model: nn.Module) -> Iterator[dict[str, Seen]]:
    """A block that notes what each quantizer of a model sees first, by its name."""
    found: dict[str, Seen] = {}
    of_weights = weight_quantizers(model)
    tuned = {
        quantizer: held(layer)[operand][0]
        for _, layer, operand, quantizer in quantized_weights(model)
        if operand in held(layer)
    }

    def look(name: str, quantizer: TensorQuantizer, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        if name not in found and isinstance(x, Tensor) and x.is_floating_point() and x.numel():
            found[name] = _seen(
                name, quantizer, x.detach().float(), quantizer in of_weights, tuned.get(quantizer)
            )

    with contextlib.ExitStack() as stack:
        for name, quantizer in named_quantizers(model).items():
            if not quantizer.disabled:
                handle = quantizer.register_forward_pre_hook(functools.partial(look, name))
                stack.callback(handle.remove)
        yield found


def seen_in(model: nn.Module, run: Callable[[], Any]) -> dict[str, Seen]:
    """Runs a model, in eval mode and without gradients, and gives what each quantizer saw, by its name."""
    with seeing(model) as found, evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        run()
    return found


def _seen(name: str, quantizer: TensorQuantizer, x: Tensor, of_weight: bool, earlier: Tensor | None) -> Seen:
    finite = x[x.isfinite()].cpu()
    was = torch.empty(0) if earlier is None else earlier.detach().float().cpu().flatten()
    both = torch.cat([finite, was])
    low, high = (float(both.min()), float(both.max())) if both.numel() else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, before = (_counted(values, low, high) for values in (finite, was))
    edges = torch.linspace(low, high, _BINS + 1).tolist()
    lowest = highest = clipped = None
    amax = quantizer.own_range
    if amax is not None and quantizer.format.block_size is None:
        amax = amax.detach().to(x.device)
        lower = -amax * _below(quantizer)
        lowest, highest = float(lower.min()), float(amax.max())
        if not isinstance(quantizer.descriptor.kept_axes, GroupedAxes):
            clipped = float(((x > amax) | (x < lower)).float().mean())
    before = before if was.numel() else ()
    return Seen(name, of_weight, tuple(edges), counts, lowest, highest, clipped, quantizer.zero_point, before)


def _counted(values: Tensor, low: float, high: float) -> tuple[int, ...]:
    return tuple(int(count) for count in torch.histc(values, _BINS, low, high))


def _below(quantizer: TensorQuantizer) -> float:
    """How far a range goes below 0, by how far it goes above."""
    if zero_point := quantizer.zero_point:
        return zero_point / (quantizer.format.max - zero_point)
    return -quantizer.format.lower_end
