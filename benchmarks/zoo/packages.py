"""Small models of packages that people build models with, each with habits of its own in writing forwards."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from benchmarks.zoo.measure import Row, Subject, Unbuilt, lively, torchvision_of_any_torch


@attrs.frozen
class _Model:
    """A class of a package, what it is called with, and the shapes or values of its inputs."""

    path: str
    options: Mapping[str, Any]
    inputs: tuple[tuple[int, ...] | Tensor, ...]

    def build(self) -> nn.Module:
        module, _, name = self.path.partition(":")
        found = importlib.import_module(module)
        options = {name: value() if callable(value) else value for name, value in self.options.items()}
        torch.manual_seed(0)
        model: nn.Module = getattr(found, name)(**options)
        return model


def _x_transformer(name: str, **options: Any) -> Callable[[], Any]:
    def made() -> Any:
        layers = getattr(importlib.import_module("x_transformers"), name)
        return layers(dim=32, depth=2, heads=2, attn_dim_head=16, **options)

    return made


_IMAGE = (1, 3, 32, 32)
_TOKENS = torch.arange(32).reshape(2, 16)
_STEP = torch.tensor([5])
_VIT: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 10,
    "dim": 32,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 64,
}
_UNET: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
_VOLUMES: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_EDGES = torch.tensor([[0, 1, 2, 3, 4, 1], [1, 2, 3, 4, 0, 0]])

_MODELS: dict[str, _Model] = {
    "diffusers_unet": _Model(
        "diffusers:UNet2DModel",
        _UNET
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        ((1, 3, 16, 16), _STEP),
    ),
    "diffusers_conditional_unet": _Model(
        "diffusers:UNet2DConditionModel",
        _UNET
        | {
            "cross_attention_dim": 32,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        ((1, 4, 16, 16), _STEP, (1, 7, 32)),
    ),
    "diffusers_autoencoder": _Model(
        "diffusers:AutoencoderKL",
        {"block_out_channels": (16,), "norm_num_groups": 8, "layers_per_block": 1},
        (_IMAGE,),
    ),
    "diffusers_dit": _Model(
        "diffusers:DiTTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 4,
        },
        ((1, 4, 8, 8), _STEP, torch.tensor([1])),
    ),
    **{
        f"segmentation_{name.lower()}": _Model(
            f"segmentation_models_pytorch:{name}",
            {"encoder_name": "resnet18", "encoder_weights": None, "classes": 2},
            ((2, 3, 64, 64),),
        )
        for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3Plus", "UPerNet")
    },
    **{
        f"vit_pytorch_{name}": _Model(f"vit_pytorch.{name}:{cls}", _VIT | more, (_IMAGE,))
        for name, cls, more in (
            ("simple_vit", "SimpleViT", {}),
            ("deepvit", "DeepViT", {}),
            ("cait", "CaiT", {"cls_depth": 1}),
            ("xcit", "XCiT", {"cls_depth": 1}),
            ("rvt", "RvT", {}),
            ("normalized_vit", "nViT", {"dim_head": 16}),
        )
    },
    "x_transformers_decoder": _Model(
        "x_transformers:TransformerWrapper",
        {
            "num_tokens": 100,
            "max_seq_len": 32,
            "attn_layers": _x_transformer(
                "Decoder", rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True, attn_qk_norm=True
            ),
        },
        (_TOKENS,),
    ),
    "x_transformers_encoder": _Model(
        "x_transformers:ViTransformerWrapper",
        {
            "image_size": 32,
            "patch_size": 8,
            "num_classes": 10,
            "attn_layers": _x_transformer("Encoder", attn_pre_talking_heads=True),
        },
        (_IMAGE,),
    ),
    "perceiver": _Model(
        "perceiver_pytorch:Perceiver",
        {
            "input_axis": 2,
            "num_freq_bands": 3,
            "max_freq": 10.0,
            "depth": 2,
            "num_latents": 8,
            "latent_dim": 32,
            "latent_heads": 2,
            "cross_dim_head": 16,
            "latent_dim_head": 16,
            "num_classes": 10,
        },
        ((1, 8, 8, 3),),
    ),
    "open_clip": _Model(
        "open_clip.model:CLIP",
        {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
            "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2},
        },
        ((2, 3, 32, 32), _TOKENS),
    ),
    "monai_unet": _Model(
        "monai.networks.nets:UNet",
        _VOLUMES | {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 1},
        ((1, 1, 32, 32),),
    ),
    "monai_swin_unetr": _Model(
        "monai.networks.nets:SwinUNETR",
        _VOLUMES | {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
        ((1, 1, 64, 64),),
    ),
    "monai_attention_unet": _Model(
        "monai.networks.nets:AttentionUnet",
        _VOLUMES | {"channels": (8, 16, 32), "strides": (2, 2)},
        ((1, 1, 32, 32),),
    ),
    **{
        f"torch_geometric_{name.lower()}": _Model(
            f"torch_geometric.nn:{name}",
            {"in_channels": 8, "hidden_channels": 16, "num_layers": 2, "out_channels": 3},
            ((5, 8), _EDGES),
        )
        for name in ("GCN", "GAT", "GraphSAGE")
    },
}


def names() -> list[str]:
    """Every model."""
    return list(_MODELS)


def subject(row: Row) -> Subject:
    """A model."""
    model = _MODELS[row.family]
    row.model = model.path
    try:
        with torchvision_of_any_torch():
            twin = lively(model.build())
        inputs = tuple(x if isinstance(x, Tensor) else torch.randn(x) for x in model.inputs)
        found = Subject(twin, functools.partial(_Model.build, model), inputs)
        found.run(twin)
    except Exception as error:
        raise Unbuilt(f"{type(error).__name__}: {error}") from error
    return found
