"""Latent attention: what `attn_implementation="moekern_mla"` runs.

transformers caches the latent and its attention classes re-expand all of it at every step, in `expand_kv`. A patched
module passes the latent through instead, and this function attends to it directly.

B batch, H heads, Sq queries, S cached tokens, R latent rank, N nope width, P rope width, V value width.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekern import ops
from moekern.hf import _common

logger = logging.getLogger(__name__)

# The absorbed form costs 2R + P multiplications per query, key and head where the expanded one costs N + P + V, but
# saves expanding R * (N + V) per key. For DeepSeek's widths (R 512, N 128, V 128) it wins below 170 queries on paper;
# 8 is what one mla_decode call takes, and longer queries run on GEMMs where the expanded form keeps its advantage.
MAX_DECODE_QUERIES = 8

# Attention implementations whose masks and None are understood; FlashAttention aligns a missing mask bottom-right.
KNOWN_IMPLEMENTATIONS = ("eager", "sdpa", "moekern_mla", None)


def pass_through(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Takes the place of `expand_kv` on a patched instance: keys are the latent, values the rotary keys."""
    return kv_nope, k_rot


def is_mla(module: Any) -> bool:
    return hasattr(module, "expand_kv") and hasattr(module, "kv_b_proj")


def reason_against(module: Any) -> str | None:
    """Why the module cannot be patched, or None."""
    if hasattr(module, "indexer"):
        return "a sparse indexer selects its keys"
    reason = _common.reason_against_instance(module)
    if reason is not None:
        return reason
    missing = [
        name for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim") if not hasattr(module, name)
    ]
    if missing or not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return f"it has no {', '.join(missing) or 'config with an attention implementation'}"
    if module.config._attn_implementation not in KNOWN_IMPLEMENTATIONS:
        return f"the masks of attn_implementation={module.config._attn_implementation!r} are not understood"
    if not _is_plain_linear(module.kv_b_proj):
        return f"kv_b_proj is a {type(module.kv_b_proj).__name__} or has a bias or hooks"
    weight = module.kv_b_proj.weight
    reason = _common.reason_against_weights({"kv_b_proj.weight": weight})
    return reason or _reason_without_kernel(module, weight)


def _reason_without_kernel(module: Any, weight: Tensor) -> str | None:
    nope, rope = module.qk_nope_head_dim, module.qk_rope_head_dim
    num_heads = weight.shape[0] // (nope + module.v_head_dim)
    cached = {
        "latent": weight.new_empty(1, 1, weight.shape[1]),
        "k_rope": weight.new_empty(1, 1, rope),
        "w_kv_b": weight,
    }
    query = weight.new_empty(1, 1, num_heads, nope + rope)
    return _common.reason_without_kernel(
        "mla_decode", weight.device, **cached, q=query, scale=1.0
    ) or _common.reason_without_kernel(
        "mla_decompress", weight.device, **cached, num_heads=num_heads, nope_dim=nope, v_width=nope + rope
    )


