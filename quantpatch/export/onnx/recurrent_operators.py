"""RNN, LSTM and GRU in a traced model, and what they become in ONNX: an operator for each layer of the stack.

torch itself traces through them as loops: what comes out has as many steps as the arguments, and of an RNN
each step has its own nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from quantpatch.errors import ExportError
from quantpatch.layers.recurrent import QuantizedRecurrent
from quantpatch.torch_tools import nn

# How torch orders the gates in a weight, in the order of ONNX's.
_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}


# Written out: releases of torch differ in what they take for the type of a result.
_SCHEMA = (
    "(str kind, Tensor x, Tensor[] state, Tensor[] weights, bool has_biases, int num_layers, "
    "bool bidirectional, bool batch_first) -> Tensor[]"
)


@torch.library.custom_op("quantpatch::recurrent", mutates_args=(), schema=_SCHEMA)
def recurrent(
    kind: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """What torch's kernel of this name computes in eval mode: the outputs, and the states at the end."""
    hx = list(state) if kind == "lstm" else state[0]
    options = (list(weights), has_biases, num_layers, 0.0, False, bidirectional, batch_first)
    return [part.clone() for part in getattr(torch._VF, kind)(x, hx, *options)]


@recurrent.register_fake
def _(kind: str, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], *how: Any) -> list[Tensor]:
    _, _, bidirectional, _ = how
    features = state[0].shape[2] * (2 if bidirectional else 1)
    return [x.new_empty((x.shape[0], x.shape[1], features)), *(torch.empty_like(part) for part in state)]


class _Whole(TorchFunctionMode):
    """Makes calls of torch's recurrent kernels calls of the operator above."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch._VF._pack_padded_sequence:
            raise NotImplementedError(
                "packed sequences have as many rows as their values say, which no file can; hand the padded "
                "sequence to the layer"
            )
        kind = getattr(func, "__name__", "")
        if kind not in _GATES or func is not getattr(torch._VF, kind) or not isinstance(args[2], list):
            return func(*args, **(kwargs or {}))
        x, hx, weights, has_biases, num_layers, _, _, bidirectional, batch_first = args
        state = [hx] if isinstance(hx, Tensor) else list(hx)
        return tuple(recurrent(kind, x, state, weights, has_biases, num_layers, bidirectional, batch_first))


def recurrent_to_onnx(op: Any) -> Callable[..., Any]:
    """The translation of ``recurrent`` for ``torch.onnx.export``.

    Args:
        op: ONNX's operators, an ``onnxscript.values.Opset``.
    """

    def of_directions(parts: Sequence[Any]) -> Any:
        parts = [op.Unsqueeze(part, op.Constant(value_ints=[0])) for part in parts]
        return op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]

    def translated(
        kind: str,
        x: Any,
        state: Sequence[Any],
        weights: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        directions, hidden = 2 if bidirectional else 1, int(state[0].shape[2])
        options: dict[str, Any] = {
            "hidden_size": hidden,
            "direction": "bidirectional" if bidirectional else "forward",
        }
        if kind == "gru":
            options["linear_before_reset"] = 1  # the reset gate is applied to the product, as in torch
        elif kind != "lstm":
            options["activations"] = [kind.removeprefix("rnn_").capitalize()] * directions
        operator = getattr(op, kind.partition("_")[0].upper())
        rows = [gate * hidden + row for gate in _GATES[kind] for row in range(hidden)]

        def ordered(weight: Any) -> Any:
            return op.Gather(weight, op.Constant(value_ints=rows), axis=0) if len(rows) > hidden else weight

        if batch_first:
            x = op.Transpose(x, perm=[1, 0, 2])
        each = 4 if has_biases else 2
        ends: list[Any] = []
        for layer in range(num_layers):
            first = layer * directions
            own = [weights[n * each : (n + 1) * each] for n in range(first, first + directions)]
            w, r = (of_directions([ordered(part[n]) for part in own]) for n in range(2))
            bias = None
            if has_biases:
                bias = of_directions([op.Concat(*map(ordered, part[2:]), axis=0) for part in own])
            starts = state
            if num_layers > 1:
                bounds = [op.Constant(value_ints=[n]) for n in (first, first + directions, 0)]
                starts = [op.Slice(part, *bounds) for part in state]
            y, *end = operator(x, w, r, bias, None, *starts, **options)
            ends.append(end)
            # (steps, directions, batch, features), of which torch has the directions beside each other
            y = op.Transpose(y, perm=[0, 2, 1, 3])
            x = op.Reshape(y, op.Constant(value_ints=[0, 0, -1]))
        if batch_first:
            x = op.Transpose(x, perm=[1, 0, 2])
        ends = [list(parts) for parts in zip(*ends, strict=True)]
        return x, *(op.Concat(*parts, axis=0) if num_layers > 1 else parts[0] for parts in ends)

    return translated


# --- LSTMs with a projection, which ONNX's operator has not -----------------------------------------------


def demand_operators(model: nn.Module, runtime: str) -> None:
    """Refuses layers that torch would write as an operator that computes something else."""
    plain = {n: m for n, m in projecting(model).items() if not isinstance(m, QuantizedRecurrent)}
    if plain:
        named = ", ".join(f"{name or 'the model'} (proj_size={m.proj_size})" for name, m in plain.items())
        raise ExportError(
            f"ONNX's LSTM has no projection: {named}. A quantized one is written out step by step: write "
            f"qp.convert(model), and to keep it exact disable its quantizers",
            quantizers=tuple(plain),
            runtime=runtime,
        )


def written_out(model: nn.Module) -> list[str]:
    """Names of the recurrent layers that are written out step by step."""
    recurrent = {name: m for name, m in model.named_modules() if isinstance(m, nn.RNNBase)}
    return [
        name or "the model"
        for name, layer in recurrent.items()
        if layer.proj_size or (isinstance(layer, QuantizedRecurrent) and layer.quantizes_between_steps)
    ]


def projecting(model: nn.Module) -> dict[str, nn.LSTM]:
    """The LSTMs that ONNX has no operator for, by name; they are traced step by step."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.LSTM) and m.proj_size}


def kernels_as_operators(model: nn.Module) -> AbstractContextManager[Any]:
    """A block in which torch's recurrent kernels are traced as one operator each."""
    # A mode is asked at every call of a function while torch traces, and there are some 100,000.
    recurs = any(isinstance(module, nn.RNNBase) for module in model.modules())
    return _Whole() if recurs else contextlib.nullcontext()
