"""The plugin itself: what it replaces, named as text.

quantpatch imports this module whenever it lists plugins, so it is one of its own, beside the package, and
brings neither the package nor transformers along.
"""

from __future__ import annotations

from collections.abc import Iterable

from quantpatch.plugins import Entry, Example, hookimpl

__all__ = [
    "EXPERTS",
    "quantpatch_entries",
    "quantpatch_examples",
]

# Classes that hold their experts' weights in one parameter each and keep to the contract of transformers'
# registry of experts functions, as "model.Class" for transformers.models.model.modeling_model.Class.
EXPERTS = tuple(
    """
    afmoe.AfmoeExperts aria.AriaExperts axk1.AXK1Experts axk2.AXK2Experts
    bailing_hybrid.BailingHybridExperts beam.BeamExperts cohere2_moe.Cohere2MoeExperts
    deepseek_ocr2.DeepseekOcr2TextExperts deepseek_v2.DeepseekV2Experts deepseek_v3.DeepseekV3Experts
    deepseek_v32.DeepseekV32Experts deepseek_v4.DeepseekV4Experts
    diffusion_gemma.DiffusionGemmaTextExperts dots1.Dots1Experts dots3_note.Dots3NoteExperts
    ernie4_5_moe.Ernie4_5_MoeExperts ernie4_5_vl_moe.Ernie4_5_VLMoeMoeExperts
    exaone_moe.ExaoneMoeExperts flex_olmo.FlexOlmoExperts flint.FlintExperts gemma4.Gemma4TextExperts
    glm4_moe.Glm4MoeExperts glm4_moe_lite.Glm4MoeLiteExperts glm4v_moe.Glm4vMoeTextExperts
    glm5_next.Glm5NextTextExperts glm_moe_dsa.GlmMoeDsaExperts gpt_oss.GptOssExperts
    granitemoe.GraniteMoeExperts granitemoe_swa.GraniteMoeSWAExperts
    granitemoehybrid.GraniteMoeHybridExperts granitemoeshared.GraniteMoeSharedExperts
    hunyuan_v1_moe.HunYuanMoEV1Experts hy_v3.HYV3Experts hy_v4.HYV4Experts hy_v4_vl.HYV4VLExperts
    inkling.InklingExperts inkling2.Inkling2Experts inkling2_loop.Inkling2LoopExperts jamba.JambaExperts
    kimi_linear.KimiLinearExperts kolibri1.Kolibri1Experts laguna.LagunaExperts
    lara_mini.LaraMiniExperts lfm2_moe.Lfm2MoeExperts mellum.MellumExperts
    mimo_v2_flash.MiMoV2FlashExperts minimax.MiniMaxExperts minimax_m2.MiniMaxM2Experts
    minimax_m3_vl.MiniMaxM3VLExperts mistral4.Mistral4Experts mistral_large4.MistralLarge4TextExperts
    mixtral.MixtralExperts muse_spark.MuseSparkExperts nemotron_h.NemotronHExperts olmoe.OlmoeExperts
    openai_privacy_filter.OpenAIPrivacyFilterExperts phimoe.PhimoeExperts qwen2_moe.Qwen2MoeExperts
    qwen3_5_moe.Qwen3_5MoeExperts qwen3_moe.Qwen3MoeExperts qwen3_next.Qwen3NextExperts
    qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts qwen3_omni_moe.Qwen3OmniMoeThinkerTextExperts
    qwen3_vl_moe.Qwen3VLMoeTextExperts qwen4_exp.Qwen4ExpTextExperts solar_open.SolarOpenExperts
    step3p7.Step3p7Experts unlimited_ocr.UnlimitedOcrTextExperts zaya.ZayaExperts
    """.split()  # noqa: SIM905 (a list would be twice as long)
)

# What has a replacement written for it: module, class, and module of the replacement here.
_OWN = (
    ("pytorch_utils", "Conv1D", "conv1d"),
    ("models.jetmoe.modeling_jetmoe", "JetMoeParallelExperts", "jetmoe"),
    ("models.llama4.modeling_llama4", "Llama4TextExperts", "llama4"),
)


@hookimpl
def quantpatch_entries() -> Iterable[Entry]:
    """Layers of transformers' own, and how ``from_pretrained`` finds ranges.

    Which classes there are depends on the version of transformers, so none of them has to exist.
    """
    for module, name, own in _OWN:
        yield Entry(
            f"transformers.{module}", name, f"quantpatch_transformers.{own}:Quant{name}", optional=True
        )
    # from_pretrained calls it: inside a block the checkpoint's ranges are read along with its weights.
    from_pretrained = "quantpatch_transformers.pretrained:get_hf_quantizer"
    yield Entry(
        "transformers.modeling_utils", "get_hf_quantizer", from_pretrained, optional=True, reported=False
    )
    for model, _, name in (each.partition(".") for each in EXPERTS):
        module = f"transformers.models.{model}.modeling_{model}"
        yield Entry(module, name, f"quantpatch_transformers.experts:Quant{name}", optional=True)


@hookimpl
def quantpatch_examples() -> Iterable[Example]:
    """How to build each of them, for the conformance kit."""
    from quantpatch_transformers.example_layers import examples_of  # imports transformers

    return examples_of(EXPERTS)
