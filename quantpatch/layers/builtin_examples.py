"""An example of every built-in layer, for the conformance kit; each operand of each has something to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from quantpatch.layers import operand_modules
from quantpatch.plugins.example import Example


def rand(*shape: int, **options: Any) -> Callable[[], tuple[Tensor]]:
    """Inputs: one tensor of normal random numbers."""
    return lambda: (torch.randn(*shape, **options),)


def _of(name: str, inputs: Callable[[], Any], *args: Any, **options: Any) -> Example:
    """An example of a class of torch.nn with its arguments, and options of the example itself."""
    skip_checks, call = options.pop("skip_checks", {}), options.pop("call", {})
    return Example(
        f"torch.nn.{name}",
        lambda: getattr(nn, name)(*args, **options),
        inputs,
        keywords=call,
        skip_checks=skip_checks,
    )


_RENORMALIZES = "torch itself writes to the table in forward where max_norm is given"


def _linear() -> Iterator[Example]:
    yield _of("Linear", rand(3, 6), 6, 4)
    yield _of("LazyLinear", rand(3, 6), 4)
    yield _of("Bilinear", lambda: (torch.randn(2, 4), torch.randn(2, 5)), 4, 5, 3)


def _conv() -> Iterator[Example]:
    for n in (1, 2, 3):
        x = rand(2, 4, *(9, 7, 6)[:n])
        yield _of(f"Conv{n}d", x, 4, 6, 3, padding=1, padding_mode="circular")
        yield _of(f"LazyConv{n}d", x, 6, 3, stride=2, groups=2)
        yield _of(f"ConvTranspose{n}d", x, 4, 6, 3, stride=2, padding=1, output_padding=1)
        yield _of(f"LazyConvTranspose{n}d", x, 6, 3, groups=2, dilation=2)


def _pooling_and_norm() -> Iterator[Example]:
    for n in (1, 2, 3):
        x, size = rand(2, 3, *(8, 6, 6)[:n]), (4, 3, 2)[:n]
        yield _of(f"AvgPool{n}d", x, 3, stride=2, padding=1, ceil_mode=True)
        yield _of(f"AdaptiveAvgPool{n}d", x, size)
        yield _of(f"MaxPool{n}d", x, 2)
        yield _of(f"AdaptiveMaxPool{n}d", x, size)
        yield _of(f"InstanceNorm{n}d", x, 3, affine=True, track_running_stats=True)


def _recurrent() -> Iterator[Example]:
    def ragged() -> Any:
        return pack_sequence([torch.randn(n, 5) for n in (3, 6, 4)], enforce_sorted=False)

    def packed(of: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: (ragged(), of(4, 3, 4))

    def cell(of: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: (torch.randn(3, 5), of(3, 4))

    def two(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(shape), torch.randn(shape)

    for name, state in (("RNN", torch.randn), ("LSTM", two), ("GRU", torch.randn)):
        yield _of(name, packed(state), 5, 4, num_layers=2, bidirectional=True)
        yield _of(f"{name}Cell", cell(state), 5, 4)


def _attention() -> Iterator[Example]:
    def three() -> tuple[Tensor, ...]:
        return torch.randn(5, 3, 8), torch.randn(6, 3, 4), torch.randn(6, 3, 7)

    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)

    yield _of("MultiheadAttention", three, 8, 2, kdim=4, vdim=7)
    skip_checks = {"operands": "in self-attention the query's quantizer serves for key and value too"}
    yield Example("torch.nn.TransformerEncoder", encoder, rand(3, 5, 8), skip_checks=skip_checks)


def _embedding() -> Iterator[Example]:
    def indices(*shape: int) -> Callable[[], tuple[Tensor]]:
        return lambda: (torch.randint(0, 10, shape),)

    skip_checks = dict.fromkeys(("threads", "checkpointing", "unchanged"), _RENORMALIZES)
    yield _of("Embedding", indices(7), 10, 4, max_norm=0.5, norm_type=1.0, skip_checks=skip_checks)
    yield _of("EmbeddingBag", indices(3, 5), 10, 4)


def _operations() -> Iterator[Example]:
    def of(name: str, inputs: Callable[[], Any], **options: Any) -> Example:
        build = getattr(operand_modules, name)
        return Example(f"quantpatch.layers.operand_modules.{name}", lambda: build(**options), inputs)

    def two(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: tuple(torch.randn(shape) for shape in shapes)

    yield of("Add", two((3, 4), (3, 4)))
    yield of("Mul", two((3, 4), (4,)))
    yield of("MatMul", two((2, 3, 4), (2, 4, 5)))
    yield of("Cat", lambda: ([torch.randn(2, 3), torch.randn(2, 4)],), dim=1)
    yield of("ScaledDotProductAttention", two((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6)))


EXAMPLES: tuple[Example, ...] = (
    *_linear(),
    *_conv(),
    *_pooling_and_norm(),
    *_recurrent(),
    *_attention(),
    *_embedding(),
    *_operations(),
)