def _is_plain_linear(projection: Any) -> bool:
    """Whether the projection is its weight and nothing else; LoRA and quantized layers are not."""
    return (
        type(projection) is nn.Linear
        and projection.bias is None
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def mla_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function for latent attention.

    Args:
        module: the attention module.
        query: [B, H, Sq, N + P].
        key, value: on a patched module the cached latent [B, 1, S, R] and rotary keys [B, 1, S, P]; else the ordinary
            keys and values, which go to SDPA.
        attention_mask: [B, 1, Sq, S], bool (True attends) or additive, or None.
        dropout, scaling: as SDPA.

    Returns:
        ([B, Sq, H, V], None). A fully masked row is 0.
    """
    if _common.saved_of(module) is None:
        return _by_name(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if _needs_own_path(module, query, key, value, attention_mask, dropout, kwargs):
        key, value = type(module).expand_kv(module, key, value)
        own = _own_attention(module)
        return own(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    latent, k_rope = key[:, 0], value[:, 0]
    weight = module.kv_b_proj.weight
    num_queries, num_keys = query.shape[2], latent.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = False
    if attention_mask is not None:
        attention_mask = attention_mask[..., :num_keys]
    elif num_queries > 1:
        given = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if given is None else given
        if causal:
            # No mask means that query i is at position i: what a static cache holds beyond is not written yet.
            latent, k_rope = latent[:, :num_queries], k_rope[:, :num_queries]
    if num_queries <= MAX_DECODE_QUERIES:
        mask = _as_bool(attention_mask)
        if attention_mask is None or mask is not None:
            mask = None if mask is None else mask.expand(query.shape[0], 1, num_queries, latent.shape[1])
            out: Any = ops.mla_decode(
                query.transpose(1, 2), latent, k_rope, weight, scale=scale, mask=mask, causal=causal
            )
            return out, None
    return _attend_expanded(module, query, latent, k_rope, weight, attention_mask, scale, causal), None


def _attend_expanded(
    module: Any, query: Tensor, latent: Tensor, k_rope: Tensor, weight: Tensor, mask: Tensor | None,
    scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """Expands the latent once and runs SDPA: what long queries want."""
    nope, value_width = module.qk_nope_head_dim, module.v_head_dim
    # The heads of the weight, not of the config: tensor parallelism keeps a part of them.
    num_heads = weight.shape[0] // (nope + value_width)
    # Flash attention wants V as wide as K, on the CPU and on CUDA; the kernels that do without are the math one on the CPU
    # (2030 ms against 79 ms for 4096 tokens and 16 heads of 192/128, bf16, 2 threads) and the memory-efficient one on CUDA.
    key, value = ops.mla_decompress(latent, k_rope, weight, num_heads, nope, v_width=query.shape[-1])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    return out[..., :value_width].transpose(1, 2).contiguous()


def _as_bool(mask: Tensor | None) -> Tensor | None:
    """The mask as booleans, or None when it is none, carries more than 0 and minus infinity, or cannot be looked at."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    if torch.compiler.is_compiling():
        return None
    if mask.device.type != "cpu":  # a look would wait for the GPU, in every layer
        _warn_once(
            "moekern: masks of numbers (attn_implementation='eager') make every step expand the whole latent cache on a "
            "GPU, as the unpatched model does; attn_implementation='sdpa' has boolean ones"
        )
        return None
    attends = mask == 0
    return attends if bool((attends | (mask <= torch.finfo(mask.dtype).min)).all()) else None


def _needs_own_path(
    module: Any, query: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None, dropout: float,
    kwargs: dict[str, Any],
) -> bool:  # fmt: skip
    """Whether this call is the model's own business: training, autocast, paged caches, adapters, attention weights."""
    projection = module.kv_b_proj
    if not _is_plain_linear(projection) or dropout > 0 or latent.dim() != 4:
        return True
    weight = projection.weight
    if weight.dtype not in _common.DTYPES:
        return True
    if not query.dtype == latent.dtype == k_rope.dtype == weight.dtype or torch.is_autocast_enabled(
        query.device.type
    ):
        return True
    if not _common.has_kernel("mla_decode", weight.device):
        return True
    if torch.is_grad_enabled() and (query.requires_grad or latent.requires_grad or weight.requires_grad):
        return True
    if mask is not None and (mask.dim() != 4 or mask.shape[1] != 1):
        return True
    if any(kwargs.get(name) is not None for name in ("cache", "softcap", "position_bias", "s_aux")):
        return True
    if _saved_implementation(module) != "eager":
        return False
    # The eager function reads no mask as no masking at all, and it alone gives attention weights.
    return (mask is None and query.shape[2] > 1) or _attention_weights_wanted()


def _saved_implementation(module: Any) -> str | None:
    saved = _common.saved_of(module)
    return None if saved is None else saved.replaced["config"]._attn_implementation


def _attention_weights_wanted() -> bool:
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collected = None if capturing is None else capturing._active_collector.get()
    return collected is not None and "attentions" in collected


def _own_attention(module: Any) -> Any:
    """The attention function that the unpatched module would call."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _saved_implementation(module)
    if name in ("sdpa", "moekern_mla"):
        return ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sys.modules[type(module).__module__].eager_attention_forward


def _by_name(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The name without the patch, and other kinds of attention in a model that has it: keys are expanded, SDPA runs."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kwargs.get("indices") is not None:
        raise ValueError(
            f"moekern_mla: {type(module).__name__} selects keys by index; use attn_implementation='sdpa'"
        )
    if is_mla(module):
        _warn_once(
            "moekern_mla by name alone runs SDPA on expanded keys; call moekern.patch(model) for the kernels"
        )
    return sdpa_attention_forward(module, *args, **kwargs)
