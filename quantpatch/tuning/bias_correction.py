"""Bias correction: what quantization adds to the mean of each channel is taken from the bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv
1906.04721), section 4.2, with means of data (appendix D): the biases of one layer after the other become such
that the mean of each of its outputs is what it is in float, with all layers before it quantized and
corrected.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from quantpatch.layers.base import named_layers
from quantpatch.tuning.reasons import NoBias, NoData, NotQuantized
from quantpatch.tuning.report import Tuned
from quantpatch.tuning.tuner import Tuner
from quantpatch.tuning.tuning import Tuning


@attrs.frozen
class BiasCorrection(Tuner):
    """Biases that make the mean of each output what it is in float.

    Layers that have a bias and are called. The model runs once in float, and then waits at each layer.
    """

    def tune(self, tuning: Tuning) -> None:
        """See there."""
        tuning.calibrate()
        layers: dict[str, Any] = {}
        for name, layer in named_layers(tuning.model).items():
            if not any(q.is_active for q in type(layer).quantizers(layer).values()):
                tuning.skipped[name] = NotQuantized()
            elif not _has_bias(layer):
                tuning.skipped[name] = NoBias()
            else:
                layers[name] = layer
        means = _Means(layers)
        with means:
            calls = tuning.run_in_float("runs in float")
        tuning.skipped |= {name: NoData() for name in layers if name not in means.of}
        once = [layers[name] for name, count in means.calls.items() if count == calls]
        with contextlib.ExitStack() as stack:
            runs = stack.enter_context(tuning.paused_runs(once)) if tuning.has_batches else None
            bar = stack.enter_context(tuning.bar(len(means.of)))
            for name in means.of:
                bar.step(name)
                waiting = [] if runs is None else runs.waiting_at(layers[name])
                with _Means({name: layers[name]}) as now:
                    for run in waiting:
                        run.look(lambda call: call())
                    if not waiting:
                        tuning.run(name)
                self._correct(tuning, name, layers[name], means.of[name], now.of[name])
                if runs is not None:
                    runs.pass_(layers[name])
                bar.advance()

    def _correct(self, tuning: Tuning, name: str, layer: Any, wanted: Mean, found: Mean) -> None:
        error = (found.mean - wanted.mean).to(layer.bias)
        tuning.write(layer, "bias", layer.bias.detach() - error)
        size = float(wanted.mean.norm()) or 1.0
        tuning.tuned[name] = Tuned(float(error.norm()) / size, 0.0)


def _has_bias(layer: Any) -> bool:
    """Whether a layer adds a bias, a parameter, to its outputs, one for each."""
    bias = layer._parameters.get("bias")
    weight = layer._parameters.get("weight")
    return bias is not None and weight is not None and bias.dim() == 1


class Mean:
    """The mean of each channel of what a layer gives."""

    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._count = 0

    def add(self, x: Tensor, axis: int) -> None:
        """Takes in an output."""
        channels = x.detach().transpose(axis, -1)
        self._sum = self._sum + channels.flatten(0, -2).sum(0, dtype=torch.float64)
        self._count += channels.numel() // max(1, channels.shape[-1])

    @property
    def mean(self) -> Tensor:
        """It."""
        found: Tensor = self._sum / max(1, self._count)
        return found


class _Means:
    """A block in which the means of what layers give are found.

    Attributes:
        of: Them, by the name of the layer, in the order in which these ran first.
        calls: How often each ran.
    """

    def __init__(self, layers: dict[str, Any]) -> None:
        self.of: dict[str, Mean] = {}
        self.calls: Counter[str] = Counter()
        self._layers = layers
        self._handles: list[Any] = []

    def __enter__(self) -> _Means:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name, layer)))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, layer: Any) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            if isinstance(found, Tensor):
                self.of.setdefault(name, Mean()).add(found, layer.feature_axis)
                self.calls[name] += 1

        return hook
