"""Which of torch's operators multiply, what, and how much.

Operators are those that reach the dispatcher, below autograd and below every Python function: what is
seen there is what runs, fast paths included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import attrs
from torch import Tensor

T = TypeVar("T")


@attrs.frozen
class Product(Generic[T]):
    """A matrix product, or a sum of products like one, inside an operator.

    Attributes:
        operation: What it is, for people.
        macs: Multiply-accumulates.
        operands: What is multiplied, by role: tensors, or what was recorded of them. None stands for a value
            that never leaves the operator.
        channels: For each operand the axis along which the outputs lie, if it is a weight; None where that
            is not known.
    """

    operation: str
    macs: int
    operands: tuple[tuple[str, T | None], ...]
    channels: tuple[int | None, ...] = (None, None)


#: Operators that do the work of whole layers and read the weights themselves.
FAST_PATHS = frozenset({"aten::_transformer_encoder_layer_fwd", "aten::_native_multi_head_attention"})


def _two(operation: str, left: Tensor, right: Tensor, macs: int) -> Iterator[Product[Tensor]]:
    yield Product(operation, macs, (("left", left), ("right", right)), (-2, -1))


def _matmul(first: int) -> Callable[[tuple[Any, ...], Any], Iterator[Product[Tensor]]]:
    """A product of the arguments ``first`` and the next, contracted over the last axis of the former."""

    def products(args: tuple[Any, ...], result: Any) -> Iterator[Product[Tensor]]:
        left, right = args[first], args[first + 1]
        return _two("matrix product", left, right, result.numel() * left.shape[-1])

    return products


def _summed_batches(args: tuple[Any, ...], result: Any) -> Iterator[Product[Tensor]]:
    return _two("matrix product", args[1], args[2], args[1].numel() * args[2].shape[-1])


def _convolution_time_first(args: tuple[Any, ...], result: Any) -> Iterator[Product[Tensor]]:
    x, weight = args[:2]  # (time, batch, channels) and (kernel, channels, outputs)
    macs = result.numel() * weight.shape[0] * weight.shape[1]
    yield Product("convolution", macs, (("input", x), ("weight", weight)), (None, 2))


def _convolution(args: tuple[Any, ...], result: Any) -> Iterator[Product[Tensor]]:
    x, weight, transposed = args[0], args[1], bool(args[6])
    per_element = weight.numel() // weight.shape[0]
    name = "transposed convolution" if transposed else "convolution"
    macs = (x.numel() if transposed else result.numel()) * per_element
    yield Product(name, macs, (("input", x), ("weight", weight)), (None, int(transposed)))


def _attention(args: tuple[Any, ...], result: Any) -> Iterator[Product[Tensor]]:
    query, key, value = args[:3]
    pairs = query.numel() // query.shape[-1] * key.shape[-2]
    yield Product("attention scores", pairs * query.shape[-1], (("query", query), ("key", key)))
    yield Product("attention output", pairs * value.shape[-1], (("probabilities", None), ("value", value)))


def _mkldnn_rnn(args: tuple[Any, ...], result: Any) -> Iterator[Product[Tensor]]:
    x, weight_ih, weight_hh = args[:3]
    steps = x.numel() // x.shape[-1]
    yield Product("recurrent input", steps * weight_ih.numel(), (("input", x), ("weight_ih", weight_ih)))
    yield Product("recurrent state", steps * weight_hh.numel(), (("hidden", None), ("weight_hh", weight_hh)))


def _cudnn_rnn(args: tuple[Any, ...], result: Any) -> Iterator[Product[Tensor]]:
    x, weights = args[0], [w for w in args[1] if w is not None and w.dim() == 2]
    steps = x.numel() // x.shape[-1]
    for index, weight in enumerate(weights):
        operand: Tensor | None = x if index == 0 else None
        yield Product("recurrent", steps * weight.numel(), (("input", operand), ("weight", weight)))


def _trilinear(args: tuple[Any, ...], result: Any) -> Iterator[Product[Tensor]]:
    left, weight, right = args[:3]
    rows = result.numel() // weight.shape[0] if weight.dim() else 1
    operands = (("input1", left), ("weight", weight), ("input2", right))
    yield Product("bilinear", rows * weight.numel(), operands, (None, 0, None))


def _grouped(args: tuple[Any, ...], result: Any) -> Iterator[Product[Tensor]]:
    return _two("grouped matrix product", args[0], args[1], result.numel() * args[0].shape[-1])


def _fast_encoder_layer(args: tuple[Any, ...], result: Any) -> Iterator[Product[Tensor]]:
    x, width = args[0], args[1]
    weights = [a for a in args[3:] if isinstance(a, Tensor) and a.dim() == 2 and width in a.shape]
    tokens, length = x.numel() // x.shape[-1], x.shape[-2]
    macs = tokens * sum(w.numel() for w in weights) + 2 * tokens * length * width
    yield Product("transformer layer in one piece", macs, (("input", None), ("weights", None)))


def _fast_attention(args: tuple[Any, ...], result: Any) -> Iterator[Product[Tensor]]:
    x, width, weights = args[0], args[3], (args[5], args[7])
    tokens, length = x.numel() // x.shape[-1], args[1].shape[-2]
    macs = tokens * sum(w.numel() for w in weights) + 2 * tokens * length * width
    yield Product("attention in one piece", macs, (("input", None), ("weights", None)))


_MULTIPLYING: dict[str, Callable[[tuple[Any, ...], Any], Iterator[Product[Tensor]]]] = {
    **dict.fromkeys(
        ("mm", "bmm", "mv", "dot", "vdot", "matmul", "linear", "_int_mm", "_scaled_mm"), _matmul(0)
    ),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "_addmm_activation"), _matmul(1)),
    "addbmm": _summed_batches,
    "conv_tbc": _convolution_time_first,
    "_grouped_mm": _grouped,
    "convolution": _convolution,
    "_convolution": _convolution,
    "_trilinear": _trilinear,
    "mkldnn_rnn_layer": _mkldnn_rnn,
    "_cudnn_rnn": _cudnn_rnn,
    "_transformer_encoder_layer_fwd": _fast_encoder_layer,
    "_native_multi_head_attention": _fast_attention,
    **{
        f"_scaled_dot_product_{name}": _attention
        for name in (
            *("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"),
            "fused_attention_overrideable",
        )
    },
}


def products_of(operator: str, args: tuple[Any, ...], result: Any) -> list[Product[Tensor]]:
    """The products in a call of an operator (``"aten::mm"``); none for operators that do not multiply."""
    namespace, _, name = operator.partition("::")
    products = _MULTIPLYING.get(name) if namespace == "aten" else None
    return [] if products is None else list(products(args, result))
