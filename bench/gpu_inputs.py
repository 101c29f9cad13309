"""Inputs of the GPU cases: random data, in as many sets as four times the L2 holds, so that no set comes from the cache.

T tokens, D model width, F expert width, E experts, K selected experts, B batch, S cached positions, H heads, R latent
rank, N nope width, P rope width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CACHES = 4  # times the L2
# Router logits of one token fill no cache: they come from it, as they do behind the GEMM that wrote them.
MAX_SETS = 512


@dataclass
class Source:
    """Where a case's tensors come from. cache_bytes: the size of the L2."""

    generator: torch.Generator
    device: torch.device
    cache_bytes: int
    dtype: torch.dtype = torch.bfloat16

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        found = torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        return found if scale == 1.0 else found.mul_(scale)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def sets(self, touched: int) -> int:
        """How many sets of `touched` bytes are four times the L2."""
        return max(2, min(MAX_SETS, -(-CACHES * self.cache_bytes // max(touched, 1))))


def distinct(T: int, E: int, K: int, log_weights: Tensor, source: Source) -> Tensor:
    """[T, K] ids, the K of a token distinct, drawn one after the other with probabilities exp(log_weights)."""
    gumbel = -torch.log(-torch.log(source.rand(T, E).clamp(1e-9, 1 - 1e-7)))
    return (gumbel + log_weights).topk(K, dim=-1).indices


def deck(sets: int, T: int, E: int, K: int, source: Source) -> list[Tensor]:
    """Uniform ids for few tokens: dealt from shuffled decks, so that no expert comes again before all others came."""
    per_set = T * K
    cards = torch.cat([source.rand(E).argsort() for _ in range(-(-sets * per_set // E))])
    dealt = cards[: sets * per_set].view(sets, T, K)
    # A set across the seam of two decks may hold an expert twice in one token: routers never do that.
    found = []
    for ids in dealt.unbind():
        ordered = ids.sort(dim=-1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=-1, keepdim=True)
        fresh = source.rand(T, E).topk(K, dim=-1).indices
        found.append(torch.where(repeated, fresh, ids).contiguous())
    return found


def draw_ids(kind: str, sets: int, T: int, E: int, K: int, source: Source) -> list[Tensor]:
    """Ids of `sets` batches. zipf: expert e is chosen with weight 1 / (e + 1). half: expert 0 has half of all pairs, each
    drawn by itself, as no router would: with distinct experts a share of 1/K is the most."""
    if kind == "uniform" and T * K <= E:
        return deck(sets, T, E, K, source)
    flat = torch.zeros(E, device=source.device)
    if kind == "uniform":
        return [distinct(T, E, K, flat, source) for _ in range(sets)]
    if kind == "zipf":
        ranks = torch.arange(1, E + 1, device=source.device, dtype=torch.float32)
        return [distinct(T, E, K, -ranks.log(), source) for _ in range(sets)]
    if kind == "half":
        others = [1 + (source.rand(T, K) * (E - 1)).long().clamp(max=E - 2) for _ in range(sets)]
        return [torch.where(source.rand(T, K) < 0.5, 0, ids) for ids in others]
    raise ValueError(f"draw_ids: kind must be uniform, zipf or half; got {kind!r}")


def fused_experts(
    source: Source, T: int, D: int, F: int, E: int, K: int, routing: str
) -> list[dict[str, Any]]:
    expert = 3 * D * F * 2
    copies = max(1, -(-CACHES * source.cache_bytes // (E * expert)))
    weights = [
        (source.randn(E, 2 * F, D, scale=D**-0.5), source.randn(E, D, F, scale=F**-0.5))
        for _ in range(copies)
    ]
    count = max(copies, source.sets(min(T * K, E) * expert))
    ids = draw_ids(routing, count, T, E, K, source)
    return [
        {"x": source.randn(T, D), "w_gate_up": weights[i % copies][0], "w_down": weights[i % copies][1],
         "weights": source.rand(T, K).softmax(-1), "ids": ids[i]}
        for i in range(count)
    ]  # fmt: skip


def grouped_gemm(source: Source, T: int, D: int, F: int, E: int, K: int) -> list[dict[str, Any]]:
    """The first product of an expert layer: rows gathered by token, gate and up with their activation."""
    sets = fused_experts(source, T, D, F, E, K, "uniform")
    found = []
    for arguments in sets:
        ids = arguments["ids"].flatten()
        order = ids.sort(stable=True)
        offsets = torch.searchsorted(order.values, torch.arange(E + 1, device=ids.device))
        found.append({
            "x": arguments["x"], "weight": arguments["w_gate_up"], "offsets": offsets.int(),
            "gather": (order.indices // K).int(), "activation": "silu", "gated": True,
        })  # fmt: skip
    return found


def gate_topk(source: Source, T: int, E: int, K: int) -> list[dict[str, Any]]:
    count = source.sets(2 * T * E)
    return [{"logits": x, "top_k": K, "renormalize": True} for x in source.randn(count, T, E).unbind()]


def gate(source: Source, T: int, D: int, E: int, K: int) -> list[dict[str, Any]]:
    count = source.sets(2 * D * (T + E))
    return [
        {
            "x": source.randn(T, D),
            "weight": source.randn(E, D, scale=D**-0.5),
            "top_k": K,
            "renormalize": True,
        }
        for _ in range(count)
    ]


def route(source: Source, T: int, E: int, K: int) -> list[dict[str, Any]]:
    zeros = torch.zeros(E, device=source.device)
    count = source.sets(8 * T * K)
    return [{"ids": distinct(T, E, K, zeros, source), "num_experts": E} for _ in range(count)]


def combine(source: Source, T: int, D: int, K: int) -> list[dict[str, Any]]:
    count = source.sets(2 * T * D * (K + 1))
    return [{"y": source.randn(T * K, D), "weights": source.rand(T, K).softmax(-1)} for _ in range(count)]


def mla_decode(
    source: Source, B: int, S: int, H: int, R: int, P: int, N: int, V: int
) -> list[dict[str, Any]]:
    count = source.sets(2 * (B * S * (R + P) + H * (N + V) * R))
    return [
        {"q": source.randn(B, 1, H, N + P), "latent": source.randn(B, S, R), "k_rope": source.randn(B, S, P),
         "w_kv_b": source.randn(H * (N + V), R, scale=R**-0.5), "scale": (N + P) ** -0.5}
        for _ in range(count)
    ]  # fmt: skip


def mla_decompress(
    source: Source, B: int, S: int, H: int, R: int, P: int, N: int, V: int
) -> list[dict[str, Any]]:
    count = source.sets(2 * (B * S * (R + P + H * (2 * N + P)) + H * (N + V) * R))
    return [
        {"latent": source.randn(B, S, R), "k_rope": source.randn(B, S, P),
         "w_kv_b": source.randn(H * (N + V), R, scale=R**-0.5), "num_heads": H, "nope_dim": N}
        for _ in range(count)
    ]  # fmt: skip


def mla_cache_write(source: Source, T: int, R: int, P: int, **_: int) -> list[dict[str, Any]]:
    slots = 4 * max(T, 64)
    count = source.sets(2 * 2 * T * (R + P))
    angle = source.rand(T, P // 2) * 6.28
    return [
        {"kv": source.randn(T, R + P), "norm_weight": source.randn(R, scale=0.1) + 1, "cos": angle.cos(),
         "sin": angle.sin(), "latent_cache": source.randn(slots, R), "rope_cache": source.randn(slots, P),
         "slots": source.rand(slots).argsort()[:T]}
        for _ in range(count)
    ]  # fmt: skip


INPUTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "fused_experts": fused_experts, "grouped_gemm": grouped_gemm, "gate_topk": gate_topk, "gate": gate, "route": route,
    "combine": combine, "mla_decode": mla_decode, "mla_decompress": mla_decompress, "mla_cache_write": mla_cache_write,
}  # fmt: skip


def make(op: str, shape: Mapping[str, Any], source: Source) -> list[dict[str, Any]]:
    """The sets of inputs of a case: arguments of the op by keyword."""
    return INPUTS[op](source, **shape)
