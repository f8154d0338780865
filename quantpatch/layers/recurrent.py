"""Recurrent layers, on torch's fused kernels.

The weights are quantized once for a whole sequence, not once a time step. The hidden state between the
steps of a fused kernel stays float, since it never leaves the kernel; the cells (``QuantLSTMCell`` and so
on) quantize it at every step.

In a stack of layers the output of one is the input of the next. As long as the quantizers of the upper
layers' inputs (``input_l1_quantizer`` …) are active, the kernel is called once a layer instead of once for
the stack, which on a CPU is what the kernel does itself; disabled, or left out by the recipe, they cost
nothing, and the whole stack is one call.

torch.compile traces recurrent layers, quantized or not, only with ``torch._dynamo.config.allow_rnn = True``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from quantpatch.descriptor import QuantDescriptor, Recipe
from quantpatch.layers.base import QuantizedLayer

__all__ = ["QuantGRU", "QuantGRUCell", "QuantLSTM", "QuantLSTMCell", "QuantRNN", "QuantRNNCell"]


class _QuantizedRecurrent(QuantizedLayer):
    """Quantizers for the input of each layer and for each weight: ``weight_ih_l0_quantizer`` and so on."""

    _flat_weights_names: list[str]
    num_layers: int
    input_size: int
    hidden_size: int
    proj_size: int
    bidirectional: bool
    dropout: float
    training: bool

    def weight_axes(self) -> Mapping[str, int | None]:
        return {name: 0 for name in self._flat_weights_names if name.startswith("weight")}

    def descriptors(self, recipe: Recipe) -> Iterable[tuple[str, QuantDescriptor]]:
        """The input and the weights, then the inputs of the upper layers."""
        yield from super().descriptors(recipe)
        if recipe.input is not None:
            for layer in range(1, self.num_layers):
                yield f"input_l{layer}", recipe.input.for_axes(None, self.feature_axis)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """The float class's forward, with quantized operands."""
        upper = (self.quantizer(f"input_l{layer}") for layer in range(1, self.num_layers))
        weights = self.quantize_weights()
        if any(quantizer is not None and quantizer.is_active for quantizer in upper):
            output = self._run_by_layer(weights, input, hx)
        else:
            stand_ins = {**weights, **self._flattened(weights, self._flat_weights_names)} if weights else {}
            output = self.run_float(stand_ins, (self._quantize_sequence("input", input), hx), {})
        return self.quantize_output(output)

    def quantize_output(self, output: Any) -> Any:
        return (self._quantize_sequence("output", output[0]), output[1])

    def _quantize_sequence(self, operand: str, sequence: Any) -> Any:
        quantizer = self.quantizer(operand)
        if quantizer is None:
            return sequence
        if isinstance(sequence, PackedSequence):
            return sequence._replace(data=quantizer(sequence.data))
        return quantizer(sequence)

    def _flattened(self, weights: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        # The kernel takes its weights from this list, which torch keeps in step with the attributes.
        flat = [weights.get(name, getattr(self, name, None)) for name in names]
        return {"_flat_weights": flat, "_update_flat_weights": _nothing}

    def _run_by_layer(self, weights: Mapping[str, Any], sequence: Any, hx: Any) -> Any:
        """The stack, one kernel call a layer: the float forward on views that have one layer each."""
        directions = 2 if self.bidirectional else 1
        given = [] if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
        if any(state.size(0) != self.num_layers * directions for state in given):
            return self.run_float({}, (sequence, hx), {})  # it says what is wrong
        step = len(self._flat_weights_names) // self.num_layers
        states = []
        for layer in range(self.num_layers):
            names = self._flat_weights_names[layer * step : (layer + 1) * step]
            width = (self.proj_size or self.hidden_size) * directions if layer else self.input_size
            view = {"num_layers": 1, "dropout": 0.0, "input_size": width, **self._flattened(weights, names)}
            own = slice(layer * directions, (layer + 1) * directions)
            state = None if hx is None else hx[own] if isinstance(hx, Tensor) else tuple(s[own] for s in hx)
            sequence = self._quantize_sequence(f"input_l{layer}" if layer else "input", sequence)
            sequence, state = self.run_float(view, (sequence, state), {})
            states.append(state)
            if self.dropout and self.training and layer < self.num_layers - 1:
                sequence = _dropped(sequence, self.dropout)
        if isinstance(states[0], Tensor):
            return sequence, torch.cat(states)
        return sequence, tuple(torch.cat(parts) for parts in zip(*states, strict=True))


def _dropped(sequence: Any, p: float) -> Any:
    if isinstance(sequence, PackedSequence):
        return sequence._replace(data=F.dropout(sequence.data, p))
    return F.dropout(sequence, p)


def _nothing() -> None:
    pass


class QuantRNN(_QuantizedRecurrent, nn.RNN):
    """``nn.RNN`` with quantized inputs and weights."""


class QuantLSTM(_QuantizedRecurrent, nn.LSTM):
    """``nn.LSTM`` with quantized inputs and weights."""


class QuantGRU(_QuantizedRecurrent, nn.GRU):
    """``nn.GRU`` with quantized inputs and weights."""


class _QuantizedCell(QuantizedLayer):
    """Quantizers for the operands of both products: the input, the hidden state and the weights."""

    weights = {"weight_ih": 0, "weight_hh": 0}

    def descriptors(self, recipe: Recipe) -> Iterable[tuple[str, QuantDescriptor]]:
        yield from super().descriptors(recipe)
        if recipe.input is not None:
            yield "hidden", recipe.input.for_axes(None, self.feature_axis)

    def quantize_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Quantizes the input and the hidden state that comes in."""
        args, kwargs = super().quantize_inputs(args, kwargs)
        state = args[1] if len(args) > 1 else kwargs.get("hx")
        quantizer = self.quantizer("hidden")
        if state is None or quantizer is None:
            return args, kwargs
        state = quantizer(state) if isinstance(state, Tensor) else (quantizer(state[0]), *state[1:])
        if len(args) > 1:
            return (args[0], state, *args[2:]), kwargs
        return args, {**kwargs, "hx": state}


class QuantRNNCell(_QuantizedCell, nn.RNNCell):
    """``nn.RNNCell`` with quantized input, hidden state and weights."""


class QuantLSTMCell(_QuantizedCell, nn.LSTMCell):
    """``nn.LSTMCell`` with quantized input, hidden state and weights; the cell state stays float."""


class QuantGRUCell(_QuantizedCell, nn.GRUCell):
    """``nn.GRUCell`` with quantized input, hidden state and weights.

    A GRU also adds its hidden state to its output, elementwise: the one that it adds is the quantized one,
    since torch's kernel takes one tensor for both.
    """
