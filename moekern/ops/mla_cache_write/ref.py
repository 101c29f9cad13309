"""mla_cache_write in plain PyTorch: the definition, and what transformers computes.

T tokens, R latent rank, P rope width.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROPES = ("interleaved", "half", "deinterleave")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """Rotary position embedding of [T, P] by [T, P / 2] angles."""
    if rope == "half":
        a, b = x.chunk(2, dim=-1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
    first, second = a * cos - b * sin, b * cos + a * sin
    if rope == "interleaved":
        return torch.stack((first, second), dim=-1).flatten(-2)
    return torch.cat((first, second), dim=-1)


def _write(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    valid = (slots >= 0) & (slots < cache.shape[0])
    cache[slots[valid].long()] = rows[valid].to(cache.dtype)


def mla_cache_write(
    kv: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    slots: Tensor,
    eps: float = 1e-6,
    rope: str = "interleaved",
) -> None:
    rank, half = norm_weight.shape[0], rope_cache.shape[1] // 2
    compute = torch.float64 if kv.dtype == torch.float64 else torch.float32
    x = kv[:, :rank].to(compute)
    normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(kv.dtype)
    _write(latent_cache, slots, norm_weight.to(compute) * normed.to(compute))
    cos, sin = cos[:, :half].to(compute), sin[:, :half].to(compute)
    _write(rope_cache, slots, rotate(kv[:, rank:].to(compute), cos, sin, rope))


def model(
    kv: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    slots: Tensor,
    eps: float = 1e-6,
    rope: str = "interleaved",
) -> None:
    """transformers: kv_a_layernorm, the rotary embedding (fp32 in DeepSeek-V2, else kv's dtype), the cache update."""
    rank, half = norm_weight.shape[0], rope_cache.shape[1] // 2
    x = kv[:, :rank].float()
    normed = norm_weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(kv.dtype)
    rotary = torch.float32 if rope == "interleaved" else kv.dtype
    cos, sin = cos[:, :half].to(rotary), sin[:, :half].to(rotary)
    rotated = rotate(kv[:, rank:].to(rotary), cos, sin, rope).to(kv.dtype)
    _write(latent_cache, slots, normed)
    _write(rope_cache, slots, rotated)
