"""Argument sets that cover each keyword and padding mode of every layer, for the conformance kit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from quantpatch.layers.builtin_examples import EXAMPLES, rand
from quantpatch.plugins.entry import Entry
from quantpatch.plugins.example import Example
from quantpatch.plugins.plugin import BUILTIN
from quantpatch.plugins.registry import registry
from quantpatch.testing import Subject


def entries() -> dict[str, Entry]:
    return {entry.dotted: entry for entry in registry.entries([]) if entry.plugin == BUILTIN}


def subject(example: Example) -> Subject:
    return Subject(entries()[example.target], example, plugins=())


CASES: list[Example] = list(EXAMPLES)


def case(name: str, label: str, args: Any, inputs: Any, call: Any = None, /, **kwargs: Any) -> None:
    def build() -> nn.Module:
        return getattr(nn, name)(*args, **kwargs)

    CASES.append(Example(f"torch.nn.{name}", build, inputs, keywords=call or {}, label=label))


# --- linear ------------------------------------------------------------------------------------------------

case("Linear", "plain", (6, 4), rand(3, 6))
case("Linear", "no-bias", (6, 4), rand(2, 3, 6), bias=False)
case("Linear", "1d-input", (6, 4), rand(6))
case("Linear", "double", (6, 4), rand(3, 6, dtype=torch.float64), device="cpu", dtype=torch.float64)
case("Bilinear", "plain", (4, 5, 3), lambda: (torch.randn(2, 4), torch.randn(2, 5)))
case(
    "Bilinear",
    "no-bias",
    (),
    lambda: (torch.randn(2, 4), torch.randn(2, 5)),
    in1_features=4,
    in2_features=5,
    out_features=3,
    bias=False,
)
case(
    "Bilinear",
    "dtype",
    (4, 5, 3),
    lambda: (torch.randn(2, 4).double(), torch.randn(2, 5).double()),
    device="cpu",
    dtype=torch.float64,
)
case("LazyLinear", "plain", (4,), rand(3, 6))
case("LazyLinear", "no-bias", (4,), rand(3, 6), bias=False, device="cpu", dtype=torch.float32)

# --- convolutions ---------------------------------------------------------------------------------

for n in (1, 2, 3):
    size = (9, 7, 6)[:n]
    one = (2,) * n
    for lazy in ("", "Lazy"):
        first = () if lazy else (4,)
        name = f"{lazy}Conv{n}d"
        case(name, "plain", (*first, 6, 3), rand(2, 4, *size))
        case(name, "strided", (*first, 6, 3), rand(2, 4, *size), stride=2, padding=1, bias=False)
        case(name, "dilated", (*first, 6, 2), rand(2, 4, *size), dilation=2, padding=one)
        case(name, "grouped", (*first, 6, 3), rand(2, 4, *size), groups=2, padding="valid")
        case(name, "same", (*first, 4, 3), rand(2, 4, *size), padding="same", dilation=2, groups=4)
        case(name, "circular", (*first, 6, 3), rand(2, 4, *size), padding=1, padding_mode="circular")
        case(name, "replicate", (*first, 6, 3), rand(2, 4, *size), padding="same", padding_mode="replicate")
        case(name, "reflect", (*first, 6, 3), rand(2, 4, *size), padding=1, padding_mode="reflect")
        case(
            name,
            "double",
            (*first, 6, 3),
            rand(2, 4, *size, dtype=torch.float64),
            device="cpu",
            dtype=torch.float64,
        )
        if not lazy:
            case(name, "unbatched", (4, 6, 3), rand(4, *size))
        name = f"{lazy}ConvTranspose{n}d"
        case(name, "plain", (*first, 6, 3), rand(2, 4, *size))
        case(
            name,
            "strided",
            (*first, 6, 3),
            rand(2, 4, *size),
            stride=2,
            padding=1,
            output_padding=1,
            bias=False,
        )
        case(name, "grouped", (*first, 6, 3), rand(2, 4, *size), groups=2, dilation=2)
        wanted = [2 * k for k in size]
        case(name, "size", (*first, 6, 3), rand(2, 4, *size), {"output_size": wanted}, stride=2, padding=1)
        case(
            name,
            "double",
            (*first, 6, 3),
            rand(2, 4, *size, dtype=torch.float64),
            padding_mode="zeros",
            device="cpu",
            dtype=torch.float64,
        )
        if not lazy:
            case(name, "unbatched", (4, 6, 3), rand(4, *size))
case(
    "Conv2d",
    "channels-last",
    (4, 6, 3),
    lambda: (torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last),),
)

# --- pooling and norm -----------------------------------------------------------------------------

for n in (1, 2, 3):
    shape = (2, 3, 8, 6, 6)[: n + 2]
    out = (4, 3, 2)[:n]
    case(f"AvgPool{n}d", "plain", (2,), rand(*shape))
    case(
        f"AvgPool{n}d",
        "strided",
        (3,),
        rand(*shape),
        stride=2,
        padding=1,
        ceil_mode=True,
        count_include_pad=False,
    )
    if n > 1:
        case(f"AvgPool{n}d", "divisor", (2,), rand(*shape), divisor_override=3)
    case(f"AvgPool{n}d", "unbatched", (2,), rand(*shape[1:]))
    case(f"AdaptiveAvgPool{n}d", "plain", (out,), rand(*shape))
    case(f"AdaptiveAvgPool{n}d", "int", (1,), rand(*shape))
    if n > 1:
        case(f"AdaptiveAvgPool{n}d", "none", ((None, *out[1:]),), rand(*shape))
    case(f"MaxPool{n}d", "plain", (2,), rand(*shape))
    case(
        f"MaxPool{n}d",
        "indices",
        (2,),
        rand(*shape),
        return_indices=True,
        stride=2,
        dilation=2,
        ceil_mode=True,
    )
    case(f"MaxPool{n}d", "padded", (3,), rand(*shape), padding=1)
    case(f"AdaptiveMaxPool{n}d", "plain", (out,), rand(*shape))
    case(f"AdaptiveMaxPool{n}d", "indices", (2,), rand(*shape), return_indices=True)
    case(f"InstanceNorm{n}d", "plain", (3,), rand(*shape))
    case(f"InstanceNorm{n}d", "affine", (3,), rand(*shape), affine=True, eps=1e-3)
    case(
        f"InstanceNorm{n}d",
        "running",
        (3,),
        rand(*shape),
        affine=True,
        track_running_stats=True,
        momentum=0.5,
    )
    case(f"InstanceNorm{n}d", "unbatched", (3,), rand(*shape[1:]))
    case(
        f"InstanceNorm{n}d",
        "double",
        (3,),
        rand(*shape, dtype=torch.float64),
        affine=True,
        device="cpu",
        dtype=torch.float64,
    )

# --- recurrent ------------------------------------------------------------------------------------


def ragged() -> list[Tensor]:
    return [torch.randn(n, 5) for n in (3, 6, 4)]


for name in ("RNN", "LSTM", "GRU"):

    def states(*shape: int, name: str = name) -> Any:
        return (torch.randn(shape), torch.randn(shape)) if name == "LSTM" else torch.randn(shape)

    case(name, "plain", (5, 4), rand(6, 3, 5))
    case(name, "batch-first", (5, 4), rand(3, 6, 5), batch_first=True, bias=False)
    case(name, "deep", (5, 4), rand(6, 3, 5), num_layers=3, bidirectional=True)
    case(name, "dropout", (5, 4), rand(6, 3, 5), num_layers=2, dropout=0.5)
    case(
        name,
        "state",
        (5, 4),
        lambda s=states: (torch.randn(6, 3, 5), s(4, 3, 4)),
        num_layers=2,
        bidirectional=True,
    )
    case(name, "unbatched", (5, 4), rand(6, 5), num_layers=2)
    case(name, "unbatched-state", (5, 4), lambda s=states: (torch.randn(6, 5), s(2, 4)), num_layers=2)
    case(name, "packed", (5, 4), lambda: (pack_sequence(ragged(), enforce_sorted=False),), num_layers=2)
    case(
        name,
        "packed-sorted",
        (5, 4),
        lambda: (pack_padded_sequence(torch.randn(6, 3, 5), [6, 4, 3]),),
        bidirectional=True,
    )
    case(
        name,
        "packed-state",
        (5, 4),
        lambda s=states: (pack_sequence(ragged(), enforce_sorted=False), s(4, 3, 4)),
        num_layers=2,
        bidirectional=True,
        dropout=0.3,
    )
    case(name, "double", (5, 4), rand(6, 3, 5, dtype=torch.float64), device="cpu", dtype=torch.float64)
    cell_state = (
        (lambda b: (torch.randn(b, 4), torch.randn(b, 4)))
        if name == "LSTM"
        else (lambda b: torch.randn(b, 4))
    )
    case(f"{name}Cell", "plain", (5, 4), rand(3, 5))
    case(f"{name}Cell", "state", (5, 4), lambda s=cell_state: (torch.randn(3, 5), s(3)), bias=False)
    case(f"{name}Cell", "double", (5, 4), rand(3, 5, dtype=torch.float64), device="cpu", dtype=torch.float64)
    case(f"{name}Cell", "unbatched", (5, 4), rand(5))
case("RNN", "relu", (5, 4), rand(6, 3, 5), nonlinearity="relu", num_layers=2)
case("RNNCell", "relu", (5, 4), rand(3, 5), nonlinearity="relu")
case("LSTM", "projected", (5, 4), rand(6, 3, 5), num_layers=2, bidirectional=True, proj_size=3)

# --- embedding ------------------------------------------------------------------------------------


def indices(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randint(0, 10, shape),)


case("Embedding", "plain", (10, 4), indices(3, 5))
case("Embedding", "padding", (10, 4), indices(7), padding_idx=2, scale_grad_by_freq=True)
case("Embedding", "norm", (10, 4), indices(7), max_norm=0.5, norm_type=1.0)
case("Embedding", "double", (10, 4), indices(7), device="cpu", dtype=torch.float64)
case("EmbeddingBag", "plain", (10, 4), indices(3, 5))
case("EmbeddingBag", "sum", (10, 4), lambda: (torch.randint(0, 10, (7,)), torch.tensor([0, 3])), mode="sum")
case("EmbeddingBag", "max", (10, 4), indices(3, 5), mode="max", padding_idx=1)
case("EmbeddingBag", "norm", (10, 4), indices(3, 5), max_norm=0.5)
case(
    "EmbeddingBag",
    "weighted",
    (10, 4),
    lambda: (torch.randint(0, 10, (7,)), torch.tensor([0, 3, 7]), torch.rand(7)),
    mode="sum",
    include_last_offset=True,
)
case(
    "EmbeddingBag",
    "double",
    (10, 4),
    indices(3, 5),
    dtype=torch.float64,
    device="cpu",
    scale_grad_by_freq=True,
)

# --- attention ------------------------------------------------------------------------------------

SELF = lambda: (torch.randn(5, 3, 8),) * 3  # noqa: E731
CROSS = lambda: (torch.randn(5, 3, 8), *(torch.randn(6, 3, 8),) * 2)  # noqa: E731
CAUSAL = torch.triu(torch.full((5, 5), -torch.inf), 1)
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
case("MultiheadAttention", "self", (8, 2), SELF)
case("MultiheadAttention", "fused", (8, 2), SELF, {"need_weights": False})
case("MultiheadAttention", "cross", (8, 2), CROSS, {"average_attn_weights": False}, bias=False)
case(
    "MultiheadAttention",
    "batch-first",
    (8, 2),
    lambda: (torch.randn(3, 5, 8),) * 3,
    {"key_padding_mask": PADDED},
    batch_first=True,
)
case(
    "MultiheadAttention",
    "causal",
    (8, 2),
    SELF,
    {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
)
case(
    "MultiheadAttention",
    "causal-padded",
    (8, 2),
    SELF,
    {"attn_mask": -torch.inf == CAUSAL, "is_causal": True, "key_padding_mask": PADDED},
)
case(
    "MultiheadAttention",
    "masks",
    (8, 2),
    SELF,
    {"attn_mask": torch.linspace(-1, 1, 150).view(6, 5, 5), "key_padding_mask": PADDED.float()},
)
case(
    "MultiheadAttention",
    "masks-fused",
    (8, 2),
    SELF,
    {
        "attn_mask": torch.linspace(-1, 1, 150).view(6, 5, 5),
        "key_padding_mask": PADDED.float(),
        "need_weights": False,
    },
)
case(
    "MultiheadAttention",
    "extras",
    (8, 2),
    CROSS,
    {"key_padding_mask": torch.zeros(3, 6).bool()},
    add_bias_kv=True,
    add_zero_attn=True,
)
case(
    "MultiheadAttention",
    "extras-fused",
    (8, 2),
    CROSS,
    {"need_weights": False, "attn_mask": torch.zeros(5, 6)},
    add_bias_kv=True,
    add_zero_attn=True,
)
case(
    "MultiheadAttention",
    "widths",
    (8, 2),
    lambda: (torch.randn(5, 3, 8), torch.randn(6, 3, 4), torch.randn(6, 3, 7)),
    kdim=4,
    vdim=7,
)
case(
    "MultiheadAttention",
    "unbatched",
    (8, 2),
    lambda: (torch.randn(5, 8),) * 3,
    {"attn_mask": (-torch.inf == CAUSAL).expand(2, 5, 5), "key_padding_mask": PADDED[1]},
)
case(
    "MultiheadAttention",
    "unbatched-fused",
    (8, 2),
    lambda: (torch.randn(5, 8),) * 3,
    {"need_weights": False},
    batch_first=True,
)
case("MultiheadAttention", "dropout", (8, 2), SELF, dropout=0.4)
case(
    "MultiheadAttention",
    "double",
    (8, 2),
    lambda: (torch.randn(5, 3, 8).double(),) * 3,
    device="cpu",
    dtype=torch.float64,
)


def encoder(*, num_layers: int, norm: nn.Module | None = None, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, num_layers, norm, **kwargs)

    return build


for label, build, call in (
    ("plain", encoder(num_layers=2, norm=nn.LayerNorm(8)), {}),
    (
        "masked",
        encoder(num_layers=1, enable_nested_tensor=False, mask_check=False),
        {"src_key_padding_mask": PADDED},
    ),
):
    CASES.append(Example("torch.nn.TransformerEncoder", build, rand(3, 5, 8), keywords=call, label=label))
