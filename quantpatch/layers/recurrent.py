"""Recurrent layers, on torch's fused kernels.

The weights are quantized once for a whole sequence, not once a time step. The hidden state between the
steps of a fused kernel stays float: it never leaves the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from quantpatch.descriptor import QuantDescriptor, Recipe
from quantpatch.layers.base import QuantizedLayer

__all__ = ["QuantLSTM", "QuantLSTMCell"]


class _QuantizedRecurrent(QuantizedLayer):
    """Quantizers for the input and for each weight matrix: ``weight_ih_l0_quantizer`` and so on."""

    _flat_weights: list[Any]
    _flat_weights_names: list[str]

    def weight_axes(self) -> Mapping[str, int | None]:
        return {name: 0 for name in self._flat_weights_names if name.startswith("weight")}

    def quantize_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sequence = args[0] if args else kwargs["input"]
        if not isinstance(sequence, PackedSequence):
            return super().quantize_inputs(args, kwargs)
        quantizer = self.quantizer("input")
        if quantizer is not None:
            sequence = sequence._replace(data=quantizer(sequence.data))
        return (sequence, *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}

    def quantize_weights(self) -> dict[str, Any]:
        operands = super().quantize_weights()
        if not operands:
            return {}
        flat = [operands.get(name, getattr(self, name, None)) for name in self._flat_weights_names]
        # The kernel takes its weights from this list, which torch keeps in step with the attributes.
        return {**operands, "_flat_weights": flat, "_update_flat_weights": _nothing}


def _nothing() -> None:
    pass


class QuantLSTM(_QuantizedRecurrent, nn.LSTM):
    """``nn.LSTM`` with quantized input and weights."""


class QuantLSTMCell(QuantizedLayer, nn.LSTMCell):
    """``nn.LSTMCell`` with quantized input, hidden state and weights; the cell state stays float."""

    weights = {"weight_ih": 0, "weight_hh": 0}

    def descriptors(self, recipe: Recipe) -> list[tuple[str, QuantDescriptor]]:
        """The operands of both products: the hidden state is one as well."""
        found = list(super().descriptors(Recipe(name=recipe.name, input=recipe.input, weight=recipe.weight)))
        if recipe.input is not None:
            found.append(("hidden", recipe.input.for_channel_axis(None)))
        return found

    def quantize_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Quantizes the input and the hidden state that comes in."""
        args, kwargs = super().quantize_inputs(args, kwargs)
        state = args[1] if len(args) > 1 else kwargs.get("hx")
        quantizer = self.quantizer("hidden")
        if state is None or quantizer is None:
            return args, kwargs
        state = (quantizer(state[0]), state[1])
        if len(args) > 1:
            return (args[0], state, *args[2:]), kwargs
        return args, {**kwargs, "hx": state}
