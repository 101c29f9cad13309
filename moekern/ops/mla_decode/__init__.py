"""mla_decode: absorbed attention of a few query tokens over the latent cache of Multi-head Latent Attention.

B batch, Q query tokens, S cached positions, H heads, R latent rank, N nope width, P rope width, V value width.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from moekern import _op
from moekern._check import expect_dtype, expect_rows, expect_shape
from moekern._op import Backend, OpSpec
from moekern.ops.mla_decode import cpu, ref
from moekern.ops.mla_decode.cases import CASES

MAX_QUERIES = (
    8  # beyond about 170 query tokens decompressing is cheaper; up to 8 one pass over the cache serves all
)

SCHEMA = (
    "(Tensor q, Tensor latent, Tensor k_rope, Tensor w_kv_b, *, float scale, Tensor? lengths=None, "
    "Tensor? mask=None, Tensor? block_table=None, bool causal=True) -> (Tensor, Tensor)"
)


def mla_decode(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_kv_b: Tensor,
    *,
    scale: float,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attends to the latent cache without decompressing it: W_UK is applied to the queries, W_UV to the output.

    Args:
        q: [B, Q, H, N + P], Q in 1..8; the last P columns have rotary position embedding.
        latent: [B, S, R], the normalised latents; with a block table [num_pages, page_size, R].
        k_rope: [B, S, P], the rotated shared keys; with a block table [num_pages, page_size, P]. P may be 0.
        w_kv_b: [H * (N + V), R], the weight of `kv_b_proj`: per head N rows for the key, then V for the value.
        scale: multiplies the scores (`module.scaling`).
        lengths: int32 [B], positions in use; all S when None. Clamped to 0..S.
        mask: bool [B, Q, S] or [B, 1, Q, S], True where a query may look; B may be 1.
        block_table: int32 [B, max_pages]; position p of sequence b is row p % page_size of page
            block_table[b, p // page_size], and S is max_pages * page_size. Pages outside the cache count as masked.
        causal: query i of Q sees only positions below length - (Q - 1 - i): the queries are the newest tokens.
        return_lse: also return the natural log-sum-exp of the scaled scores.
        backend: forces one backend.

        q, latent, k_rope and w_kv_b have one dtype and a contiguous last dimension; other strides are free.

    Returns:
        out [B, Q, H, V] in q's dtype; with return_lse (out, lse [B, Q, H] fp32). A query that sees nothing gets
        out 0 and lse -inf.

    Raises:
        ValueError, TypeError: for arguments that do not fit together.

    Notes:
        fp32 accumulation; the softmax weights may be rounded to the dtype of the cache.
        Positions from `lengths` on are never read. Deterministic for one machine and thread count; no host sync.
        Traffic: (R + P) values per cached position and w_kv_b once.

    Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1.2 and appendix C.
    """
    out, lse = _op.call(
        SPEC,
        backend,
        q=q,
        latent=latent,
        k_rope=k_rope,
        w_kv_b=w_kv_b,
        scale=scale,
        lengths=lengths,
        mask=mask,
        block_table=block_table,
        causal=causal,
    )
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_kv_b: Tensor,
    scale: float,
    lengths: Tensor | None,
    mask: Tensor | None,
    block_table: Tensor | None,
    causal: bool,
) -> None:
    op = "mla_decode"
    expect_shape(op, "q", q, "[B, Q, H, N + P]", (None,) * 4)
    expect_dtype(op, "q", q, "floating", q.dtype.is_floating_point)
    batch, num_queries, num_heads, width = q.shape
    if not 1 <= num_queries <= MAX_QUERIES:
        raise ValueError(f"{op}: q must have 1..{MAX_QUERIES} query tokens; got {num_queries}")
    if num_heads < 1:
        raise ValueError(f"{op}: q must have at least one head; got {list(q.shape)}")
    paged = block_table is not None
    letters, first = ("[num_pages, page_size, {}]", None) if paged else ("[B, S, {}]", batch)
    expect_shape(op, "latent", latent, letters.format("R"), (first, None, None), like=q)
    expect_shape(op, "k_rope", k_rope, letters.format("P"), (*latent.shape[:2], None), like=q)
    rank, rope = latent.shape[-1], k_rope.shape[-1]
    if rank < 1:
        raise ValueError(f"{op}: latent must have a rank of at least 1; got {list(latent.shape)}")
    if rope >= width:
        raise ValueError(f"{op}: q must be wider than k_rope's P = {rope}; got {width}")
    expect_shape(op, "w_kv_b", w_kv_b, "[H * (N + V), R]", (None, rank), like=q)
    rows, nope = w_kv_b.shape[0], width - rope
    if rows % num_heads != 0 or rows // num_heads <= nope:
        raise ValueError(
            f"{op}: w_kv_b must have H * (N + V) rows with H = {num_heads}, N = {nope} and V >= 1; got {rows}"
        )
    for name, value in (("latent", latent), ("k_rope", k_rope), ("w_kv_b", w_kv_b)):
        expect_dtype(op, name, value, "of q's dtype {}", value.dtype == q.dtype, q.dtype)
    for name, value in (("q", q), ("latent", latent), ("k_rope", k_rope), ("w_kv_b", w_kv_b)):
        expect_rows(op, name, value)
    if lengths is not None:
        expect_shape(op, "lengths", lengths, "[B]", (batch,), like=q)
        expect_dtype(op, "lengths", lengths, "int32", lengths.dtype == torch.int32)
    if block_table is not None:
        expect_shape(op, "block_table", block_table, "[B, max_pages]", (batch, None), like=q)
        expect_dtype(op, "block_table", block_table, "int32", block_table.dtype == torch.int32)
        if latent.shape[1] < 1:
            raise ValueError(f"{op}: page_size must be at least 1; got latent {list(latent.shape)}")
    if mask is not None:
        where = "block_table's max_pages * page_size" if paged else "latent's S"
        expect_dtype(op, "mask", mask, "bool", mask.dtype == torch.bool)
        positions = positions_of(latent, block_table)
        sizes = (num_queries, positions) if mask.dim() != 4 else (1, num_queries, positions)
        fits = mask.dim() in (3, 4) and mask.shape[1:] == sizes and mask.shape[0] in (1, batch)
        if not fits:
            raise ValueError(
                f"{op}: mask must be [B, Q, S] or [B, 1, Q, S] with B = {batch} or 1, Q = {num_queries} and "
                f"S = {positions} ({where}); got {list(mask.shape)}"
            )
        if mask.device != q.device:
            raise ValueError(f"{op}: mask must be on {q.device}; got {mask.device}")
    if os.environ.get("MOEKERN_CHECK") == "1":
        _check_values(latent, lengths, block_table)


