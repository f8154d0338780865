"""Every text architecture of transformers that can be built from a small config."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.measure import Row, Subject, Unbuilt, lively, torchvision_of_any_torch

# Configs name the same things differently: what a config has of these is made small.
_SMALL: dict[int, str] = {
    99: "vocab_size",
    64: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_inner hidden_dim "
    "max_position_embeddings n_positions ffn_hidden_size",
    32: "hidden_size d_model n_embd embed_dim dim emb_dim embedding_size moe_intermediate_size "
    "shared_expert_intermediate_size word_embed_proj_dim attention_hidden_size lru_width",
    16: "kv_lora_rank q_lora_rank mamba_d_head",
    8: "head_dim d_kv d_head qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state "
    "linear_key_head_dim linear_value_head_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_local_experts num_experts n_routed_experts attention_window block_size moe_num_experts rotary_dim "
    "rotary_ndims mamba_n_heads n_mamba_heads ssm_num_heads linear_num_value_heads",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers "
    "num_key_value_heads num_experts_per_tok n_group type_vocab_size mamba_expand linear_num_key_heads "
    "eos_token_id decoder_start_token_id",
    1: "topk_group first_k_dense_replace bos_token_id num_random_blocks n_shared_experts",
    0: "pad_token_id",
}
# What a config may be too particular about; left as it is, one after the other, until the model is built.
_KEPT: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("head_dim", "num_key_value_heads"),
    ("pad_token_id", "bos_token_id", "eos_token_id"),
    ("layer_types",),
    ("d_inner", "n_inner"),
    ("hidden_size", "intermediate_size"),
    ("embedding_size",),
)
_LARGEST = 20_000_000  # parameters; a config that stays larger has sizes that nothing above names


@functools.cache
def _classes() -> dict[str, tuple[str, bool]]:
    """Name of the class for each type of model, and whether it takes a decoder's tokens."""
    from transformers.models.auto import modeling_auto as auto

    causal: dict[str, Any] = dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    pairs: dict[str, Any] = dict(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    masked: dict[str, Any] = dict(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    found = {}
    for name in sorted({*causal, *pairs, *masked}):
        cls: Any = causal.get(name) or pairs.get(name) or masked[name]
        found[name] = (cls if isinstance(cls, str) else cls[0], name in pairs and name not in causal)
    return found


def names() -> list[str]:
    """Every type of text model."""
    return list(_classes())


def _configs(cls: Any) -> Iterator[Any]:
    """Small configs, from the smallest to those that keep more of what is usual."""
    usual = cls()
    small: dict[str, Any] = {
        name: size for size, names in _SMALL.items() for name in names.split() if hasattr(usual, name)
    }
    if getattr(usual, "layer_types", None) is not None:
        small["layer_types"] = (list(dict.fromkeys(usual.layer_types)) * 2)[:2]
    for kept in _KEPT:
        try:
            yield cls(**{name: size for name, size in small.items() if name not in kept})
        except Exception:  # noqa: PERF203 - each config checks what it is given in its own way
            continue


def _built(cls: Any, config: Any, kwargs: dict[str, Tensor]) -> Subject:
    """A model that a config gives, which ran."""

    def build() -> nn.Module:
        own = copy.deepcopy(config)
        own.use_cache = False  # a cache is an output that no exporter knows
        model: nn.Module = cls(own)
        return model

    with torch.device("meta"):
        size = sum(p.numel() for p in build().parameters())
    if size > _LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    twin = lively(build())  # a router of zeros has ties, which runtimes break otherwise
    found = Subject(twin, build, kwargs=kwargs)
    if not found.run(found.twin).isfinite().all():
        raise ValueError("its output is not finite")
    return found


def subject(row: Row) -> Subject:
    """A small model of a type."""
    with torchvision_of_any_torch(), suppress(ImportError):
        importlib.import_module("torchvision")  # as transformers does where it is there
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    row.model, pair = _classes()[row.family]
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    kwargs = {"input_ids": ids, **({"decoder_input_ids": ids} if pair else {})}
    try:
        cls = getattr(transformers, row.model)
        configs = list(_configs(CONFIG_MAPPING[row.family]))
    except Exception as error:
        raise Unbuilt(f"{type(error).__name__}: {error}") from error
    reason = "no config is small"
    for config in configs:
        try:
            return _built(cls, config, kwargs)
        except TimeoutError:  # noqa: PERF203
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    raise Unbuilt(reason)
