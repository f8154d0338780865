"""Recurrent layers, on torch's fused kernels.

The weights are quantized once for a whole sequence, not once a time step.

In a stack of layers the output of one is the input of the next. As long as the quantizers of the upper
layers' inputs (``input_l1_quantizer`` …) are active, the kernel is called once a layer instead of once for
the stack, which on a CPU is what the kernel does itself; disabled, or left out by the recipe, they cost
nothing, and the whole stack is one call.

The hidden state between the steps of a fused kernel stays float, since it never leaves the kernel. A recipe
with a descriptor for it (``Recipe(hidden=...)``) gives each layer and direction a quantizer for it:
``hidden_l0_quantizer``, ``hidden_l0_reverse_quantizer`` and so on; with ``proj_size`` also
``projection_input_l0_quantizer`` and so on. While one of them is active, its layer runs in Python, step by
step, which takes longer: the smaller the layer and the batch, the more so. Disabled they cost nothing. The
cells (``QuantLSTMCell`` and so on) have such a quantizer always.

``torch.compile`` refuses recurrent layers, torch's own as well as these: a forward that calls one runs as it
does without compilation, and so does the layer. With ``torch._dynamo.config.allow_rnn = True`` it traces
them. Of torch 2.13's LSTM on a CPU that works, quantized or not, without gradients alone; with them the
compiler fails, unless ``torch.backends.mkldnn.flags(enabled=False)`` has it write out every time step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from quantpatch.layers.base import QuantizedLayer
from quantpatch.layers.lowering import lowering
from quantpatch.recipes.descriptor import Axis, QuantDescriptor, Recipe
from quantpatch.torch_tools import nn
from quantpatch.torch_tools.fx import leaf_in_fx

__all__ = ["QuantGRU", "QuantGRUCell", "QuantLSTM", "QuantLSTMCell", "QuantRNN", "QuantRNNCell"]


class QuantizedRecurrent(QuantizedLayer):
    """Quantizers for the input of each layer and for each weight: ``weight_ih_l0_quantizer`` and so on."""

    _flat_weights_names: list[str]
    num_layers: int
    input_size: int
    hidden_size: int
    proj_size: int
    batch_first: bool
    bidirectional: bool
    dropout: float
    training: bool

    def weight_axes(self) -> Mapping[str, Axis]:
        """Those of every layer and direction."""
        return {name: 0 for name in self._flat_weights_names if name.startswith("weight")}

    def descriptors(self, recipe: Recipe) -> Iterable[tuple[str, QuantDescriptor]]:
        """The input and the weights, the inputs of the upper layers, then what is inside the steps."""
        yield from super().descriptors(recipe)
        if recipe.input is not None:
            for layer in range(1, self.num_layers):
                yield f"input_l{layer}", recipe.input.for_axes(None, self.feature_axis)
        if recipe.hidden is not None:
            for layer in range(self.num_layers):
                for name in self._inside(layer):
                    yield name, recipe.hidden.for_axes(None, self.feature_axis)

    def _suffixes(self, layer: int) -> tuple[str, ...]:
        """What torch's names of a layer's weights end in, for each direction."""
        return (f"l{layer}", f"l{layer}_reverse") if self.bidirectional else (f"l{layer}",)

    def _inside(self, layer: int) -> tuple[str, ...]:
        """The activations that a layer multiplies within its steps."""
        operands = ("hidden", "projection_input") if self.proj_size else ("hidden",)
        return tuple(f"{operand}_{suffix}" for suffix in self._suffixes(layer) for operand in operands)

    @property
    def quantizes_between_steps(self) -> bool:
        """Whether what one step hands to the next is quantized, so that a layer runs step by step."""
        return any(self._any_active(*self._inside(layer)) for layer in range(self.num_layers))

    def _runs_in_steps(self) -> bool:
        """Whether an exporter, whose target has no operator for the layer, has it run in Python."""
        exported = lowering()
        return exported is not None and exported.runs_in_steps(self)

    def _any_active(self, *operands: str) -> bool:
        quantizers = map(self.quantizer, operands)
        return any(quantizer is not None and quantizer.is_active for quantizer in quantizers)

    @leaf_in_fx
    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """The float class's forward, with quantized operands."""
        if torch.compiler.is_compiling():
            return self._forward(input, hx)
        # Dynamo refuses to trace an RNN, but would still try every function that runs inside this one.
        tracer = set_eval_frame(None)
        try:
            return self._forward(input, hx)
        finally:
            set_eval_frame(tracer)

    def _forward(self, input: Tensor | PackedSequence, hx: Any) -> Any:
        apart = [f"input_l{layer}" for layer in range(1, self.num_layers)]
        apart += [name for layer in range(self.num_layers) for name in self._inside(layer)]
        weights = self.quantize_weights()
        if self._runs_in_steps() or self._any_active(*apart):
            output = self._run_by_layer(weights, input, hx)
        else:
            stand_ins = {**weights, **self._flattened(weights, self._flat_weights_names)} if weights else {}
            output = self.run_float(stand_ins, (self._quantize_sequence("input", input), hx), {})
        return self.quantize_output(output)

    def quantize_output(self, output: Any) -> Any:
        """The sequence, quantized; the states at its end stay as they are."""
        return (self._quantize_sequence("output", output[0]), output[1])

    def _quantize_sequence(self, operand: str, sequence: Any) -> Any:
        quantizer = self.quantizer(operand)
        if quantizer is None:
            return sequence
        if isinstance(sequence, PackedSequence):
            return sequence._replace(data=quantizer(sequence.data))
        time_first = not self.batch_first and sequence.dim() == 3
        return quantizer(sequence, batch_axis=1 if time_first else 0)

    def _flattened(self, weights: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        # The kernel takes its weights from this list, which torch keeps in step with the attributes.
        flat = [weights.get(name, getattr(self, name, None)) for name in names]
        return {"_flat_weights": flat, "_update_flat_weights": _nothing}

    def _run_by_layer(self, weights: Mapping[str, Any], sequence: Any, hx: Any) -> Any:
        """The stack, layer by layer: by the kernel, or in steps where something inside is quantized."""
        if not self._is_well_formed(sequence, hx):
            return self.run_float({}, (sequence, hx), {})  # it says what is wrong
        directions = 2 if self.bidirectional else 1
        states = []
        for layer in range(self.num_layers):
            own = slice(layer * directions, (layer + 1) * directions)
            state = None if hx is None else hx[own] if isinstance(hx, Tensor) else tuple(s[own] for s in hx)
            sequence = self._quantize_sequence(f"input_l{layer}" if layer else "input", sequence)
            in_steps = self._runs_in_steps() or self._any_active(*self._inside(layer))
            run = self._run_by_steps if in_steps else self._run_kernel
            sequence, state = run(layer, weights, sequence, state)
            states.append(state)
            if self.dropout and self.training and layer < self.num_layers - 1:
                sequence = _dropped(sequence, self.dropout)
        if isinstance(states[0], Tensor):
            return sequence, torch.cat(states)
        return sequence, tuple(torch.cat(parts) for parts in zip(*states, strict=True))

    def _state_sizes(self) -> tuple[int, ...]:
        """Features of each tensor of the state: the hidden state, of an LSTM also the cell state."""
        return (self.hidden_size,)

    def _is_well_formed(self, sequence: Any, hx: Any) -> bool:
        packed = isinstance(sequence, PackedSequence)
        data = sequence.data if packed else sequence
        if data.dim() not in ((2,) if packed else (2, 3)) or data.shape[-1] != self.input_size:
            return False
        if not data.shape[1 if self.batch_first and data.dim() == 3 else 0]:
            return False  # no steps
        if hx is None:
            return True
        if packed:
            batch = [int(sequence.batch_sizes[0])]
        else:
            batch = [data.shape[0 if self.batch_first else 1]] if data.dim() == 3 else []
        count = self.num_layers * (2 if self.bidirectional else 1)
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        return [list(state.shape) for state in given] == [
            [count, *batch, size] for size in self._state_sizes()
        ]

    def _run_kernel(self, layer: int, weights: Mapping[str, Any], sequence: Any, state: Any) -> Any:
        """One layer of the stack: the float forward on a view that has one layer."""
        step = len(self._flat_weights_names) // self.num_layers
        names = self._flat_weights_names[layer * step : (layer + 1) * step]
        directions = 2 if self.bidirectional else 1
        width = (self.proj_size or self.hidden_size) * directions if layer else self.input_size
        view = {"num_layers": 1, "dropout": 0.0, "input_size": width, **self._flattened(weights, names)}
        output, state = self.run_float(view, (sequence, state), {})
        if torch.compiler.is_compiling() and isinstance(output, Tensor):
            # The compiler hands the next layer what is computed from this in the order of axes that this
            # has in memory, which with batch_first is not the one that torch's kernel takes.
            output = output.contiguous()
        return output, state

    # --- step by step ----------------------------------------------------------------------------

    def _run_by_steps(self, layer: int, weights: Mapping[str, Any], sequence: Any, state: Any) -> Any:
        """One layer of the stack in Python, so that what is handed from step to step can be quantized."""
        packed = isinstance(sequence, PackedSequence)
        batched = packed or sequence.dim() == 3
        if packed:
            data, sizes = sequence.data, sequence.batch_sizes.tolist()
        else:
            steps = sequence if batched else sequence.unsqueeze(1)
            steps = steps.transpose(0, 1) if batched and self.batch_first else steps
            data, sizes = steps.flatten(0, 1), [steps.shape[1]] * steps.shape[0]
        suffixes = self._suffixes(layer)
        if state is None:
            initial = tuple(data.new_zeros(len(suffixes), sizes[0], size) for size in self._state_sizes())
        else:
            initial = (state,) if isinstance(state, Tensor) else tuple(state)
            initial = initial if batched else tuple(part.unsqueeze(1) for part in initial)
            if packed and sequence.sorted_indices is not None:
                initial = tuple(part.index_select(1, sequence.sorted_indices) for part in initial)
        outputs, finals = zip(
            *(
                self._run_direction(suffix, weights, data, sizes, tuple(part[number] for part in initial))
                for number, suffix in enumerate(suffixes)
            ),
            strict=True,
        )
        output = torch.cat(outputs, dim=-1)
        final = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        if packed:
            output = sequence._replace(data=output)
            if sequence.unsorted_indices is not None:
                final = tuple(part.index_select(1, sequence.unsorted_indices) for part in final)
        else:
            output = output.view(len(sizes), sizes[0], output.shape[-1])
            output = output.transpose(0, 1) if batched and self.batch_first else output
            if not batched:
                output, final = output.squeeze(1), tuple(part.squeeze(1) for part in final)
        return output, final if len(final) > 1 else final[0]

    def _run_direction(
        self,
        suffix: str,
        weights: Mapping[str, Any],
        data: Tensor,
        sizes: list[int],
        initial: tuple[Tensor, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One direction of a layer.

        Args:
            suffix: What the names of its weights end in.
            weights: The quantized weights.
            data: All steps, one after the other, ``(sum(sizes), features)``; longest sequences first.
            sizes: How many sequences each step has.
            initial: The state before the first step, of all sequences.

        Returns:
            The hidden states like ``data``, and the state that each sequence ends in.
        """

        def parameter(name: str) -> Any:
            name = f"{name}_{suffix}"
            return weights.get(name, getattr(self, name, None))

        weight, bias, projection = parameter("weight_hh"), parameter("bias_hh"), parameter("weight_hr")
        quantize = self.quantizer(f"hidden_{suffix}") or _unchanged
        quantize_projected = self.quantizer(f"projection_input_{suffix}") or _unchanged
        # What does not depend on the state is one product for all steps.
        gates = F.linear(data, parameter("weight_ih"), parameter("bias_ih"))
        # Under autocast the kernel of an LSTM has its state in the low precision; that of a GRU has not.
        if torch.is_autocast_enabled(gates.device.type) and len(initial) == 2:
            initial = tuple(part.to(gates.dtype) for part in initial)
        parts = torch.split(gates, sizes)
        order = range(len(sizes))[:: -1 if suffix.endswith("_reverse") else 1]
        state = tuple(part[: sizes[order[0]]] for part in initial)
        outputs: list[Any] = [None] * len(sizes)
        ended: list[tuple[Tensor, ...]] = []
        for number in order:
            running, now = state[0].shape[0], sizes[number]
            if now < running:  # the shortest sequences have come to their end
                ended.append(tuple(part[now:] for part in state))
                state = tuple(part[:now] for part in state)
            elif now > running:  # backwards they begin there
                state = tuple(
                    torch.cat([part, new[running:now]]) for part, new in zip(state, initial, strict=True)
                )
            hidden = quantize(state[0])
            state = self._advance(parts[number], F.linear(hidden, weight, bias), (hidden, *state[1:]))
            if projection is not None:
                state = (F.linear(quantize_projected(state[0]), projection), *state[1:])
            outputs[number] = state[0]
        pieces = [state, *reversed(ended)]
        return torch.cat(outputs), tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))

    def _advance(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next state, by the formulas in the documentation of torch's layer.

        Args:
            x: The input times its weights, with bias: ``(batch, gates * hidden_size)``.
            h: The hidden state times its weights, with bias.
            state: The state before, its hidden state quantized.
        """
        raise NotImplementedError


def _dropped(sequence: Any, p: float) -> Any:
    if isinstance(sequence, PackedSequence):
        return sequence._replace(data=F.dropout(sequence.data, p))
    return F.dropout(sequence, p)


def _nothing() -> None:
    pass


def _unchanged(x: Tensor) -> Tensor:
    return x


class QuantRNN(QuantizedRecurrent, nn.RNN):
    """``nn.RNN`` with quantized inputs and weights; the hidden state if the recipe says so."""

    def _advance(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((x + h).tanh() if self.nonlinearity == "tanh" else (x + h).relu(),)


class QuantLSTM(QuantizedRecurrent, nn.LSTM):
    """``nn.LSTM`` with quantized inputs and weights; the hidden state if the recipe says so.

    The cell state is multiplied elementwise only, and stays float.
    """

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    def _advance(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        i, f, g, o = (x + h).chunk(4, dim=-1)
        cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell


class QuantGRU(QuantizedRecurrent, nn.GRU):
    """``nn.GRU`` with quantized inputs and weights; the hidden state if the recipe says so.

    The hidden state that a step adds to its output, elementwise, is then the quantized one, as in
    ``QuantGRUCell``.
    """

    def _advance(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, dim=-1), h.chunk(3, dim=-1)
        new = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return (new + (x_z + h_z).sigmoid() * (state[0] - new),)


class _QuantizedCell(QuantizedLayer):
    """Quantizers for the operands of both products: the input, the hidden state and the weights."""

    weights = {"weight_ih": 0, "weight_hh": 0}

    def descriptors(self, recipe: Recipe) -> Iterable[tuple[str, QuantDescriptor]]:
        yield from super().descriptors(recipe)
        hidden = recipe.input if recipe.hidden is None else recipe.hidden
        if hidden is not None:
            yield "hidden", hidden.for_axes(None, self.feature_axis)

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
