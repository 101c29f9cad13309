"""mla_decode on the CPU: how the work is split, and the call of the native kernel (csrc/ops/mla_decode/cpu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from moekern import _native

BLOCK = 64  # positions that the kernel scores and adds at a time
GROUP_ROWS = 128  # (query, head) rows that share one pass over the cache
HEAD_ROWS = 32  # query rows that share one pass over a head's part of w_kv_b
MIN_SPLIT = 256  # shorter runs cost more in merging than they bring in balance

_leaf = _native.leaf(
    "_mla_decode_cpu(Tensor q, Tensor latent, Tensor k_rope, Tensor w_kv_b, Tensor? lengths, Tensor? mask, "
    "Tensor? block_table, float scale, bool causal, int num_splits, Tensor(a!) workspace, Tensor(b!) out, "
    "Tensor(c!) lse) -> ()"
)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def num_splits_of(batch: int, rows: int, positions: int, threads: int) -> int:
    """Runs of positions that are attended to apart: enough for two items a thread."""
    items = batch * -(-rows // GROUP_ROWS)
    wanted = -(-2 * threads // max(items, 1))
    return max(1, min(wanted, -(-positions // MIN_SPLIT)))


def workspace_size(
    batch: int, rows: int, rank: int, rope: int, nope: int, value: int, splits: int, threads: int
) -> int:
    """Floats; MlaDecodeParams::workspace_size() in params.h, which checks it."""
    rows, rank, width = _up(rows, 16), _up(rank, 32), _up(rank, 32) + _up(rope, 32)
    group = min(rows, GROUP_ROWS)
    partial = batch * splits * rows * (rank + 2)
    scratch = BLOCK * (width + rank) // 2 + group * width + max(group, 32) * BLOCK
    scratch += HEAD_ROWS * (rank + _up(nope + value, 16))
    return batch * rows * width + partial + threads * scratch


def run(
    q: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_kv_b: Tensor,
    scale: float,
    lengths: Tensor | None,
    mask: Tensor | None,
    block_table: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    batch, num_queries, num_heads, width = q.shape
    rank, rope = latent.shape[2], k_rope.shape[2]
    nope = width - rope
    value = w_kv_b.shape[0] // num_heads - nope
    out = q.new_empty(batch, num_queries, num_heads, value)
    lse = q.new_empty(batch, num_queries, num_heads, dtype=torch.float32)
    if batch == 0:
        return out, lse
    if mask is not None and mask.dim() == 4:
        mask = mask[:, 0]
    if lengths is not None:
        lengths = lengths.contiguous()
    positions = latent.shape[1] * (1 if block_table is None else block_table.shape[1])
    threads = torch.get_num_threads()
    splits = num_splits_of(batch, num_queries * num_heads, positions, threads)
    size = workspace_size(batch, num_queries * num_heads, rank, rope, nope, value, splits, threads)
    workspace = q.new_empty(size, dtype=torch.float32)
    _leaf(q, latent, k_rope, w_kv_b, lengths, mask, block_table, scale, causal, splits, workspace, out, lse)
    return out, lse


def unavailable() -> str | None:
    return _native.reason_without("_mla_decode_cpu")


def supports(q: Tensor, **_: object) -> str | None:
    if q.device.type != "cpu":
        return f"q is on {q.device}"
    return None if q.dtype in (torch.float32, torch.bfloat16, torch.float16) else f"dtype {q.dtype}"
