"""What rewritten code calls: quantized operands, and attention in the open, as runtimes will see it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantpatch.layers.operations.facts import report_unquantized

Quantize = Callable[[Tensor], Tensor]


def softmax_of_visible(scores: Tensor) -> Tensor:
    """Softmax over the last axis, as in torch's attention: 0 where a mask hides every key by ``-inf``.

    Nor is the gradient NaN there: such rows go through softmax as zeros.
    """
    hidden = scores.detach().amax(dim=-1, keepdim=True) == -math.inf
    return scores.masked_fill(hidden, 0.0).softmax(dim=-1).masked_fill(hidden, 0.0)


def attend(
    quantize: Quantize | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``, whose arguments these are, with quantized probabilities.

    They are quantized before dropout.

    Args:
        quantize: What quantizes the probabilities; None leaves them float, within torch's fused kernel.
        query: Of shape (..., heads, length, features).
        key: Of shape (..., key heads, key length, features), like ``value``.
        value: See ``key``.
        attn_mask: Added to the scores, or of booleans: False hides a key.
        dropout_p: Probability with which a probability is dropped.
        is_causal: Whether a position attends to none after it.
        scale: Factor of the scores; default one over the root of the number of features.
        enable_gqa: Whether several heads share one of ``key`` and ``value``.
    """
    if quantize is None:
        # Not said where it is not asked for: before torch 2.5 there was none.
        shared = {"enable_gqa": True} if enable_gqa else {}
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **shared
        )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        masks = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if masks else scores + attn_mask
    is_masked = is_causal or attn_mask is not None
    probabilities = quantize(softmax_of_visible(scores) if is_masked else scores.softmax(-1))
    return F.dropout(probabilities, dropout_p) @ value


def attend_quantized(
    layer: Any,
    names: tuple[str | None, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """``F.scaled_dot_product_attention`` inside a forward, with the operands of both products quantized.

    With the quantizer of the probabilities off, torch's fused kernel is used, as in float.

    Args:
        layer: Holds the quantizers.
        names: Theirs, for query, key, value and probabilities; None leaves one float.
        query: As that function's, like the rest.
        key: See there.
        value: See there.
        *args: See there.
        **kwargs: See there.
    """
    of_query, of_key, of_value, of_probabilities = names
    query = query if of_query is None else quantized(layer, of_query, query)
    key = key if of_key is None else quantized(layer, of_key, key)
    value = value if of_value is None else quantized(layer, of_value, value)
    quantizer = layer._modules.get(of_probabilities)
    is_active = quantizer is not None and quantizer.is_active
    return attend(quantizer if is_active else None, query, key, value, *args, **kwargs)


def quantized(layer: Any, name: str, value: Any, batch_axis: int | None = 0) -> Any:
    """A value, quantized by a layer's quantizer of that name, if there is one.

    Of a list or tuple each tensor is. What is not a dense floating-point tensor passes as it is.

    Args:
        layer: Holds the quantizer.
        name: Its own.
        value: A tensor or something else.
        batch_axis: As of a quantizer: None for a weight.
    """
    quantizer = layer._modules.get(name)
    if quantizer is None:
        return value
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.layout is torch.strided:
            return quantizer(value, batch_axis=batch_axis)
        report_unquantized(layer, name, value)
        return value
    if type(value) in (list, tuple):
        return type(value)(quantized(layer, name, each, batch_axis) for each in value)
    return value


def quantized_weight(layer: Any, name: str, value: Any) -> Any:
    """The same of what is made of the layer's own tensors."""
    return quantized(layer, name, value, None)
