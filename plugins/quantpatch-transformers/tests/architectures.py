"""Architectures of transformers, small and without weights from anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
import transformers

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.randint(0, 99, (2, 12), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones(2, 12, dtype=torch.long).index_put(
    (torch.tensor(1), torch.arange(8, 12)), torch.tensor(0)
)


def bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=99, **SMALL))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, **SMALL)
    )


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
    )


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def mamba():
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=8)
    )


GROUPED = {"vocab_size": 99, "num_key_value_heads": 2, **SMALL}


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=8, **GROUPED))


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **GROUPED))


def gpt_oss():
    config = transformers.GptOssConfig(head_dim=8, num_local_experts=4, num_experts_per_tok=2, **GROUPED)
    return transformers.GptOssForCausalLM(config)


def deepseek_v3():
    config = transformers.DeepseekV3Config(
        vocab_size=99,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        **SMALL,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def llama4():
    config = transformers.Llama4TextConfig(
        head_dim=8, num_local_experts=4, intermediate_size_mlp=64, interleave_moe_layer_step=1, **GROUPED
    )
    return transformers.Llama4ForCausalLM(config)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS}


@attrs.frozen
class Architecture:
    """One of them.

    Attributes:
        build: Makes it.
        inputs: What it runs on.
        share: The least share of multiply-accumulates that runs quantized without quantized attention.
        float_layers: Classes whose own functions do the rest.
    """

    build: Callable[[], Any]
    inputs: dict[str, Any]
    share: float
    float_layers: set[str]


MODELS = {
    "bert": Architecture(bert, {**TEXT, "attention_mask": PADDED}, 0.91, {"BertSelfAttention"}),
    "gpt2": Architecture(gpt2, TEXT, 0.94, {"GPT2Attention"}),
    "llama": Architecture(llama, TEXT, 0.93, {"LlamaAttention"}),
    "vit": Architecture(vit, {"pixel_values": IMAGES}, 0.91, {"ViTAttention"}),
    "whisper": Architecture(
        whisper, {"input_features": SOUND, "decoder_input_ids": IDS[:, :6]}, 0.91, {"WhisperAttention"}
    ),
    "t5": Architecture(t5, {**TEXT, "decoder_input_ids": IDS}, 0.90, {"T5Attention"}),
    "mamba": Architecture(mamba, TEXT, 0.90, {"MambaMixer"}),
    "qwen3": Architecture(qwen3, TEXT, 0.93, {"Qwen3Attention"}),
    "mixtral": Architecture(mixtral, TEXT, 0.94, {"MixtralAttention", "MixtralTopKRouter"}),
    "gpt_oss": Architecture(gpt_oss, TEXT, 0.94, {"GptOssAttention", "GptOssTopKRouter"}),
    "deepseek_v3": Architecture(deepseek_v3, TEXT, 0.91, {"DeepseekV3Attention", "DeepseekV3TopkRouter"}),
    "llama4": Architecture(llama4, TEXT, 0.97, {"Llama4TextAttention", "Llama4Router"}),
}
