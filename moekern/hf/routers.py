"""The table of router classes: how each computes its logits and what it asks of `moekern::gate_topk`.

A row describes one class of transformers. `patch` runs the class and the row on the same random tokens before it uses
the row, so a row that a release has outgrown is reported instead of used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, module.weight)


def linear_fp32(module: Any, x: Tensor) -> Tensor:
    return F.linear(x.float(), module.weight.float())


def linear_fp32_always(module: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), module.weight.float())


def linear_then_fp32(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, module.weight).float()


def linear_weight_dtype(module: Any, x: Tensor) -> Tensor:
    return F.linear(x.to(module.weight.dtype), module.weight)


def linear_fp32_input(module: Any, x: Tensor) -> Tensor:
    return F.linear(x.float(), module.weight)


def linear_bias(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def linear_bias_fp32(module: Any, x: Tensor) -> Tensor:
    return F.linear(x.float(), module.weight.float(), module.bias.float())


# Logits that `moekern::gate` computes itself -> whether in fp32 (else in the dtype of the input).
FUSED: dict[Callable[[Any, Tensor], Tensor], bool] = {
    linear: False,
    linear_fp32: True,
    linear_fp32_always: True,
    linear_bias: False,
    linear_bias_fp32: True,
}


def afmoe_logits(module: Any, x: Tensor) -> Tensor:
    return module.gate(x).to(torch.float32)


def gemma4_logits(module: Any, x: Tensor) -> Tensor:
    return module.proj(module.norm(x) * module.scale * module.scalar_root_size)


def hunyuan_logits(module: Any, x: Tensor) -> Tensor:
    return module.wg(x.float() if module.wg.weight.dtype == torch.float32 else x)


def laguna_logits(module: Any, x: Tensor) -> Tensor:
    logits = linear_then_fp32(module, x)
    cap = module.router_logit_softcapping
    return torch.tanh(logits / cap) * cap if cap > 0.0 else logits


def longcat_logits(module: Any, x: Tensor) -> Tensor:
    return F.linear(x.float(), module.classifier.weight.float())


def muse_spark_logits(module: Any, x: Tensor) -> Tensor:
    return linear_fp32(module, x) * module.output_multiplier


def probabilities(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1, dtype=torch.float32)


def one_over_top_k(module: Any) -> float:
    return 1.0 / module.top_k


def cohere2_scoring(module: Any) -> str | None:
    return {"softmax": "softmax_topk", "sigmoid": "sigmoid_topk"}.get(module.expert_selection_fn)


def score_fn_scoring(module: Any) -> str | None:
    names = {"Sigmoid": "sigmoid", "Softmax": "softmax", "SqrtSoftplusActivation": "sqrtsoftplus"}
    return names.get(type(module.score_fn).__name__)


def unknown_topk_method(module: Any) -> str | None:
    known = ("greedy", "group_limited_greedy")
    return (
        None if module.topk_method in known else f"topk_method {module.topk_method!r} is not one of {known}"
    )


def masks_groups_with_zero(module: Any) -> str | None:
    if module.num_group is None or module.num_group == module.topk_group:
        return None
    return "masked groups keep score 0, above the negative biased scores of eligible experts"


@dataclass(frozen=True)
class Router:
    """How one router class gates; strings name attributes of the module ("a.b" a nested one).

    logits: what the class computes before it scores.
    scoring: of gate_topk, or a function of the module that gives it, None where there is none.
    weight: the router's matrix.
    flatten: the class flattens its input to [T, D].
    bias: selection bias, an attribute or "argument", the second argument of forward.
    argument: the name of that second argument: the bias, or the token ids that `preselected` maps to expert ids.
    groups: group score, where the class has `num_group` and `topk_group`; only_if_grouped: unless `topk_method` is greedy.
    renormalize, eps, minimum, scale, expert_scale: as gate_topk.
    weights: dtype of the returned weights: that of the "logits", of the "input", or "fp32".
    first: what stands at index 0 instead of the logits.
    skip: why this instance cannot be expressed, or None.
    """

    logits: Callable[[Any, Tensor], Tensor] = linear
    scoring: str | Callable[[Any], str | None] = "softmax"
    weight: str = "weight"
    flatten: bool = True
    top_k: str = "top_k"
    bias: str | None = None
    argument: str | None = None
    preselected: str | None = None
    groups: str | None = None
    only_if_grouped: bool = False
    renormalize: bool | str = False
    eps: float = 0.0
    minimum: str | None = None
    scale: str | Callable[[Any], float] | None = None
    expert_scale: str | None = None
    weights: str = "logits"
    first: Callable[[Tensor], Tensor] | None = None
    skip: Callable[[Any], str | None] | None = None


_BIAS = "e_score_correction_bias"
_DEEPSEEK_V2 = Router(linear_fp32, groups="max", only_if_grouped=True, scale="routed_scaling_factor", weights="fp32",
                      skip=unknown_topk_method)  # fmt: skip
_DEEPSEEK_V3 = Router(linear_fp32, "sigmoid", bias=_BIAS, groups="top2", renormalize="norm_topk_prob", eps=1e-20,
                      scale="routed_scaling_factor")  # fmt: skip
_DEEPSEEK_V4 = Router(
    linear, score_fn_scoring, bias=_BIAS, renormalize=True, eps=1e-20, scale="routed_scaling_factor"
)
_QWEN = Router(linear, renormalize="norm_topk_prob")
_QWEN_RENORMALIZED = Router(linear, renormalize=True)
_MIXTRAL = Router(linear, renormalize=True, weights="fp32")
_GRANITE = Router(linear_then_fp32, "softmax_topk", flatten=False, weights="input")
_ERNIE = Router(linear_fp32_always, flatten=False, bias=f"moe_statics.{_BIAS}", renormalize=True, minimum="norm_min",
                weights="input")  # fmt: skip
_GEMMA4 = Router(gemma4_logits, weight="proj.weight", flatten=False, top_k="config.top_k_experts", renormalize=True,
                 expert_scale="per_expert_scale", weights="fp32", first=probabilities)  # fmt: skip
_HUNYUAN_V3 = Router(linear_fp32, "sigmoid", bias="argument", argument=_BIAS, renormalize=True, eps=1e-20,
                     scale="router_scaling_factor")  # fmt: skip

ROUTERS: dict[str, Router] = {
    "AXK1TopkRouter": _DEEPSEEK_V3,
    "AXK2TopkRouter": Router(
        linear_fp32, "sigmoid", bias=_BIAS, renormalize="norm_topk_prob", eps=1e-20, scale="routed_scaling_factor",
        skip=masks_groups_with_zero,
    ),
    "AfmoeTokenChoiceRouter": Router(
        afmoe_logits, "sigmoid", weight="gate.weight", bias="argument", argument="expert_bias", renormalize=True,
        eps=1e-20, scale="route_scale",
    ),
    "AriaTextTopKRouter": Router(linear, "softmax_topk", flatten=False),
    "BailingHybridTopkRouter": _DEEPSEEK_V3,
    "BeamTopKRouter": Router(
        linear_fp32, "sigmoid", bias=_BIAS, groups="top2", renormalize="norm_topk_prob", eps=1e-20
    ),
    "Cohere2MoeTopKRouter": Router(
        linear, cohere2_scoring, flatten=False, renormalize="norm_topk_prob", weights="input"
    ),
    "DeepseekOcr2TextTopkRouter": _DEEPSEEK_V2,
    "DeepseekV2TopkRouter": _DEEPSEEK_V2,
    "DeepseekV32TopkRouter": _DEEPSEEK_V3,
    "DeepseekV3TopkRouter": _DEEPSEEK_V3,
    "DeepseekV4HashRouter": Router(
        linear, score_fn_scoring, argument="input_ids", preselected="tid2eid", renormalize=True, eps=1e-20,
        scale="routed_scaling_factor",
    ),
    "DeepseekV4TopKRouter": _DEEPSEEK_V4,
    "DiffusionGemmaTextRouter": _GEMMA4,
    "Dots1TopkRouter": _DEEPSEEK_V3,
    "Dots3NoteTextTopkRouter": _DEEPSEEK_V3,
    "Dots3NoteVisionTopKRouter": _HUNYUAN_V3,
    "Ernie4_5_MoeTopKRouter": _ERNIE,
    "Ernie4_5_VLMoeMoeTopKRouter": _ERNIE,
    "ExaoneMoeTopkRouter": _DEEPSEEK_V3,
    "FlexOlmoTopKRouter": _QWEN,
    "FlintTopKRouter": Router(linear_fp32_always, "sigmoid", renormalize="norm_topk_prob"),
    "Gemma4TextRouter": _GEMMA4,
    "Glm4MoeLiteTopkRouter": _DEEPSEEK_V3,
    "Glm4MoeTopkRouter": _DEEPSEEK_V3,
    "Glm4vMoeTextTopkRouter": _DEEPSEEK_V3,
    "Glm5NextTextTopkRouter": _DEEPSEEK_V3,
    "GlmMoeDsaTopkRouter": _DEEPSEEK_V3,
    "GptOssTopKRouter": Router(linear_bias, "softmax_topk", flatten=False),
    "GraniteMoeHybridTopKRouter": _GRANITE,
    "GraniteMoeSWATopKRouter": _GRANITE,
    "GraniteMoeSharedTopKRouter": _GRANITE,
    "GraniteMoeTopKRouter": _GRANITE,
    "HYV3TopKRouter": _HUNYUAN_V3,
    "HYV4TopkRouter": _DEEPSEEK_V3,
    "HunYuanMoEV1Gate": Router(hunyuan_logits, weight="wg.weight", renormalize=True),
    "Inkling2TopKRouter": Router(
        linear_fp32_input, score_fn_scoring, bias=_BIAS, renormalize=True, eps=1e-20, scale="routed_scaling_factor"
    ),
    "JambaTopKRouter": Router(linear, flatten=False, weights="input"),
    "KimiLinearTopkRouter": _DEEPSEEK_V3,
    "Kolibri1TopKRouter": Router(linear_fp32, "sigmoid_topk", bias=_BIAS, renormalize="norm_topk_prob"),
    "LagunaTopKRouter": Router(laguna_logits, "sigmoid", bias=_BIAS, renormalize=True, weights="input"),
    "Lfm2MoeTopKRouter": Router(
        linear, "sigmoid", flatten=False, bias="argument", argument="expert_bias", renormalize="norm_topk_prob",
        eps=1e-6, scale="routed_scaling_factor",
    ),
    "LongcatFlashTopkRouter": Router(
        longcat_logits, weight="classifier.weight", bias=_BIAS, scale="routed_scaling_factor"
    ),
    "MellumTopKRouter": _QWEN,
    "MiMoV2FlashTopkRouter": _DEEPSEEK_V3,
    "MiniMaxM2TopKRouter": Router(
        linear_weight_dtype, "sigmoid", bias="argument", argument=_BIAS, renormalize=True, weights="fp32"
    ),
    "MiniMaxM3VLTopKRouter": Router(linear_weight_dtype, "sigmoid", bias=_BIAS, renormalize=True, weights="fp32"),
    "MiniMaxTopKRouter": _MIXTRAL,
    "Mistral4TopkRouter": Router(
        linear, groups="top2", renormalize="norm_topk_prob", eps=1e-20, scale="routed_scaling_factor"
    ),
    "MistralLarge4TextTopkRouter": Router(
        linear_fp32, groups="top2", renormalize=True, eps=1e-20, scale="routed_scaling_factor"
    ),
    "MixtralTopKRouter": _MIXTRAL,
    "MuseSparkTopkRouter": Router(
        muse_spark_logits, "sigmoid", bias=_BIAS, renormalize=True, eps=1e-15, scale="routed_scaling_factor"
    ),
    "NemotronHTopkRouter": _DEEPSEEK_V3,
    "OlmoeTopKRouter": _QWEN,
    "OpenAIPrivacyFilterTopKRouter": Router(linear_bias_fp32, "softmax_topk", flatten=False, scale=one_over_top_k),
    "Qwen2MoeTopKRouter": _QWEN,
    "Qwen3MoeTopKRouter": _QWEN,
    "Qwen3NextTopKRouter": _QWEN,
    "Qwen3OmniMoeTalkerTextTopKRouter": _QWEN,
    "Qwen3OmniMoeTextTopKRouter": _QWEN_RENORMALIZED,
    "Qwen3OmniMoeThinkerTextTopKRouter": _QWEN,
    "Qwen3VLMoeTextTopKRouter": _QWEN_RENORMALIZED,
    "Qwen3_5MoeTopKRouter": _QWEN_RENORMALIZED,
    "Qwen4ExpTextTopKRouter": _QWEN,
    "SolarOpenTopkRouter": _DEEPSEEK_V3,
    "UnlimitedOcrTextTopkRouter": _DEEPSEEK_V2,
}  # fmt: skip

# Routers that gate_topk cannot express.
NOT_EXPRESSIBLE = {
    "InklingTopkRouter": "weights are normalised together with those of the shared experts",
    "PhimoeTopKRouter": "sparsemixer masks logits per selected expert",
    "ZayaRouter": "one of its classes skips the layer, and its state passes on to the next router",
}


def is_router(module: nn.Module) -> bool:
    """Whether the module is a router, known or not, by the names of its class and their bases."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return any(name in ROUTERS or name.endswith(("Router", "TopKGate", "MoEGate")) for name in names)
