"""mla_decode in plain PyTorch: the definition, and what transformers computes.

B batch, Q query tokens, S cached positions, H heads, R latent rank, N nope width, P rope width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_pages(cache: Tensor, block_table: Tensor) -> Tensor:
    """[num_pages, page_size, X] -> [B, max_pages * page_size, X]; pages outside the cache read as zeros."""
    num_pages = cache.shape[0]
    valid = (block_table >= 0) & (block_table < num_pages)
    if num_pages == 0:
        return cache.new_zeros(block_table.shape[0], block_table.shape[1] * cache.shape[1], cache.shape[2])
    pages = cache[block_table.long().clamp(0, num_pages - 1)]
    return torch.where(valid[..., None, None], pages, 0).flatten(1, 2)


def visible(
    batch: int,
    num_queries: int,
    capacity: int,
    lengths: Tensor | None,
    mask: Tensor | None,
    block_table: Tensor | None,
    num_pages: int,
    causal: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(which positions hold tokens [B, S], which of them each query sees [B, Q, S])."""
    position = torch.arange(capacity, device=device)
    length = (
        torch.full((batch,), capacity, device=device)
        if lengths is None
        else lengths.long().clamp(0, capacity)
    )
    used = position < length[:, None]
    if block_table is not None:
        in_cache = (block_table >= 0) & (block_table < num_pages)
        page_size = capacity // max(block_table.shape[1], 1)
        used = used & in_cache.repeat_interleave(page_size, dim=1)
    seen = used[:, None, :].expand(batch, num_queries, capacity)
    if causal:
        newer = torch.arange(num_queries - 1, -1, -1, device=device)  # query tokens after this one
        seen = seen & (position < (length[:, None] - newer)[..., None])
    if mask is not None:
        seen = seen & (mask.squeeze(1) if mask.dim() == 4 else mask)
    return used, seen


def _cache_of(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    block_table: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """latent [B, S, R] and k_rope [B, S, P] with zeros where no token is, and seen [B, Q, S]."""
    num_pages = latent.shape[0]
    if block_table is not None:
        latent, k_rope = gather_pages(latent, block_table), gather_pages(k_rope, block_table)
    used, seen = visible(
        q.shape[0], q.shape[1], latent.shape[1], lengths, mask, block_table, num_pages, causal, q.device
    )
    return torch.where(used[..., None], latent, 0), torch.where(used[..., None], k_rope, 0), seen


def _expand(
    latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, num_heads: int, nope_dim: int
) -> tuple[Tensor, Tensor]:
    """Keys [B, S, H, N + P] and values [B, S, H, V] of all heads."""
    kv = torch.nn.functional.linear(latent, w_kv_b).unflatten(-1, (num_heads, -1))
    shared = k_rope[:, :, None].expand(-1, -1, num_heads, -1)
    return torch.cat((kv[..., :nope_dim], shared), dim=-1), kv[..., nope_dim:]


def mla_decode(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_kv_b: Tensor,
    scale: float,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    nope_dim = q.shape[-1] - k_rope.shape[-1]
    latent, k_rope, seen = _cache_of(q, latent, k_rope, lengths, mask, block_table, causal)
    k, v = _expand(latent.to(compute), k_rope.to(compute), w_kv_b.to(compute), q.shape[2], nope_dim)
    scores = torch.einsum("bqhd,bshd->bqhs", q.to(compute), k) * scale
    scores = scores.masked_fill(~seen[:, :, None], float("-inf"))
    lse = scores.logsumexp(-1)
    # A query that sees nothing has lse -inf and would be -inf - -inf = NaN.
    weights = torch.where(seen[:, :, None], (scores - lse[..., None]).exp(), 0)
    # einsum's strides depend on the sizes; every backend returns contiguous results, as the fake says.
    return torch.einsum("bqhs,bshv->bqhv", weights, v).to(dtype).contiguous(), lse.contiguous()


def model(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_kv_b: Tensor,
    scale: float,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """The decode step of transformers' MLA attention, in the model's dtype: kv_b_proj over the whole cache, then SDPA.

    The log-sum-exp is the one of its eager attention, which keeps the scores in the model's dtype.
    """
    nope_dim = q.shape[-1] - k_rope.shape[-1]
    masked = lengths is not None or mask is not None or block_table is not None or (causal and q.shape[1] > 1)
    if masked:
        latent, k_rope, seen = _cache_of(q, latent, k_rope, lengths, mask, block_table, causal)
    k, v = _expand(latent, k_rope, w_kv_b, q.shape[2], nope_dim)
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    attend = seen[:, None] if masked else None
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attend, scale=scale)
    scores = (query @ key.transpose(-1, -2) * scale).float()
    if masked:
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
        out = out.masked_fill(~seen.any(-1)[:, None, :, None], 0)
    return out.transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)
