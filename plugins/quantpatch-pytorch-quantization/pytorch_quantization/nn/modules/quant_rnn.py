"""LSTM layers with quantized inputs and weights.

A time step multiplies the input and the hidden state with one matrix, if you put them side by side; so
they share a range, and so do the two halves of that matrix. The hidden state is quantized at every time
step, which rules out torch's fused kernels: with active quantizers an LSTM is a loop over time steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from pytorch_quantization import tensor_quant
from pytorch_quantization.nn.modules._utils import QuantLayer
from pytorch_quantization.nn.modules.tensor_quantizer import TensorQuantizer
from pytorch_quantization.tensor_quant import QuantDescriptor

__all__ = ["LSTM", "LSTMCell", "QuantLSTM", "QuantLSTMCell"]

State = tuple[Tensor, Tensor]
Groups = Iterator[tuple[TensorQuantizer, tuple[Tensor, ...]]]


def _together(quantizer: nn.Module, first: Tensor, second: Tensor) -> list[Tensor]:
    """Quantizes two tensors with one range."""
    both = quantizer(torch.cat([first, second], -1))
    return list(both.split([first.shape[-1], second.shape[-1]], -1))


class QuantLSTMCell(QuantLayer, nn.LSTMCell):
    """``nn.LSTMCell`` with quantized input, hidden state and weights."""

    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def weight_groups(self) -> Groups:
        """The weight quantizer, with the tensors that share its ranges."""
        yield self._weight_quantizer, (self.weight_ih, self.weight_hh)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """The float cell's forward, with quantized operands."""
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros)
        stand_ins: dict[str, Any] = {}
        if not self._weight_quantizer.is_transparent:
            weights = _together(self._weight_quantizer, self.weight_ih, self.weight_hh)
            stand_ins = dict(zip(("weight_ih", "weight_hh"), weights, strict=True))
        x, h = _together(self._input_quantizer, input, hx[0])
        result: State = self.run_float(stand_ins, (x, (h, hx[1])), {})
        return result


class QuantLSTM(QuantLayer, nn.LSTM):
    """``nn.LSTM`` with quantized inputs, hidden states and weights.

    Quantizers are in ``_input_quantizers`` and ``_weight_quantizers``: one for each layer and direction,
    the two directions of a layer next to each other. The projection of ``proj_size`` stays float.
    """

    default_quant_desc_weight = tensor_quant.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    weights: ClassVar[Any] = {}

    def _init_quantizers(self, *descriptors: QuantDescriptor) -> None:
        of_input, of_weight = descriptors
        self.init_quantizer(of_input, of_weight, self.num_layers * self._directions)

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _named(self, index: int, name: str) -> Any:
        """A parameter of one layer and direction; None if the layer is without."""
        suffix = "_reverse" if index % self._directions else ""
        return getattr(self, f"{name}_l{index // self._directions}{suffix}", None)

    def weight_groups(self) -> Groups:
        """Each weight quantizer, with the tensors that share its ranges."""
        for index, quantizer in enumerate(self._weight_quantizers):
            assert isinstance(quantizer, TensorQuantizer)
            yield quantizer, (self._named(index, "weight_ih"), self._named(index, "weight_hh"))

    def forward(self, input: Any, hx: State | None = None) -> Any:
        """As of ``nn.LSTM``, packed sequences included."""
        quantizers = (*self._input_quantizers, *self._weight_quantizers)
        if all(quantizer.is_transparent for quantizer in quantizers):
            return self.run_float({}, (input, hx), {})
        if isinstance(input, PackedSequence):
            if hx is not None:
                hx = self.permute_hidden(hx, input.sorted_indices)
            steps = list(torch.split(input.data, input.batch_sizes.tolist()))
            outputs, state = self._run_layers(steps, hx)
            packed = PackedSequence(
                torch.cat(outputs), input.batch_sizes, input.sorted_indices, input.unsorted_indices
            )
            return packed, self.permute_hidden(state, input.unsorted_indices)
        unbatched = input.dim() == 2
        batch_axis = 0 if self.batch_first else 1
        if unbatched:
            input = input.unsqueeze(batch_axis)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        self.check_forward_args(input, hx or self._zeros(input.select(1 - batch_axis, 0)), None)
        outputs, state = self._run_layers(list(input.unbind(1 - batch_axis)), hx)
        output = torch.stack(outputs, 1 - batch_axis)
        if unbatched:
            return output.squeeze(batch_axis), (state[0].squeeze(1), state[1].squeeze(1))
        return output, state

    def _zeros(self, step: Tensor) -> State:
        count = self.num_layers * self._directions
        rows = step.shape[0]  # not len(step), which is a fixed number where a graph is traced
        h = step.new_zeros(count, rows, self.proj_size or self.hidden_size)
        return h, step.new_zeros(count, rows, self.hidden_size)

    def _run_layers(self, steps: list[Tensor], hx: State | None) -> tuple[list[Tensor], State]:
        """All layers, on the inputs of each time step; in a packed sequence later steps have fewer rows."""
        h, c = self._zeros(steps[0]) if hx is None else hx
        last = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                steps = [F.dropout(step, self.dropout) for step in steps]
            ways = []
            for direction in range(self._directions):
                index = layer * self._directions + direction
                outputs, state = self._run_direction(steps, (h[index], c[index]), index)
                ways.append(outputs)
                last.append(state)
            steps = [torch.cat(outputs, -1) for outputs in zip(*ways, strict=True)]
        return steps, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))

    def _run_direction(self, steps: list[Tensor], state: State, index: int) -> tuple[list[Tensor], State]:
        quantizer, reverse = self._input_quantizers[index], bool(index % self._directions)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        w_ih, w_hh, b_ih, b_hh, w_hr = (self._named(index, name) for name in names)
        w_ih, w_hh = _together(self._weight_quantizers[index], w_ih, w_hh)
        h, c = state
        outputs = []
        for step in reversed(steps) if reverse else steps:
            rows = step.shape[0]
            x, h_in = _together(quantizer, step, h[:rows])
            gates = F.linear(x, w_ih, b_ih) + F.linear(h_in, w_hh, b_hh)
            i, f, g, o = gates.chunk(4, -1)
            c_out = torch.sigmoid(f) * c[:rows] + torch.sigmoid(i) * torch.tanh(g)
            h_out = torch.sigmoid(o) * torch.tanh(c_out)
            if w_hr is not None:
                h_out = F.linear(h_out, w_hr)
            outputs.append(h_out)
            # Sequences that have ended, or not begun in the other direction, keep their state.
            h, c = (torch.cat([new, old[rows:]]) for new, old in ((h_out, h), (c_out, c)))
        return outputs[::-1] if reverse else outputs, (h, c)


LSTM, LSTMCell = QuantLSTM, QuantLSTMCell
