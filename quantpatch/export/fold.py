"""``fold_weights``: weights that hold their quantized values, so that evaluation quantizes no weight."""

from __future__ import annotations

from types import TracebackType

import attrs
import torch
from torch import Tensor, nn

from quantpatch.errors import ExportError
from quantpatch.layers.base import QuantizedLayer
from quantpatch.quantizer import TensorQuantizer

__all__ = ["FoldedWeights", "fold_weights"]


@attrs.define
class FoldedWeights:
    """What ``fold_weights`` did; ``undo()``, or the end of a ``with`` block, takes it back.

    Attributes:
        folded: Names of the weights that hold their quantized values now.
        skipped: Those that do not, by name, and why.
    """

    folded: tuple[str, ...]
    skipped: dict[str, str]
    _undo: list[tuple[nn.Parameter, Tensor, Tensor]] = attrs.field(repr=False)
    _disabled: list[TensorQuantizer] = attrs.field(repr=False)

    def undo(self) -> None:
        """Gives every weight the values that it had, bit for bit; done once, a second call does nothing.

        Raises:
            ExportError: A folded weight was given other memory since, or changed; nothing is undone.
        """
        changed = [
            name
            for name, (parameter, _, folded) in zip(self.folded, self._undo, strict=True)
            if parameter.shape != folded.shape or not torch.equal(parameter.detach().to(folded), folded)
        ]
        if changed and self._undo:
            raise ExportError(
                f"these weights changed since they were folded, so their old values are not put back: "
                f"{', '.join(changed)}. Undo before training or loading weights",
                quantizers=tuple(changed),
            )
        for parameter, original, _ in self._undo:
            parameter.data = original.to(parameter)
        for quantizer in self._disabled:
            quantizer.enable()
        self._undo, self._disabled, self.folded = [], [], ()

    def __enter__(self) -> FoldedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def fold_weights(model: nn.Module) -> FoldedWeights:
    """Puts quantized values into the weights and disables their quantizers, for evaluation.

    The model computes the same, bit for bit. The memory of the original weights is kept for ``undo``::

        with qp.fold_weights(model):
            evaluate(model)

    Args:
        model: A quantized model.

    Returns:
        What was folded, and how to undo it.

    Raises:
        ExportError: The model is in training mode, where folding would change what is trained.
    """
    if model.training:
        raise ExportError("fold_weights is for evaluation, and the model is training: write model.eval()")
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((module, key))
    folded: list[str] = []
    skipped: dict[str, str] = {}
    undo: list[tuple[nn.Parameter, Tensor, Tensor]] = []
    disabled: list[TensorQuantizer] = []
    plans: dict[int, tuple[str, nn.Parameter, Tensor, list[TensorQuantizer]]] = {}
    for layer_name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        for operand in layer.weight_axes():
            quantizer = layer.quantizer(operand)
            if quantizer is None or quantizer.disabled or not quantizer.quantizing:
                continue
            name = f"{layer_name}.{operand}" if layer_name else operand
            weight = getattr(layer, operand)
            if id(weight) not in users or not isinstance(weight, nn.Parameter):
                skipped[name] = "it is computed anew at every forward, by a parametrization"
                continue
            if quantizer.calibrating:
                skipped[name] = "its quantizer is being calibrated"
                continue
            with torch.no_grad():
                quantized = quantizer(weight.detach())
            known = plans.get(id(weight))
            if known is None:
                plans[id(weight)] = (name, weight, quantized, [quantizer])
            elif torch.equal(known[2], quantized):
                known[3].append(quantizer)
            else:
                skipped[name] = f"it is tied to {known[0]}, which is quantized otherwise"
    for identity, (name, weight, quantized, quantizers) in plans.items():
        if len(users[identity]) > len(quantizers) or any(
            "tied" in why and name in why for why in skipped.values()
        ):
            skipped[name] = "it is tied to a weight that is not quantized like it"
            continue
        undo.append((weight, weight.data, quantized))
        weight.data = quantized.clone()
        for quantizer in quantizers:
            quantizer.disable()
        disabled += quantizers
        folded.append(name)
    return FoldedWeights(tuple(folded), skipped, undo, disabled)
