"""Parameters by pattern, for optimizers; weights replaced by their quantized values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pytorch_quantization.utils.quantized_weights import joined, quantized_weights

__all__ = ["freeze_parameters", "group_parameters", "match_parameters", "quant_weight_inplace"]


def match_parameters(model: nn.Module, patterns: Sequence[str]) -> Iterator[nn.Parameter]:
    """The parameters in whose names one of the patterns is found.

    Args:
        model: The model.
        patterns: Regular expressions, searched for anywhere in a name.

    Yields:
        Each parameter once.
    """
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in patterns):
            yield parameter


def group_parameters(
    model: nn.Module,
    patterns_list: Sequence[Sequence[str]],
    lrs: Sequence[float | None] | None = None,
    momentums: Sequence[float | None] | None = None,
    weight_decays: Sequence[float | None] | None = None,
) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer.

    Args:
        model: The model.
        patterns_list: For each group the patterns of :func:`match_parameters`.
        lrs: A learning rate for each group; None, also in place of one, leaves it to the optimizer.
        momentums: The same of momentum.
        weight_decays: The same of weight decay.

    Returns:
        What an optimizer takes as its first argument.

    Raises:
        TypeError: ``patterns_list`` is not a list of lists, or an option does not have as many values
            as there are groups.
    """
    if isinstance(patterns_list, str) or any(isinstance(patterns, str) for patterns in patterns_list):
        raise TypeError(
            f"patterns_list must be list of list of patterns, such as [['conv1'], ['fc']]; got "
            f"{patterns_list!r}"
        )
    options = {"lr": lrs, "momentum": momentums, "weight_decay": weight_decays}
    for key, values in options.items():
        if values is not None and len(values) != len(patterns_list):
            raise TypeError(
                f"len({key}s) must match len(patterns_list): got {len(values)} values for "
                f"{len(patterns_list)} groups of parameters"
            )
    groups: list[dict[str, Any]] = [
        {"params": list(match_parameters(model, patterns))} for patterns in patterns_list
    ]
    for key, values in options.items():
        for group, value in zip(groups, values or [None] * len(groups), strict=True):
            if value is not None:
                group[key] = value
    return groups


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes parameters out of training: ``requires_grad = False``.

    Args:
        model: The model.
        patterns: As in :func:`match_parameters`.
    """
    for parameter in match_parameters(model, patterns):
        parameter.requires_grad = False


@torch.no_grad()
def quant_weight_inplace(model: nn.Module) -> None:
    """Replaces the weights of quantized layers by their quantized values.

    Args:
        model: The model.
    """
    for quantizer, parts in quantized_weights(model):
        quantized = quantizer(joined(parts))
        if len(parts) == 1:
            parts[0].copy_(quantized)
        else:
            for part, values in zip(parts, quantized.split([p.shape[1] for p in parts], 1), strict=True):
                part.copy_(values)
