"""``folded_weights``: weights that hold their quantized values, so that evaluation quantizes no weight."""

from __future__ import annotations

from types import TracebackType

import attrs
import torch
from torch import Tensor, nn

from quantpatch.errors import ExportError, warn_caller
from quantpatch.layers.base import quantized_weights
from quantpatch.layers.quantizer import TensorQuantizer
from quantpatch.torch_tools.forward import demand_model


@attrs.define
class FoldedWeights:
    """What ``folded_weights`` did; ``undo()``, or the end of a ``with`` block, takes it back.

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
            ExportError: Weights changed since they were folded. These keep their new values, which are
                quantized from here on as any are; all others have their old ones back.
        """
        changed: list[str] = []
        for name, (parameter, original, folded) in zip(self.folded, self._undo, strict=True):
            if parameter.shape == folded.shape and torch.equal(parameter.detach(), folded.to(parameter)):
                parameter.data = original.to(parameter)
            else:
                changed.append(name)
        for quantizer in self._disabled:
            quantizer.enable()
        self._undo, self._disabled, self.folded = [], [], ()
        if changed:
            raise ExportError(
                f"these weights changed since they were folded: {', '.join(changed)}. They keep their new "
                f"values, which were used unquantized until now; the others have their old ones back. End "
                f"folded_weights before training, pruning or loading weights",
                quantizers=tuple(changed),
            )

    def __enter__(self) -> FoldedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.undo()
        except ExportError as changed:
            if error is None:
                raise
            warn_caller(str(changed))  # what ended the block matters more


def folded_weights(model: nn.Module) -> FoldedWeights:
    """Puts quantized values into the weights and disables their quantizers, for evaluation.

    The model computes the same, bit for bit, without quantizing its weights in every forward pass. You
    promise that the weights stay as they are meanwhile: a weight that is trained, pruned or loaded inside
    is used as it is, unquantized, and named by an error at the end. The memory of the original weights is
    kept for ``undo``, and as much again to see such changes. Code of the model's own that reads a weight
    beside its layer, as ``F.linear(x, self.embedding.weight)`` does, finds the quantized values::

        with qp.folded_weights(model):
            evaluate(model)

    Args:
        model: A quantized model.

    Returns:
        What was folded, and how to undo it.

    Raises:
        ExportError: The model is in training mode, where folding would change what is trained.
    """
    demand_model(model, "folded_weights")
    if model.training:
        raise ExportError("folded_weights is for evaluation, and the model is training: write model.eval()")
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((module, key))
    skipped: dict[str, str] = {}
    plans: dict[int, tuple[str, nn.Parameter, Tensor, list[TensorQuantizer]]] = {}
    torn: set[int] = set()  # weights that several layers quantize in several ways
    for quantizer_name, layer, operand, quantizer in quantized_weights(model):
        if quantizer.disabled or not quantizer.quantizing:
            continue
        name, weight = quantizer_name.removesuffix("_quantizer"), getattr(layer, operand)
        if id(weight) not in users or not isinstance(weight, nn.Parameter):
            skipped[name] = "it is computed again in every forward, by a parametrization"
        elif quantizer.calibrating:
            skipped[name] = "its quantizer is being calibrated"
        elif getattr(layer, "max_norm", None) is not None:
            skipped[name] = "its layer renormalizes it in place at every forward (max_norm)"
        else:
            with torch.no_grad():
                quantized = quantizer(weight.detach())
            known = plans.setdefault(id(weight), (name, weight, quantized, []))
            if known[2] is quantized or torch.equal(known[2], quantized):
                known[3].append(quantizer)
            else:
                skipped[name] = f"it is tied to {known[0]}, which is quantized otherwise"
                torn.add(id(weight))
    done = FoldedWeights((), skipped, [], [])
    try:
        for identity, (name, weight, quantized, quantizers) in plans.items():
            if len(users[identity]) > len(quantizers) or identity in torn:
                skipped[name] = "it is tied to a weight that is not quantized like it"
                continue
            original = weight.data
            weight.data = quantized.clone()
            done._undo.append((weight, original, quantized))
            done.folded = (*done.folded, name)
            for quantizer in quantizers:
                quantizer.disable()
                done._disabled.append(quantizer)
    except BaseException:  # such as no memory left
        done.undo()
        raise
    return done