def positions_of(latent: Tensor, block_table: Tensor | None) -> int:
    """S, the positions that a sequence can address."""
    return latent.shape[1] * (1 if block_table is None else block_table.shape[1])


def _check_values(latent: Tensor, lengths: Tensor | None, block_table: Tensor | None) -> None:
    """What needs a host sync: lengths within the cache, and real pages wherever a token is."""
    if lengths is None or lengths.numel() == 0 or torch.compiler.is_compiling():
        return
    positions = positions_of(latent, block_table)
    longest, shortest = int(lengths.max()), int(lengths.min())
    holder = "block_table" if block_table is not None else "latent"
    if longest > positions:
        raise ValueError(f"mla_decode: {holder} holds {positions} positions; got a length of {longest}")
    if shortest < 0:
        raise ValueError(f"mla_decode: lengths must be >= 0; got {shortest}")
    if block_table is not None:
        page = torch.arange(block_table.shape[1], device=lengths.device) * latent.shape[1]
        outside = (block_table < 0) | (block_table >= latent.shape[0])
        wrong = block_table[outside & (page < lengths[:, None])]
        if wrong.numel() != 0:
            raise ValueError(
                f"mla_decode: block_table must name pages in 0..{latent.shape[0] - 1} up to each length; got {wrong[:4].tolist()}"
            )


def fake(q: Tensor, k_rope: Tensor, w_kv_b: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    batch, num_queries, num_heads, width = q.shape
    value_dim = w_kv_b.shape[0] // num_heads - (width - k_rope.shape[-1])
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(batch, num_queries, num_heads, value_dim)
    return out, q.new_empty(batch, num_queries, num_heads, dtype=compute)


def _cached_tokens(q: Tensor, latent: Tensor, lengths: Tensor | None, block_table: Tensor | None) -> int:
    if lengths is not None:
        return int(lengths.sum())
    return q.shape[0] * positions_of(latent, block_table)


def _flops(q: Tensor, latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, lengths: Tensor | None = None,
           block_table: Tensor | None = None, **_: Any) -> int:  # fmt: skip
    batch, num_queries, num_heads = q.shape[:3]
    rank, rope = latent.shape[-1], k_rope.shape[-1]
    attention = num_queries * num_heads * _cached_tokens(q, latent, lengths, block_table) * (2 * rank + rope)
    return 2 * (attention + batch * num_queries * w_kv_b.numel())


def _bytes(q: Tensor, latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, lengths: Tensor | None = None,
           block_table: Tensor | None = None, **_: Any) -> int:  # fmt: skip
    cache = _cached_tokens(q, latent, lengths, block_table) * (latent.shape[-1] + k_rope.shape[-1])
    out = q.shape[0] * q.shape[1] * (w_kv_b.shape[0] - q.shape[2] * (q.shape[3] - k_rope.shape[-1]))
    return (cache + w_kv_b.numel() + q.numel() + out) * q.element_size()


SPEC = OpSpec(
    name="mla_decode",
    schema=SCHEMA,
    check=_check,
    ref=ref.mla_decode,
    fake=fake,
    model=ref.model,
    backends={
        "ref": Backend(ref.mla_decode),
        "cpu": Backend(cpu.run, cpu.unavailable, cpu.supports),
    },
    cases=CASES,
    outputs=("model", "model"),
    flops=_flops,
    bytes=_bytes,
)
