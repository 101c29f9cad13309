"""route in Triton: counts, prefix sums and a keyed scatter, all on integers; no sort.

N pairs, E experts. Few pairs: one launch, in which each program owns some experts and reads every id. More pairs: three
launches over P programs of consecutive pairs, `before` [P, E] between them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekern import _triton
from moekern.ops.route.config import BINS, BLOCKS, ONE_LAUNCH_PAIRS, RouteConfig, choose, several_launches

INT = torch.int32


@triton.jit
def _load_ids(ids_ptr, pair, num_pairs, num_experts):
    """int32 ids; -1 for an id outside [0, E) and for a pair beyond the last."""
    ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
    return tl.where((ids >= 0) & (ids < num_experts), ids, -1).to(tl.int32)


@triton.jit
def _route_fwd_kernel(
    ids_ptr,  # [N] int32 or int64
    perm_ptr,  # [N] int32
    offsets_ptr,  # [E + 1] int32
    counts_ptr,  # [E] int32
    num_pairs,
    num_experts,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_E
    e = first + tl.arange(0, BLOCK_E)
    i = tl.arange(0, CHUNK)

    # How many pairs come before those of this program's experts, belong to each of them, belong to any expert.
    before = tl.zeros([CHUNK], dtype=tl.int32)
    live = tl.zeros([CHUNK], dtype=tl.int32)
    counts = tl.zeros([BLOCK_E], dtype=tl.int32)
    for start in range(0, num_pairs, CHUNK):
        ids = _load_ids(ids_ptr, start + i, num_pairs, num_experts)
        before += ((ids >= 0) & (ids < first)).to(tl.int32)
        live += (ids >= 0).to(tl.int32)
        counts += tl.sum((ids[None, :] == e[:, None]).to(tl.int32), axis=1)
    num_live = tl.sum(live, axis=0)
    offsets = tl.sum(before, axis=0) + tl.cumsum(counts, axis=0) - counts
    tl.store(counts_ptr + e, counts, mask=e < num_experts)
    tl.store(offsets_ptr + e, offsets, mask=e < num_experts)
    tl.store(offsets_ptr + num_experts, num_live, mask=first == 0)

    next = offsets
    for start in range(0, num_pairs, CHUNK):
        pair = start + i
        ids = _load_ids(ids_ptr, pair, num_pairs, num_experts)
        hit = ids[None, :] == e[:, None]
        rank = tl.cumsum(hit.to(tl.int32), axis=1)
        tl.store(perm_ptr + next[:, None] + (rank - 1), tl.zeros_like(rank) + pair[None, :], mask=hit)
        next += tl.sum(hit.to(tl.int32), axis=1)
        # Behind the last expert's pairs; one program writes it.
        tl.store(perm_ptr + pair, tl.zeros_like(pair) - 1,
                 mask=(pair >= num_live) & (pair < num_pairs) & (first == 0))  # fmt: skip


@triton.jit
def _route_count_fwd_kernel(
    ids_ptr,  # [N]
    before_ptr,  # [P, E] int32: here the pairs of each expert in each program
    num_pairs,
    num_experts,
    num_chunks,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for c in range(num_chunks):
        pair = (p * num_chunks + c) * CHUNK + tl.arange(0, CHUNK)
        ids = _load_ids(ids_ptr, pair, num_pairs, num_experts)
        counts += tl.histogram(tl.where(ids >= 0, ids, 0), BINS, mask=ids >= 0)
    e = tl.arange(0, BINS)
    tl.store(before_ptr + p * num_experts + e, counts, mask=e < num_experts)


@triton.jit
def _route_prefix_fwd_kernel(
    before_ptr,  # [P, E] int32: becomes the pairs of each expert in the programs before
    counts_ptr,  # [E] int32
    num_programs,
    num_experts,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    for start in range(0, num_programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = before_ptr + p.to(tl.int64)[:, None] * num_experts + e[None, :]
        mask = (p < num_programs)[:, None] & (e < num_experts)[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + e, total, mask=e < num_experts)


@triton.jit
def _route_scatter_fwd_kernel(
    ids_ptr,  # [N]
    before_ptr,  # [P, E] int32
    counts_ptr,  # [E] int32
    perm_ptr,  # [N] int32
    offsets_ptr,  # [E + 1] int32
    num_pairs,
    num_experts,
    num_chunks,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + e, mask=e < num_experts, other=0)
    offsets = tl.cumsum(counts, axis=0) - counts
    num_live = tl.sum(counts, axis=0)
    tl.store(offsets_ptr + e, offsets, mask=(e < num_experts) & (p == 0))
    tl.store(offsets_ptr + num_experts, num_live, mask=p == 0)

    next = offsets + tl.load(before_ptr + p * num_experts + e, mask=e < num_experts, other=0)
    i = tl.arange(0, CHUNK)
    for c in range(num_chunks):
        pair = (p * num_chunks + c) * CHUNK + i
        ids = _load_ids(ids_ptr, pair, num_pairs, num_experts)
        kept = ids >= 0
        bin = tl.where(kept, ids, 0)
        # A pair's rank among those of its expert: CHUNK comparisons, however many experts there are.
        rank = tl.sum(((ids[:, None] == ids[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), axis=1)
        tl.store(perm_ptr + tl.gather(next, bin, axis=0) + rank, pair.to(tl.int32), mask=kept)
        next += tl.histogram(bin, BINS, mask=kept)
        tl.store(
            perm_ptr + pair, tl.full([CHUNK], -1, tl.int32), mask=(pair >= num_live) & (pair < num_pairs)
        )


def run(ids: Tensor, num_experts: int, config: RouteConfig | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """perm, offsets and counts of ids [T, K]."""
    ids = ids.contiguous()
    n = ids.numel()
    config = config or choose(n, num_experts, _triton.gpu_of(ids.device))
    perm, offsets, counts = (ids.new_empty(size, dtype=INT) for size in (n, num_experts + 1, num_experts))
    grid_e = (triton.cdiv(num_experts, config.block_experts),)
    with _triton.guard(ids):
        if config.num_chunks == 0:
            _route_fwd_kernel[grid_e](ids, perm, offsets, counts, n, num_experts, CHUNK=config.chunk,
                                      BLOCK_E=config.block_experts, num_warps=config.num_warps)  # fmt: skip
            return perm, offsets, counts
        # At least one program: it writes the offsets.
        num_programs = max(1, triton.cdiv(n, config.chunk * config.num_chunks))
        before = ids.new_empty((num_programs, num_experts), dtype=INT)
        sizes = {"CHUNK": config.chunk, "BINS": config.bins, "num_warps": config.num_warps}
        grid = (num_programs,)
        _route_count_fwd_kernel[grid](ids, before, n, num_experts, config.num_chunks, **sizes)
        _route_prefix_fwd_kernel[grid_e](before, counts, num_programs, num_experts, BLOCK_P=32,
                                         BLOCK_E=config.block_experts)  # fmt: skip
        _route_scatter_fwd_kernel[grid](
            ids, before, counts, perm, offsets, n, num_experts, config.num_chunks, **sizes
        )
    return perm, offsets, counts


_TYPES = {"num_pairs": "i32", "num_experts": "i32", "num_chunks": "i32", "num_programs": "i32"}


def _variant(
    kernel: object, name: str, ids: str, constants: dict[str, int], num_warps: int = 4
) -> _triton.Variant:
    arguments = [n for n in kernel.arg_names if n not in constants]  # type: ignore[attr-defined]
    types = {n: _TYPES.get(n, f"*{ids}" if n == "ids_ptr" else "*i32") for n in arguments}
    return _triton.Variant(
        name=f"{name} {ids}", kernel=kernel, types=types, constants=constants, num_warps=num_warps,
        aligned=tuple(n for n in arguments if n.endswith("_ptr")), worst=ids == "i64",
    )  # fmt: skip


def aot_variants(gpu: _triton.Gpu) -> Iterator[_triton.Variant]:
    """Specialisations for the static gate: every configuration that `choose` returns."""
    sizes = [(n, e) for n in (*BLOCKS, ONE_LAUNCH_PAIRS) for e in (1, BINS[-1])]
    single = {choose(n, e, gpu): None for n, e in sizes}
    for ids in ("i64", "i32"):
        for c in single:
            constants = {"CHUNK": c.chunk, "BLOCK_E": c.block_experts}
            yield _variant(_route_fwd_kernel, f"N{c.chunk} E{c.block_experts}", ids, constants, c.num_warps)
        for bins in BINS:
            c = several_launches(bins, 1)
            constants = {"CHUNK": c.chunk, "BINS": c.bins}
            for kernel in (_route_count_fwd_kernel, _route_scatter_fwd_kernel):
                yield _variant(kernel, f"N{c.chunk} E{c.bins}", ids, constants, c.num_warps)
    yield _variant(
        _route_prefix_fwd_kernel, f"E{c.block_experts}", "i64", {"BLOCK_P": 32, "BLOCK_E": c.block_experts}
    )
