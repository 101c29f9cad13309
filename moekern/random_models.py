"""Transformers models of published layer shapes with seeded random weights, for the demo and the benchmarks.

Weights have scale 1.5/sqrt(fan_in): with transformers' default initialisation the tokens hardly depend on the experts, so
a wrong expert kernel would go unseen.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

DEEPSEEK_V2_LITE: dict[str, Any] = {
    "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16,
    "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408, "n_shared_experts": 2, "first_k_dense_replace": 1, "topk_method": "greedy",
}  # fmt: skip

# fmt: off
# model_type -> the config's arguments. `num_hidden_layers` and `max_position_embeddings` are the caller's.
PRESETS: dict[str, dict[str, Any]] = {
    "deepseek_v2": DEEPSEEK_V2_LITE,
    # DeepSeek-V3's gating and attention, narrower: its own layer has 11 billion parameters.
    "deepseek_v3": {
        **DEEPSEEK_V2_LITE, "vocab_size": 129280, "q_lora_rank": 768, "n_routed_experts": 64, "num_experts_per_tok": 8,
        "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    # Qwen3-30B-A3B's layer.
    "qwen3_moe": {
        "vocab_size": 151936, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "intermediate_size": 6144,
    },
    # Mixtral-8x7B at half the width.
    "mixtral": {
        "vocab_size": 32000, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4,
        "intermediate_size": 7168, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}
# fmt: on

# What a preset is overridden with to be built in a moment, for tests of the code around the models.
TINY: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
TINY_MLA: dict[str, Any] = {
    **TINY, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "n_routed_experts": 16, "num_experts_per_tok": 3,
}  # fmt: skip


def make_config(
    model_type: str, num_layers: int, max_length: int, *, tiny: bool = False, **overrides: Any
) -> Any:
    """A transformers config of one of `PRESETS`; `tiny` shrinks every width."""
    from transformers import AutoConfig

    arguments = dict(PRESETS[model_type])
    if tiny:
        arguments.update(TINY_MLA if "kv_lora_rank" in arguments else TINY)
    arguments.update(overrides)
    return AutoConfig.for_model(
        model_type,
        num_hidden_layers=num_layers,
        max_position_embeddings=max(max_length, 64),
        # Generation runs to the length that was asked for.
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
        **arguments,
    )  # fmt: skip


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, its parameters allocated but not written (no memory is touched)."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def build_model(
    config: Any,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> Any:
    """A model in eval mode, with weights that depend on `seed`, `dtype` and the parameters' names only.

    progress: called with the number of parameters filled since the last call.
    """
    model = empty_model(config, dtype)

    def fill(item: tuple[str, torch.Tensor]) -> int:
        name, value = item
        # A stream per parameter, so that the order in which threads take them does not matter.
        # CPU generators use 32 bits of the seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if value.dim() > 1:
            value.normal_(0.0, 1.5 / value.shape[-1] ** 0.5, generator=generator)
        elif name.endswith("e_score_correction_bias"):
            value.uniform_(0.0, 0.1, generator=generator)
        else:
            value.fill_(0.0 if name.endswith("bias") else 1.0)
        return value.numel()

    # Buffers are computed by the constructors, except DeepSeek-V3's selection bias.
    named = dict(model.named_parameters())
    named.update((n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    largest_first = sorted(named.items(), key=lambda item: -item[1].numel())
    # normal_ runs on one thread (220 million bf16 numbers a second) and lets go of the interpreter lock.
    with torch.no_grad(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for count in pool.map(fill, largest_first):
            if progress is not None:
                progress(count)
    return model


def share_weights(model: Any) -> Any:
    """A second model object, with its own modules and config, over the same parameters and buffers."""
    config = copy.deepcopy(model.config)
    twin = empty_model(config, model.dtype)
    for name, module in model.named_modules():
        other = twin.get_submodule(name)
        for key, value in module._parameters.items():
            other._parameters[key] = value
        for key, value in module._buffers.items():
            other._buffers[key] = value
    return twin
