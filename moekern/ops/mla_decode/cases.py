"""Inputs of mla_decode: the shapes of released models, and the edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moekern._op import Case

UNUSED_PAGE = 2147480000  # far outside every cache: dereferencing it crashes


def _paged(
    dense: Tensor, lengths: Tensor, page_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scatters [B, S, X] into shuffled pages; returns the pages (NaN where unused) and the block table."""
    batch, capacity, width = dense.shape
    per_sequence = -(-capacity // page_size) + 1  # one entry more than is ever used
    num_pages = batch * per_sequence + 2
    pages = torch.full((num_pages, page_size, width), float("nan"))
    table = torch.full((batch, per_sequence), UNUSED_PAGE, dtype=torch.int32)
    free = torch.randperm(num_pages, generator=generator).tolist()
    for b in range(batch):
        for i in range(-(-int(lengths[b]) // page_size)):
            rows = dense[b, i * page_size : min((i + 1) * page_size, int(lengths[b]))]
            page = free.pop()
            pages[page, : rows.shape[0]] = rows
            table[b, i] = page
    return pages, table


def _mask(kind: str, batch: int, num_queries: int, capacity: int, generator: torch.Generator) -> Tensor:
    position = torch.arange(capacity)
    if kind == "left_padding":  # sequence b starts at position 3 b, as generate() pads
        start = torch.arange(batch)[:, None, None] * 3
        newest = capacity - num_queries + torch.arange(num_queries)[:, None]
        return ((position >= start) & (position <= newest))[:, None]
    mask = torch.rand(batch, num_queries, capacity, generator=generator) < 0.7
    if kind == "empty_rows":
        mask[:, 0] = False
        mask[-1] = False
    return mask


def make_case(
    lengths: int | Sequence[int],
    num_heads: int,
    *,
    num_queries: int = 1,
    rank: int = 512,
    rope: int = 64,
    nope: int = 128,
    value: int = 128,
    spare: int = 0,
    page_size: int = 0,
    mask: str = "",
    causal: bool = True,
    layout: str = "plain",
) -> Any:
    """lengths: one per sequence; an int means one sequence and no lengths argument. spare: unused positions (NaN).

    layout: "plain"; "cache": [B, 1, S, X] tensors and a transposed query, as in transformers; "joint": latent and
    k_rope are slices of one [B, S, R + P] tensor.
    """

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        sequence = [lengths] if isinstance(lengths, int) else list(lengths)
        batch, capacity = len(sequence), max(sequence, default=0) + spare
        length = torch.tensor(sequence, dtype=torch.int32)
        # Queries of scale 1.5 make the attention uneven enough for a wrong position to show.
        q = randn(batch, num_heads, num_queries, nope + rope) * 1.5
        joint = randn(batch, capacity, rank + rope)
        joint[torch.arange(capacity) >= length[:, None]] = float("nan")
        w_kv_b = randn(num_heads * (nope + value), rank) / rank**0.5
        arguments: dict[str, Any] = {"scale": (nope + rope) ** -0.5, "causal": causal}
        if page_size:
            joint, table = _paged(joint, length, page_size, generator)
            arguments["block_table"] = table.to(device)
        if not isinstance(lengths, int):
            arguments["lengths"] = length.to(device)
        if mask:
            positions = joint.shape[1] if not page_size else table.shape[1] * page_size
            arguments["mask"] = _mask(mask, batch, num_queries, positions, generator).to(device)
        joint = joint.to(device, dtype)
        latent, k_rope = joint[..., :rank], joint[..., rank:]
        q = q.to(device, dtype).transpose(1, 2)
        if layout == "cache":
            latent, k_rope = (t.unsqueeze(1).contiguous()[:, 0] for t in (latent, k_rope))
        elif layout == "plain":
            q, latent, k_rope = q.contiguous(), latent.contiguous(), k_rope.contiguous()
        return {"q": q, "latent": latent, "k_rope": k_rope, "w_kv_b": w_kv_b.to(device, dtype), **arguments}

    return make


MINICPM3: dict[str, Any] = {"rank": 256, "rope": 32, "nope": 64, "value": 64}
GLM4_LITE: dict[str, Any] = {"nope": 192, "value": 256}
TINY: dict[str, Any] = {"rank": 64, "rope": 32, "nope": 32, "value": 32}

CASES = (
    Case("v2_lite", make_case(173, 16, layout="cache")),
    Case("v2_lite_ragged", make_case([129, 1, 0, 64], 16)),
    Case("vl2_h32", make_case([97], 32)),
    Case("glm4_lite_h20", make_case([70, 33], 20, **GLM4_LITE)),
    Case("minicpm3_h40", make_case([70, 33], 40, **MINICPM3)),
    Case("mistral4_rank_256", make_case([50], 32, rank=256, nope=64)),
    Case("axk2_rank_128", make_case([45], 32, rank=128, rope=32, nope=64, value=64)),
    Case("no_rope", make_case([40, 7], 4, **{**TINY, "rope": 0})),
    Case("odd_widths", make_case([37, 5], 3, rank=40, rope=6, nope=10, value=14)),
    Case("one_head", make_case([33, 20, 51, 9, 64, 40], 1, **TINY)),
    Case("heads_63", make_case([20], 63, **TINY)),
    Case("heads_128", make_case([40], 128, **TINY)),
    Case("no_cache", make_case(0, 4, **TINY)),
    Case("no_batch", make_case([], 4, **TINY)),
    Case("length_zero", make_case([0, 0], 4, spare=5, **TINY)),
    Case("spare_nan", make_case([17, 50], 4, spare=70, **TINY)),
    Case("joint_rows", make_case([60, 61], 5, layout="joint", **TINY)),
    Case("queries_2", make_case([40, 1, 2], 16, num_queries=2, **TINY)),
    Case("queries_3_no_lengths", make_case(67, 3, num_queries=3, layout="cache", **TINY)),
    Case("queries_4_not_causal", make_case([40, 3], 4, num_queries=4, causal=False, **TINY)),
    Case("queries_8", make_case([65, 8, 5], 9, num_queries=8, **TINY)),
    Case("left_padding", make_case(40, 4, num_queries=2, mask="left_padding", causal=False, layout="cache", **TINY)),
    Case("left_padding_batch", make_case([33, 33, 33], 4, mask="left_padding", **TINY)),
    Case("random_mask", make_case([70, 31], 4, num_queries=2, mask="random", **TINY)),
    Case("masked_rows", make_case([70, 31], 4, num_queries=3, mask="empty_rows", **TINY)),
    Case("page_1", make_case([19, 4], 4, page_size=1, **TINY)),
    Case("page_16", make_case([40, 0, 16], 16, page_size=16, **TINY)),
    Case("page_48", make_case([100, 48], 4, num_queries=2, page_size=48, **TINY)),
    Case("page_64", make_case([150, 65], 16, page_size=64)),
    Case("page_64_mask", make_case([100, 65], 4, page_size=64, mask="random", **TINY)),
    Case("v3_h128", make_case([512, 300], 128), small=False),
    Case("splits_ragged", make_case([2500, 3, 0, 900], 16, **MINICPM3), small=False),
    Case("splits_masked", make_case([1500, 1100], 16, num_queries=2, mask="random", **MINICPM3), small=False),
    Case("splits_paged", make_case([1500, 700], 16, page_size=64, **MINICPM3), small=False),
    Case("decode_1k", make_case(1024, 16, layout="cache"), small=False, bench="DeepSeek-V2-Lite batch 1, 1024 cached"),
    Case("decode_4k", make_case(4096, 16, layout="cache"), small=False, bench="DeepSeek-V2-Lite batch 1, 4096 cached"),
    Case("decode_4k_b4", make_case([4096] * 4, 16, page_size=64), small=False,
         bench="DeepSeek-V2-Lite batch 4, 4096 cached, pages of 64"),
    Case("decode_4k_vl2", make_case(4096, 32, layout="cache"), small=False, bench="DeepSeek-VL2 batch 1, 4096 cached"),
    Case("decode_2k_v3", make_case(2048, 128), small=False, bench="DeepSeek-V3 batch 1, 2048 cached"),
)  # fmt: skip
