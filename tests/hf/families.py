"""Tiny random models of the families that the patch layer knows: one table, one row a family.

Weights have scale 1.5 / sqrt(fan_in): with transformers' default initialisation the tokens hardly depend on the experts.
"""

from __future__ import annotations

import copy
import functools
import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Every spelling that configs use for the sizes; a config ignores the ones it does not know.
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 3, "moe_topk": 3, "moe_k": 3, "top_k_experts": 3,
    "num_shared_experts": 1, "n_shared_experts": 1, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1,
    "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1, "max_position_embeddings": 128,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family: its model class, what its config needs besides SIZES, and what patching it must give.

    experts, router, mla: number of patched modules of each kind. skipped: kind -> a part of the reason that must be reported.
    config_class: where it is not the model's own (text models of multimodal families). directory: in transformers, when
    it is not the key in the table. generates: False for models without a language-model head.
    idle: MoE layers that text does not reach (experts for images).
    """

    model: str
    experts: int = 2
    router: int = 2
    mla: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_class: str | None = None
    directory: str | None = None
    generates: bool = True
    idle: int = 0


_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["sparse", "sparse"],
    "linear_head_dim": 8, "linear_num_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "num_mtp_layers": 0,
}  # fmt: skip
_SPARSE = {"mlp_layer_types": ["sparse", "sparse"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}
_JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
_INDEXER = {"mla": "a sparse indexer"}

FAMILIES: dict[str, Family] = {
    "afmoe": Family("AfmoeForCausalLM", 1, 1),
    "aria": Family("AriaTextForCausalLM", config_class="AriaTextConfig", generates=False),
    "axk1": Family("AXK1ForCausalLM", mla=2),
    "axk2": Family("AXK2ForCausalLM", skipped=_INDEXER, config={"n_group": None, "topk_group": None}),
    "axk2_grouped": Family("AXK2ForCausalLM", 2, 0, skipped={**_INDEXER, "router": "masked groups keep score 0"}, directory="axk2"),
    "bailing_hybrid": Family("BailingHybridForCausalLM", mla=1, config=_HYBRID),
    "beam": Family("BeamForCausalLM", config=_SPARSE),
    "cohere2_moe": Family("Cohere2MoeForCausalLM"),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", mla=2, config={"topk_method": "group_limited_greedy", "q_lora_rank": None}),
    "deepseek_v2_greedy": Family("DeepseekV2ForCausalLM", mla=2, config={"topk_method": "greedy"}, directory="deepseek_v2"),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", mla=2),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", skipped=_INDEXER),
    "deepseek_v4": Family("DeepseekV4ForCausalLM", config={"layer_types": ["sliding_attention"] * 2, "mlp_layer_types": ["hash_moe", "moe"]}),
    "deepseek_ocr2": Family("DeepseekOcr2TextModel", config_class="DeepseekOcr2TextConfig", config={**_SPARSE, "topk_method": "greedy"}, generates=False),
    "dots1": Family("Dots1ForCausalLM"),
    "dots3_note": Family("Dots3NoteTextModel", skipped=_INDEXER, config_class="Dots3NoteTextConfig", generates=False),
    "ernie4_5_moe": Family("Ernie4_5_MoeForCausalLM", 1, 1),
    "ernie4_5_vl_moe": Family("Ernie4_5_VLMoeTextModel", 4, 4, config_class="Ernie4_5_VLMoeTextConfig", config={**_SPARSE, "moe_intermediate_size": [24, 16], "rope_parameters": _MROPE}, idle=2, generates=False),
    "exaone_moe": Family("ExaoneMoeForCausalLM"),
    "flex_olmo": Family("FlexOlmoForCausalLM"),
    "flint": Family("FlintForCausalLM", config={"mlp_only_layers": []}),
    "gemma4": Family("Gemma4ForCausalLM", config_class="Gemma4TextConfig", config={"enable_moe_block": True, "hidden_size_per_layer_input": 0, "global_head_dim": 8, "num_kv_shared_layers": 0, "num_global_key_value_heads": 2}),
    "glm4_moe": Family("Glm4MoeForCausalLM"),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", 1, 1, 2),
    "glm4v_moe": Family("Glm4vMoeTextModel", config_class="Glm4vMoeTextConfig", config={"head_dim": 16, "rope_parameters": _MROPE}, generates=False),
    "glm5_next": Family("Glm5NextTextModel", skipped=_INDEXER, config_class="Glm5NextTextConfig", config={**_HYBRID, "qk_rope_head_dim": 0}, generates=False),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", skipped=_INDEXER),
    "gpt_oss": Family("GptOssForCausalLM"),
    "granitemoe": Family("GraniteMoeForCausalLM"),
    "granitemoe_swa": Family("GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": Family("GraniteMoeHybridForCausalLM", config={**_HYBRID, **_MAMBA}),
    "granitemoeshared": Family("GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1ForCausalLM"),
    "hy_v3": Family("HYV3ForCausalLM", 1, 1),
    "hy_v4": Family("HYV4ForCausalLM", 1, 1, skipped=_INDEXER),
    "inkling2": Family("Inkling2ForCausalLM", 0, 2, skipped={"experts": "_apply_gate"}, config_class="Inkling2TextConfig"),
    "jamba": Family("JambaForCausalLM", config={**_JAMBA, "use_mamba_kernels": False}),
    "kimi_linear": Family("KimiLinearForCausalLM", mla=1, config=_HYBRID),
    "kolibri1": Family("Kolibri1ForCausalLM"),
    "laguna": Family("LagunaForCausalLM", 1, 1),
    "lfm2_moe": Family("Lfm2MoeForCausalLM", config={"layer_types": ["conv", "full_attention"], "num_dense_layers": 0}),
    "longcat_flash": Family("LongcatFlashForCausalLM", 0, 1, 2, skipped={"experts": "does not go through"}),
    "mellum": Family("MellumForCausalLM"),
    "mimo_v2_flash": Family("MiMoV2FlashForCausalLM", config={**_SPARSE, "head_dim": 16, "layer_types": ["full_attention"] * 2}),
    "minicpm3": Family("MiniCPM3ForCausalLM", 0, 0, 2),
    "minimax": Family("MiniMaxForCausalLM"),
    "minimax_m2": Family("MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": Family("MiniMaxM3VLForCausalLM", config_class="MiniMaxM3VLTextConfig"),
    "mistral4": Family("Mistral4ForCausalLM", mla=2, config={"rope_parameters": _YARN}),
    "mistral_large4": Family("MistralLarge4TextModel", skipped=_INDEXER, config_class="MistralLarge4TextConfig", generates=False),
    "mixtral": Family("MixtralForCausalLM"),
    "muse_spark": Family("MuseSparkTextModel", 0, 2, skipped={"experts": "post_expert_norm"}, config_class="MuseSparkTextConfig", generates=False),
    "nemotron_h": Family("NemotronHForCausalLM", 1, 1),
    "olmoe": Family("OlmoeForCausalLM"),
    "openai_privacy_filter": Family("OpenAIPrivacyFilterModel", generates=False),
    "phimoe": Family("PhimoeForCausalLM", 2, 0, skipped={"router": "sparsemixer"}, config={"num_experts_per_tok": 2}),
    "qwen2_moe": Family("Qwen2MoeForCausalLM"),
    "qwen3_5_moe": Family("Qwen3_5MoeForCausalLM", config=_HYBRID, config_class="Qwen3_5MoeTextConfig"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM"),
    "qwen3_next": Family("Qwen3NextForCausalLM", config=_HYBRID),
    "qwen3_vl_moe": Family("Qwen3VLMoeTextModel", config_class="Qwen3VLMoeTextConfig", generates=False),
    "solar_open": Family("SolarOpenForCausalLM"),
    "youtu": Family("YoutuForCausalLM", 0, 0, 2),
    "zaya": Family("ZayaForCausalLM", 2, 0, skipped={"router": "skips the layer"}, config={"num_experts_per_tok": 1}),
}  # fmt: skip


def _randomize(model: nn.Module) -> None:
    """Weights of scale 1.5 / sqrt(fan_in), correction biases large enough to change the selection."""
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if not parameter.dtype.is_floating_point or "inv_freq" in name:
            continue
        if name.endswith(("correction_bias", "expert_bias")):
            nn.init.uniform_(parameter, 0.0, 0.3)
        elif parameter.dim() >= 2:
            # Stacked experts are [E, out, in], or [E, in, out] in the classes that say so; near enough for a scale.
            nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)


@functools.cache
def _built(name: str) -> nn.Module:
    family = FAMILIES[name]
    directory = family.directory or name
    modeling = importlib.import_module(f"transformers.models.{directory}.modeling_{directory}")
    configuration = importlib.import_module(f"transformers.models.{directory}.configuration_{directory}")
    model_class = getattr(modeling, family.model)
    config_class = (
        getattr(configuration, family.config_class) if family.config_class else model_class.config_class
    )
    torch.manual_seed(len(name))
    with torch.no_grad():
        model = model_class(config_class(**{**SIZES, **family.config})).eval()
        _randomize(model)
    return model


def build(name: str, **config: Any) -> Any:
    """A fresh copy of the family's model (building takes longer than copying); `config` overrides on the copy."""
    model = copy.deepcopy(_built(name))
    for key, value in config.items():
        setattr(model.config, key, value)
    return model


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model in another dtype as from_pretrained loads it: some classes keep some modules in fp32."""
    model.to(dtype)
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if parameter.dtype == dtype and any(part in name for part in kept):
            parameter.data = parameter.data.float()
    return model


def prompt(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(7))


def generate(model: Any, ids: torch.Tensor, new_tokens: int = 8, **kwargs: Any) -> torch.Tensor:
    """Greedy tokens; the pad and end tokens are ruled out, so that every row has them all."""
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                              do_sample=False, **kwargs)  # fmt: skip


def outputs(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Logits [B, S, vocabulary], or the last hidden states of a model without a head."""
    with torch.no_grad():
        out = model(ids, **kwargs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state
