"""Layers that are called several times in one forward pass, on tensors of other ranges than each other.

A layer has one range for an input. A detection head that three levels of a pyramid share, whose values differ
by a factor of a hundred, is quantized by that of the largest, and the smallest has a step or two left.
Nothing fails, so this is looked for while a model runs anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from quantpatch.errors import listed, warn_caller
from quantpatch.layers.base import named_layers, weight_quantizers
from quantpatch.layers.quantizer import TensorQuantizer, named_quantizers
from quantpatch.layers.recurrent import QuantizedRecurrent
from quantpatch.numerics.ranges import reduce_amax, what_is_odd_about
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.forward import unwrapped

# Forward passes that are looked at: what calls differ by is soon seen, and each look is a pass over memory.
_PASSES = 4
# Three bits: of eight that leaves five.
_APART = 8.0


class CallRanges:
    """A block that notes the range of each call of each quantizer of an activation in a forward pass.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._runner = unwrapped(model)
        self._running = False
        self._passes = 0
        self._calls: dict[TensorQuantizer, int] = {}
        self._begun: set[TensorQuantizer] = set()  # those that a call of a layer around them has begun for
        self._seen: dict[TensorQuantizer, list[Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> CallRanges:
        watched = list(self._watched())
        if not watched:  # a hook on a float model would keep torch from its fast paths
            return self

        # Functions and no methods: a copy of the model made inside shall copy no more than them.
        def begins(*_: Any) -> None:
            self._begins()

        def ends(*_: Any) -> None:
            self._running = False

        def enters(layer: nn.Module, _: Any) -> None:
            if self._running:
                self._begun.update(m for m in layer.modules() if isinstance(m, TensorQuantizer))

        def sees(quantizer: Any, args: Any) -> None:
            self._sees(quantizer, args)

        self._handles = [
            self._runner.register_forward_pre_hook(begins),
            self._runner.register_forward_hook(ends, always_call=True),
            *(layer.register_forward_pre_hook(enters) for layer in named_layers(self._model).values()),
            *(quantizer.register_forward_pre_hook(sees) for quantizer in watched),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._running, self._passes = [], False, _PASSES

    def _watched(self) -> Iterator[TensorQuantizer]:
        """Those of activations with one range, found beforehand. Steps of a recurrent layer are not calls."""
        of_weights = weight_quantizers(self._model)
        stepping: tuple[type[Any], ...] = (QuantizedRecurrent, nn.RNNCellBase)
        for layer in named_layers(self._model).values():
            if isinstance(layer, stepping):
                continue
            for quantizer in type(layer).quantizers(layer).values():
                one = quantizer.descriptor.kept_axes is None and quantizer.format.block_size is None
                if one and quantizer not in of_weights and not quantizer.descriptor.dynamic:
                    yield quantizer

    def _begins(self) -> None:
        if torch.compiler.is_compiling():
            return
        self._running = self._passes < _PASSES
        self._passes += 1
        self._calls.clear()
        self._begun.clear()

    def _sees(self, quantizer: TensorQuantizer, args: Any) -> None:
        x = args[0] if args else None
        if not self._running or quantizer.disabled or not isinstance(x, Tensor) or not x.numel():
            return
        if not x.is_floating_point() or x.is_meta or what_is_odd_about(x) is not None:
            return  # nothing to measure, or what the quantizer refuses, and names
        # A recorder of the model's operators is to see its own only.
        with _disable_current_modes(), torch.no_grad():
            range_ = reduce_amax(x.detach())
        # Several tensors in one call of the layer are steps of its own, as of a scan; no copy parts them.
        number = self._calls.get(quantizer, -1) + (quantizer in self._begun)
        self._begun.discard(quantizer)
        number = max(0, number)
        self._calls[quantizer] = number
        seen = self._seen.setdefault(quantizer, [])
        if number < len(seen):
            seen[number] = torch.maximum(seen[number], range_.to(seen[number].device))
        else:
            seen.append(range_)

    def differing(self) -> dict[str, list[float]]:
        """The ranges of the calls, by quantizer, of those in which they are far apart."""
        found = {}
        for name, quantizer in named_quantizers(self._runner).items():
            ranges = [float(range_) for range_ in self._seen.get(quantizer, ())]
            some = [range_ for range_ in ranges if range_ > 0]
            if len(ranges) > 1 and some and max(some) >= _APART * min(some):
                found[name] = ranges
        return found

    def warn(self) -> None:
        """Warns of those.

        Warns:
            QuantPatchWarning: It names the layers, their calls and ranges.
        """
        found = self.differing()
        if not found:
            return
        shown = (
            f"{name} takes {len(ranges)} tensors, of ranges {listed(f'{range_:.3g}' for range_ in ranges)}"
            for name, ranges in found.items()
        )
        warn_caller(
            f"these quantizers are called several times in one forward pass, on tensors of very different "
            f"ranges, and have one range for all: {listed(shown, separator='; ')}. The "
            f"smaller tensors lose precision. Give each call a layer of its own, as copy.deepcopy(layer) "
            f"makes one (its weight may be shared: copied.weight = layer.weight), or leave the layer float: "
            f"qp.configure(model, {{{next(iter(found)).rpartition('.')[0]!r}: None}})"
        )
