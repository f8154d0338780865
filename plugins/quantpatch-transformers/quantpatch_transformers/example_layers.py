"""An example of each layer that this plugin replaces, for the conformance kit."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantpatch.plugins import Example

__all__ = ["examples_of"]

_TOKENS, _HIDDEN, _INNER, _COUNT, _CHOICES = 12, 8, 12, 4, 2  # kernels want multiples of 4


class _Config:
    """Answers what any class of experts asks its configuration, whatever the model calls it."""

    _experts_implementation = "eager"
    hidden_act = activation = hidden_activation = mlp_hidden_act = "silu"
    swiglu_limit = limit = 7.0
    swiglu_alpha = alpha = 1.702
    mlp_gate_softcap = 5.0
    post_norm_eps = 1e-6

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "bias" in name or "latent" in name:
            return None
        if "per_tok" in name or "top_k" in name or "topk" in name:
            return _CHOICES
        if "expert" in name and "size" not in name and "dim" not in name:
            return _COUNT
        if "intermediate" in name or "ffn" in name or "inner" in name:
            return _INNER
        if "hidden" in name or "dim" in name or "d_model" in name:
            return _HIDDEN
        return 1.5  # a limit, a factor


def _filled(layer: nn.Module) -> nn.Module:
    """A layer whose parameters the model fills, and not its own constructor."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def _routed() -> tuple[Tensor, Tensor, Tensor]:
    weights, indices = torch.rand(_TOKENS, _COUNT).topk(_CHOICES, dim=-1)
    return torch.randn(_TOKENS, _HIDDEN), indices, weights


def _module(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}"


def _experts(dotted: str) -> Example:
    model, _, name = dotted.partition(".")

    def build() -> nn.Module:
        return _filled(getattr(importlib.import_module(_module(model)), name)(_Config()))

    return Example(f"{_module(model)}.{name}", build, _routed)


def _llama4() -> Example:
    def build() -> nn.Module:
        config = transformers.Llama4TextConfig(
            hidden_size=_HIDDEN, intermediate_size=_INNER, num_local_experts=_COUNT
        )
        return _filled(importlib.import_module(_module("llama4")).Llama4TextExperts(config))

    return Example(f"{_module('llama4')}.Llama4TextExperts", build, lambda: (torch.randn(12, _HIDDEN),))


def _jetmoe() -> Example:
    def build() -> nn.Module:
        layers = importlib.import_module(_module("jetmoe"))
        return _filled(layers.JetMoeParallelExperts(_COUNT, _HIDDEN, _INNER))

    def inputs() -> tuple[Tensor, list[int]]:
        return torch.randn(_TOKENS, _HIDDEN), [3, 4, 1, 4]

    return Example(f"{_module('jetmoe')}.JetMoeParallelExperts", build, inputs)


def _conv1d() -> Conv1D:
    return Conv1D(4, 6)  # type: ignore[no-untyped-call]


def examples_of(experts: Iterable[str]) -> Iterator[Example]:
    """An example of each layer that has a replacement.

    Args:
        experts: Classes of experts, as ``"model.Class"``.
    """
    yield Example("transformers.pytorch_utils.Conv1D", _conv1d, lambda: (torch.randn(2, 3, 6),))
    yield _llama4()
    yield _jetmoe()
    yield from map(_experts, experts)
