"""mla_decompress in plain PyTorch: the definition, what transformers computes, and the gradient.

B batch, S tokens, H heads, R latent rank, N nope width, P rope width, V value width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def mla_decompress(
    latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, num_heads: int, nope_dim: int, v_width: int = 0
) -> tuple[Tensor, Tensor]:
    dtype = latent.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    kv = F.linear(latent.to(compute), w_kv_b.to(compute)).to(dtype)
    kv = kv.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, S, N + V]
    k_nope, v = kv[..., :nope_dim], kv[..., nope_dim:]
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, num_heads, -1, -1)), dim=-1)
    # cat and pad keep the order of strides of what they are given, which is not [B, H, S].
    return k.contiguous(), F.pad(v, (0, max(v_width - v.shape[-1], 0))).contiguous()


def model(
    latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, num_heads: int, nope_dim: int, v_width: int = 0
) -> tuple[Tensor, Tensor]:
    """`expand_kv` of transformers' MLA attention, with V padded afterwards."""
    kv = F.linear(latent, w_kv_b).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k = kv.new_empty(*kv.shape[:-1], nope_dim + k_rope.shape[-1])
    k[..., :nope_dim].copy_(kv[..., :nope_dim])
    k[..., nope_dim:].copy_(k_rope[:, None].expand(-1, num_heads, -1, -1))
    v = kv[..., nope_dim:]
    return k, F.pad(v, (0, v_width - v.shape[-1])) if v_width > v.shape[-1] else v


def backward(saved: Mapping[str, Any], grads: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    latent, k_rope, w_kv_b = saved["latent"], saved["k_rope"], saved["w_kv_b"]
    num_heads, nope_dim = saved["num_heads"], saved["nope_dim"]
    value_dim = w_kv_b.shape[0] // num_heads - nope_dim
    batch, tokens = latent.shape[:2]
    grad_kv = latent.new_zeros(batch, tokens, num_heads, nope_dim + value_dim)
    found: dict[str, Tensor | None] = {}
    if grads[0] is not None:
        grad_k = grads[0].transpose(1, 2)
        grad_kv[..., :nope_dim] = grad_k[..., :nope_dim]
        found["k_rope"] = grad_k[..., nope_dim:].sum(2, dtype=_sum_dtype(latent)).to(k_rope.dtype)
    if grads[1] is not None:
        grad_kv[..., nope_dim:] = grads[1].transpose(1, 2)[..., :value_dim]
    grad_kv = grad_kv.flatten(2)
    if "latent" in saved["needs"]:
        found["latent"] = grad_kv @ w_kv_b
    if "w_kv_b" in saved["needs"]:
        found["w_kv_b"] = grad_kv.flatten(0, 1).t() @ latent.flatten(0, 1)
    return found


def _sum_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32
