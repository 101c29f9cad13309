"""Tiny random models of the families that the patch layer knows: one table, one row a family.

Weights have scale 1.5 / sqrt(fan_in): with transformers' default initialisation the tokens hardly depend on the experts.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
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

    experts, router, mla: number of patched modules of each kind.
    """

    model: str
    experts: int = 2
    router: int = 2
    mla: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    config_class: str | None = None


FAMILIES: dict[str, Family] = {
    "afmoe": Family("AfmoeForCausalLM", 1, 1),
    "axk1": Family("AXK1ForCausalLM", mla=2),
    "cohere2_moe": Family("Cohere2MoeForCausalLM"),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", mla=2, config={"topk_method": "group_limited_greedy", "q_lora_rank": None}),
    "deepseek_v2_greedy": Family("DeepseekV2ForCausalLM", mla=2, config={"topk_method": "greedy"}),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", mla=2),
    "deepseek_v4": Family("DeepseekV4ForCausalLM"),
    "dots1": Family("Dots1ForCausalLM"),
    "ernie4_5_moe": Family("Ernie4_5_MoeForCausalLM", 1, 1),
    "exaone_moe": Family("ExaoneMoeForCausalLM"),
    "flex_olmo": Family("FlexOlmoForCausalLM"),
    "glm4_moe": Family("Glm4MoeForCausalLM"),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", 1, 1, 2),
    "gpt_oss": Family("GptOssForCausalLM"),
    "granitemoe": Family("GraniteMoeForCausalLM"),
    "granitemoeshared": Family("GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Family("HunYuanMoEV1ForCausalLM"),
    "hy_v3": Family("HYV3ForCausalLM", 1, 1),
    "kolibri1": Family("Kolibri1ForCausalLM"),
    "laguna": Family("LagunaForCausalLM", 1, 1),
    "longcat_flash": Family("LongcatFlashForCausalLM", 0, 1, 2),
    "mellum": Family("MellumForCausalLM"),
    "minicpm3": Family("MiniCPM3ForCausalLM", 0, 0, 2),
    "minimax": Family("MiniMaxForCausalLM"),
    "minimax_m2": Family("MiniMaxM2ForCausalLM"),
    "mixtral": Family("MixtralForCausalLM"),
    "nemotron_h": Family("NemotronHForCausalLM", 1, 1),
    "olmoe": Family("OlmoeForCausalLM"),
    "phimoe": Family("PhimoeForCausalLM", 2, 0, config={"num_experts_per_tok": 2}),
    "qwen2_moe": Family("Qwen2MoeForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM"),
    "solar_open": Family("SolarOpenForCausalLM"),
    "youtu": Family("YoutuForCausalLM", 0, 0, 2),
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
    model_class = getattr(transformers, family.model)
    torch.manual_seed(len(name))
    with torch.no_grad():
        model = model_class(model_class.config_class(**{**SIZES, **family.config})).eval()
        _randomize(model)
    return model


def build(name: str, **config: Any) -> Any:
    """A fresh copy of the family's model (building takes longer than copying); `config` overrides on the copy."""
    model = copy.deepcopy(_built(name))
    for key, value in config.items():
        setattr(model.config, key, value)
    return model


def prompt(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(7))


def generate(model: Any, ids: torch.Tensor, new_tokens: int = 8, **kwargs: Any) -> torch.Tensor:
    """Greedy tokens; the pad and end tokens are ruled out, so that every row has them all."""
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                              do_sample=False, **kwargs)  # fmt: skip
