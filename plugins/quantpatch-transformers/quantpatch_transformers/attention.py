"""Attention, which transformers' models call as a function from a registry.

No layer owns its operands, so no replacement of layers can quantize them. ``quantize_attention`` gives
each attention module quantizers for them, and switches the model to a function of the registry that uses
these.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from quantpatch import Recipe, TensorQuantizer, registry
from quantpatch.errors import ConversionError
from quantpatch.recipes import DEFAULT_RECIPE

__all__ = ["IMPLEMENTATION", "attention_is_quantized", "quantize_attention", "revert_attention"]

#: Name of the implementation in transformers' registry of attention functions.
IMPLEMENTATION = "quantpatch"

# The activations that attention multiplies: query with key, probabilities with value.
_OPERANDS = ("query", "key", "value", "probabilities")
_BEFORE = "_attention_before_quantpatch"
# Arguments of some models' attention that change its result, and that only functions of theirs know.
_REFUSED = ("block_indices", "cache", "indices", "sinks")


def quantize_attention(model: PreTrainedModel, recipe: str | Recipe | None = None) -> list[str]:
    """Quantizes both products of every attention in a model; calibrate it afterwards.

    The probabilities have to be formed for that, so this costs what transformers' ``"eager"``
    implementation costs. The model gets a copy of its config: the implementation is written there, and
    other models may have been built from the same one.

    Args:
        model: A model that takes its attention from transformers' registry.
        recipe: A recipe or its name, of which the descriptor for inputs is used; default int8.

    Returns:
        Qualified names of the attention modules.

    Raises:
        ConversionError: The model is done already, or has no attention from the registry; or the recipe
            leaves inputs float.
    """
    chosen = registry.recipe(DEFAULT_RECIPE if recipe is None else recipe)
    if chosen.input is None:
        raise ConversionError(
            f"recipe {chosen.name!r} leaves activations float, and attention multiplies nothing else"
        )
    found = {name: module for name, module in model.named_modules() if takes_from_registry(module)}
    if not found:
        raise ConversionError(
            f"{type(model).__name__} does not take its attention from transformers' registry, so it cannot "
            f"be exchanged there; `quantpatch.audit` shows what computes it"
        )
    if attention_is_quantized(model):
        raise ConversionError(f"the attention of {type(model).__name__} is quantized already")
    _give_configs_of_its_own(model)
    setattr(model, _BEFORE, model.config._attn_implementation)
    for module in found.values():
        for operand in _OPERANDS:
            quantizer = TensorQuantizer(chosen.input.for_channel_axis(None))
            module.add_module(f"{operand}_quantizer", quantizer.train(module.training))
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation(IMPLEMENTATION)
    return list(found)


def _give_configs_of_its_own(model: PreTrainedModel) -> None:
    copies: dict[int, Any] = {}  # so that what its modules share stays shared among them
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                vars(module)[name] = copy.deepcopy(value, copies)


def revert_attention(model: PreTrainedModel) -> None:
    """Undoes ``quantize_attention``: the quantizers are gone, and the implementation is what it was.

    Raises:
        ConversionError: There is nothing to undo.
    """
    before = vars(model).get(_BEFORE)
    if before is None:
        raise ConversionError(f"the attention of {type(model).__name__} is not quantized")
    for module in filter(takes_from_registry, model.modules()):
        for operand in _OPERANDS:
            module._modules.pop(f"{operand}_quantizer", None)
    model.set_attn_implementation(before)
    delattr(model, _BEFORE)


def attention_is_quantized(model: PreTrainedModel) -> bool:
    """Whether ``quantize_attention`` is in force."""
    return bool(model.config._attn_implementation == IMPLEMENTATION)


def takes_from_registry(module: nn.Module) -> bool:
    """Whether a module calls a function of transformers' registry of attention functions."""
    forward: Any = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with every operand quantized, with the signature of transformers' registry.

    Args:
        module: The attention module, which holds the quantizers.
        query: Of shape (batch, heads, length, features).
        key: Of shape (batch, key heads, key length, features), like ``value``.
        value: See ``key``.
        attention_mask: Added to the scores, or None.
        scaling: Factor of the scores; default one over the root of the number of features.
        dropout: Probability with which a probability is dropped.
        position_bias: Added to the scores.
        softcap: Bound that scores approach, ``softcap * tanh(scores / softcap)``.
        s_aux: Attention sinks: for each head the score of a position that takes part in the softmax and has
            no value.
        **kwargs: What other implementations take.

    Returns:
        The output, of shape (batch, length, heads, features), and the probabilities.

    Raises:
        ConversionError: Something is asked for that would silently change the result if left out.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise ConversionError(f"quantized attention has no {name!r}, which {type(module).__name__} needs")
    groups = query.shape[1] // key.shape[1]
    quantize: Any = module  # its quantizers are found by name
    query = quantize.query_quantizer(query)
    key = quantize.key_quantizer(key).repeat_interleave(groups, dim=1)
    value = quantize.value_quantizer(value).repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for bias in (position_bias, attention_mask):
        if bias is not None:
            scores = scores + bias[..., : key.shape[2]]
    if s_aux is None:
        probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    else:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
        scores = torch.cat([scores, sinks], dim=-1)
        scores = scores - scores.amax(dim=-1, keepdim=True)  # as GPT-OSS does, to the bit
        probabilities = scores.softmax(-1, dtype=scores.dtype)[..., :-1]
    probabilities = quantize.probabilities_quantizer(probabilities)
    dropped = nn.functional.dropout(probabilities, dropout, module.training)
    return (dropped.to(value.dtype) @ value).transpose(1, 2).contiguous(), probabilities
