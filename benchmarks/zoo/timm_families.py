"""The smallest model of every family of timm."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.zoo.measure import Row, Subject, lively, torchvision_of_any_torch

# Sizes of images to try before that which a model was made for.
_SIZES = (64, 112, 128, 224, 256)
# Smaller images are a single place deep inside, which a norm makes zeros of: nothing to calibrate on.
_LEAST = {"csatv2": 256}

# The smallest by number of parameters, in timm 1.0.31; of other families it is looked for, in a while.
_SMALLEST = """
beit:beit_base_patch16_224 byoanet:halonet_h1 byobnet:test_byobnet cait:cait_xxs24_224 coat:coat_tiny
convit:convit_tiny convmixer:convmixer_768_32 convnext:test_convnext cpubone:cpubone_nano
crossvit:crossvit_tiny_240 csatv2:csatv2 cspnet:cs3darknet_focus_s cspnext:cspnext_tiny davit:davit_tiny
deepseek_vit:deepseek_vit_412m deit:deit_tiny_patch16_224 densenet:densenet121 dla:dla46x_c dpn:dpn48b
edgenext:edgenext_xx_small efficientformer:efficientformer_l1 efficientformer_v2:efficientformerv2_s0
efficientnet:test_efficientnet efficientvim:efficientvim_m1 efficientvit_mit:efficientvit_b0
efficientvit_msra:efficientvit_m0 eva:vit_tiny_patch16_dinov3_qkvb fasternet:fasternet_t0
fastvit:fastvit_t8 focalnet:focalnet_tiny_srf gcvit:gcvit_xxtiny gemma4_vit:gemma4_vit_167m
ghostnet:ghostnet_050 hardcorenas:hardcorenas_b hgnet:hgnetv2_b0 hiera:hiera_tiny_224
hieradet_sam2:sam2_hiera_tiny hrnet:hrnet_w18_small iformer:iformer_t inception_next:inception_next_atto
inception_resnet_v2:inception_resnet_v2 inception_v3:inception_v3 inception_v4:inception_v4
lcnetv2:lcnetv2_small levit:levit_128s lowformer:lowformer_b0 mambaout:test_mambaout
maxxvit:test_coatnet metaformer:poolformerv2_s12 mlp_mixer:gmlp_ti16_224
mobilenetv3:mobilenetv3_small_050 mobilenetv5:mobilenetv5_base mobilevit:mobilevit_xxs
mvitv2:mvitv2_tiny naflexvit:naflexvit_base_patch16_parfac_gap nasnet:nasnetalarge nest:nest_tiny
nextvit:nextvit_small nfnet:test_nfnet pit:pit_ti_224 pnasnet:pnasnet5large pvt_v2:pvt_v2_b0
qwen3_vit:qwen3_vit_88m rdnet:rdnet_tiny regnet:regnetx_002 repghost:repghostnet_050 repvit:repvit_m1
res2net:res2next50 resnest:resnest14d resnet:test_resnet resnetv2:resnetv2_18 rexnet:rexnet_100
selecsls:selecsls42 senet:legacy_seresnet18 sequencer:sequencer2d_s shvit:shvit_s1 sknet:skresnet18
starnet:starnet_s050 swiftformer:swiftformer_xs swin_transformer:swin_tiny_patch4_window7_224
swin_transformer_v2:swinv2_tiny_window8_256 swin_transformer_v2_cr:swinv2_cr_tiny_224
tiny_vit:tiny_vit_5m_224 tnt:tnt_s_legacy_patch16_224 tresnet:tresnet_m twins:twins_svt_small vgg:vgg11
visformer:visformer_tiny vision_transformer:test_vit vision_transformer_hybrid:vit_tiny_r_s16_p8_224
vision_transformer_relpos:test_vit_relpos vision_transformer_sam:samvit_base_patch16_224
vitamin:vitamin_small_224 volo:volo_d1_224 vovnet:ese_vovnet19b_slim_dw xception:legacy_xception
xception_aligned:xception41p xcit:xcit_nano_12_p8_224
"""


@functools.cache
def _timm() -> Any:
    with torchvision_of_any_torch():
        import timm
    return timm


def names() -> list[str]:
    """Every family of timm."""
    found: list[str] = _timm().list_modules()
    return found


def _smallest(timm: Any, family: str) -> str:
    """The model of a family with the fewest parameters."""
    names = timm.list_models(module=family)
    known = dict(pair.split(":") for pair in _SMALLEST.split()).get(family)
    if known is not None and known in names:
        return known
    counts: dict[str, int] = {}
    for name in names:
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
    return min(counts, key=lambda name: counts[name])


def subject(row: Row) -> Subject:
    """A family's smallest model with the smallest images that it takes."""
    timm = _timm()
    row.model = _smallest(timm, row.family)
    with torch.device("meta"):
        settings: Any = timm.create_model(row.model, pretrained=False).pretrained_cfg
    native: int = settings["input_size"][-1]
    fixed = settings.get("fixed_input_size")
    for size in (*(size for size in _SIZES if _LEAST.get(row.model, 0) <= size < native), native):
        options = {"img_size": size} if fixed and size != native else {}
        try:
            if options:
                with torch.device("meta"):
                    timm.create_model(row.model, pretrained=False, **options)
            torch.manual_seed(0)
            model = lively(timm.create_model(row.model, pretrained=False, **options))
            found = Subject(
                model,
                functools.partial(timm.create_model, row.model, pretrained=False, **options),
                (torch.randn(1, 3, size, size),),
            )
            found.run(model)
            return found
        except Exception:
            if size == native:
                raise
    raise AssertionError
