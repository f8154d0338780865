"""Layers that do not run, since a forward reads their weight itself: ``F.linear(x, self.qkv.weight, bias)``.

Nothing of such a layer computes, so its quantizers see no data, whatever the batches. That differs from a
layer that the batches do not reach, and a run of the model in which every operator is seen distinguishes the
two. It is made only where quantizers saw no data, with the arguments of the first call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantpatch.dataflow import recording
from quantpatch.errors import listed, warn_caller
from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.quantizer import in_float, named_quantizers
from quantpatch.torch_tools.forward import evaluating, unwrapped


class FirstCall:
    """A block that keeps the arguments with which a model is called first, to call it once more.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._runner = unwrapped(model)
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._switched_off: list[str] = []
        self._float: dict[str, str] = {}  # layers whose products stay float, by name, with the reader's

    def __enter__(self) -> FirstCall:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._call is None and not torch.compiler.is_compiling():
                self._call = args, kwargs

        self._hook: Any = self._runner.register_forward_pre_hook(keep, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._call = None

    def weights_read(self, quantizers: Sequence[str]) -> Sequence[str]:
        """Those quantizers whose layer has a weight that another module's forward reads.

        Args:
            quantizers: Names of quantizers that saw no data.
        """
        modules = dict(self._model.named_modules())
        owners = {name: modules.get(name.rpartition(".")[0]) for name in quantizers}
        layers = {layer: None for layer in owners.values() if isinstance(layer, QuantizedLayer)}
        readers, quantized = self._seen(list(layers))
        names = {module: name for name, module in modules.items()}
        for name, layer in owners.items():
            if layer in readers:
                self._switched_off.append(name)
                if layer not in quantized:
                    self._float[name.rpartition(".")[0]] = names.get(readers[layer], "")
        return self._switched_off

    def switch_off(self) -> None:
        """Switches off the quantizers that were found so."""
        quantizers = named_quantizers(self._model) if self._switched_off else {}
        for name in self._switched_off:
            quantizers[name].disable()

    def warn(self) -> None:
        """Warns if a product of such a layer stays float.

        Warns:
            QuantPatchWarning: It names the layers, and the modules that read their weights.
        """
        if not self._float:
            return
        shown = [f"{layer} (in {reader or 'the model'})" for layer, reader in self._float.items()]
        warn_caller(
            f"{len(shown)} layers never run, since a forward reads their weights and computes with them "
            f"itself: {listed(shown)}. These products stay float, and the "
            f"layers' quantizers are switched off. For quantized ones, have the forward call the layer, or "
            f"replace the class of that forward: qp.audit has the code"
        )

    def _seen(self, layers: list[Any]) -> tuple[dict[Any, nn.Module], set[Any]]:
        """What a run shows of the weights of these layers; nothing if the model does not run again.

        Returns:
            By layer the first module that reads a weight of it and does not hold it as its own; and the
            layers whose weights go through a quantizer.
        """
        if self._call is None or not layers:
            return {}, set()
        args, kwargs = self._call
        try:
            with (
                in_float(self._model),
                evaluating(self._model),
                torch.no_grad(),
                recording(self._runner) as recorder,
            ):
                weights = {
                    recorder.of(weight): (weight, layer) for layer in layers for weight in _weights(layer)
                }
                for quantizer in named_quantizers(self._model).values():
                    quantizer.calibrating = False  # what it has seen, it has seen; in_float puts that back
                with torch.random.fork_rng(devices=[]):
                    self._runner(*args, **kwargs)
        except Exception:  # it ran before; if it does not twice, nothing more is known of its layers
            return {}, set()
        readers: dict[Any, nn.Module] = {}
        for value, (weight, layer) in weights.items():
            for operator in value.uses:
                # A module that holds the parameter too, such as an embedding that is tied, is a layer itself.
                if not _holds(operator.stack[-1], weight):
                    readers.setdefault(layer, operator.stack[-1])
        given = {value for values in recorder.flow.quantized.values() for value in values}
        return readers, {layer for value, (_, layer) in weights.items() if value in given}


def _weights(layer: Any) -> Iterator[Tensor]:
    weights = (getattr(layer, name, None) for name in layer.weight_axes())
    return (weight for weight in weights if isinstance(weight, Tensor))


def _holds(module: nn.Module, tensor: Tensor) -> bool:
    return any(parameter is tensor for parameter in module._parameters.values())
