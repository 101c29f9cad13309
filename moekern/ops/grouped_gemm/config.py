"""grouped_gemm's launch configuration: a pure function of shapes and device properties.

M rows, E experts, N columns of the product (2F when gated), D width of a row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moekern._triton import Gpu

STREAM = (
    25e3  # bytes per us that one SM streams from memory: H100 3.35 TB/s / 132; A100 has 18.5e3, B200 54e3
)
SECOND_LAUNCH = 3.0  # us that another kernel adds in a stream: its launch, and the drain of the one before
MAX_SPLIT = 16
MIN_SPLIT_BLOCKS = 4  # k blocks per split: fewer do not fill the ring of loads
MAX_PARTIALS = (
    32 << 20
)  # bytes of fp32 partial products: they are to stay in the L2 (40 MB and more on data-center parts)
BESIDE_RING = 4 << 10  # bytes of shared memory for barriers and for the reductions that find a tile


@dataclass(frozen=True)
class GroupedGemmConfig:
    """block_m rows x block_n product columns (gate and up together) x block_k. swap: the weights are the M operand of
    the matrix instruction. split_k: programs that share the sum of one tile. tma: tensor descriptors where the tensors
    allow them. group_m: row blocks that run side by side before the next column block. programs_per_sm: of a
    persistent grid; 0 is a program per tile."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    split_k: int = 1
    tma: bool = False
    group_m: int = 1
    programs_per_sm: int = 0


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def max_row_blocks(num_rows: int, num_experts: int, block_m: int) -> int:
    """Row blocks of the worst routing: a partial one in every segment, the rows before and after them included."""
    return min(num_rows, num_rows // block_m + num_experts + 2)


def ring_bytes(config: GroupedGemmConfig, dtype_bytes: int) -> int:
    """Shared memory of the stages that x and weight tiles pass through."""
    return config.num_stages * (config.block_m + config.block_n) * config.block_k * dtype_bytes


@functools.lru_cache(maxsize=4096)
def choose(num_rows: int, num_experts: int, n: int, d: int, dtype_bytes: int, gated: bool, gpu: Gpu) -> GroupedGemmConfig:  # fmt: skip
    # Rows of an expert that has any, when routing is even: of few rows each has an expert to itself.
    rows = num_rows / max(1.0, _active(num_rows, num_experts))
    if dtype_bytes == 4:
        # No matrix instruction without TF32: FFMA reads both operands from shared memory, and 64 x 64 is what 4 warps
        # keep in registers beside the fragments.
        return GroupedGemmConfig(16 if rows <= 8 else 64, 64, 32, num_warps=4, num_stages=3, group_m=8)
    # Below some 200 rows per expert a weight is read from memory for longer than it is multiplied, so a row block is
    # to hold all rows of most experts: twice the average, for the weights come once per row block.
    if rows <= 16:
        return _few_rows(num_rows, num_experts, n, d, 16 if rows <= 8 else 32, gpu)
    if rows <= 40:
        # 64 x 128: two programs fit an SM (24 KiB a stage), so one multiplies while the other stores.
        return GroupedGemmConfig(64, 128, 64, num_warps=4, num_stages=4 if gpu.shared > 128 << 10 else 3,
                                 tma=_tma(gpu), group_m=4)  # fmt: skip
    return _many_rows(num_rows, num_experts, n, gated, gpu)


def _tma(gpu: Gpu) -> bool:
    """wgmma and tcgen05 read both operands from shared memory, where descriptors put them. mma.sync (sm_120) wants them
    in registers, as after cp.async, and has none to spare for the descriptors' coordinates."""
    return 90 <= gpu.capability < 120


def _active(num_rows: int, num_experts: int) -> float:
    """Expected number of experts that have rows, when each row goes to any of them."""
    return num_experts * (1 - (1 - 1 / num_experts) ** num_rows) if num_experts > 1 else 1.0


def _few_rows(num_rows: int, num_experts: int, n: int, d: int, block_m: int, gpu: Gpu) -> GroupedGemmConfig:
    """The weights stream through once, and that is the time it takes."""
    # 128 columns x 64: 16 KiB a stage. An SM has to have 3.35 TB/s x 1 us / 132 = 25 KiB in flight; programs of 72 KiB
    # have 48, and 2 or 3 of them fit an SM. Pointers, not descriptors: encoding one takes the host longer than the
    # copies' addresses take the SM, which idles here anyway.
    # wgmma and tcgen05 have 64 rows at least: with the operands swapped those are weights, and gate and up of a column
    # (rows r and r + 64) are in one thread. mma.sync has 16, enough as it is.
    config = GroupedGemmConfig(block_m, 128, 64, num_warps=4, num_stages=4 if gpu.shared > 128 << 10 else 3,
                               swap=_tma(gpu))  # fmt: skip
    tiles = _active(num_rows, num_experts) * cdiv(n, config.block_n)
    best, best_time = 1, math.inf
    split = 1
    while split <= MAX_SPLIT and (split == 1 or d >= split * MIN_SPLIT_BLOCKS * config.block_k):
        partials = split * num_rows * n * 4
        # The SM with the most programs ends last. A split adds a launch, and partials written and read.
        time = math.ceil(tiles * split / gpu.num_sms) * config.block_n * d * 2 / split / STREAM
        time += (SECOND_LAUNCH + 2 * partials / (STREAM * gpu.num_sms)) if split > 1 else 0.0
        if time < best_time and (split == 1 or partials <= MAX_PARTIALS):
            best, best_time = split, time
        split *= 2
    return replace(config, split_k=best)


def _many_rows(num_rows: int, num_experts: int, n: int, gated: bool, gpu: Gpu) -> GroupedGemmConfig:
    """128-row blocks. A 128 x 256 tile reads 48 KiB per 128 x 256 x 64 products, two thirds of what 128 x 128 tiles do:
    at 800 TFLOP/s 9 TB/s from the L2, which is about what it gives."""
    if gpu.shared < 128 << 10:
        # 48 KiB a program, so that two share an SM: 4 warps with 128 accumulators a thread leave half of the registers.
        return GroupedGemmConfig(128, 128, 32, num_warps=4, num_stages=4, group_m=_group(gpu.num_sms, 128, 128),
                                 programs_per_sm=2)  # fmt: skip
    row_blocks = min(num_rows / 128 + num_experts / 2, max_row_blocks(num_rows, num_experts, 128))
    if row_blocks * cdiv(n, 256) < gpu.num_sms:  # not one wave: smaller tiles reach more SMs
        return GroupedGemmConfig(128, 128, 64, num_warps=8, num_stages=4, tma=_tma(gpu), group_m=8)
    if gpu.capability < 90:
        return GroupedGemmConfig(128, 256, 32, num_warps=8, num_stages=4, group_m=_group(gpu.num_sms, 128, 256),
                                 programs_per_sm=1)  # fmt: skip
    if gated and gpu.capability >= 100:
        # 128 accumulators a thread come out of tensor memory as one row; with both biases of interleaved gate and up
        # that spills (128 x 256 with 8 warps, 128 x 128 with 4), so here a thread has 64.
        return GroupedGemmConfig(128, 128, 64, num_warps=8, num_stages=4, tma=True,
                                 group_m=_group(gpu.num_sms, 128, 128), programs_per_sm=1)  # fmt: skip
    return GroupedGemmConfig(128, 256, 64, num_warps=8, num_stages=4, tma=True,
                             group_m=_group(gpu.num_sms, 128, 256), programs_per_sm=1)  # fmt: skip


def _group(num_sms: int, block_m: int, block_n: int) -> int:
    """Row blocks side by side so that the tiles of one wave, g by num_sms / g, read the least: g * block_m of x and
    num_sms / g * block_n of the weights."""
    return 1 << round(math.log2(math.sqrt(num_sms * block_n / block_m)))


def candidates(num_rows: int, num_experts: int, n: int, d: int, dtype_bytes: int, gated: bool, gpu: Gpu) -> Iterator[GroupedGemmConfig]:  # fmt: skip
    """What the tuner tries for this call: its own kind with other splits, stages and grids, and the other kinds."""
    picked = choose(num_rows, num_experts, n, d, dtype_bytes, gated, gpu)
    found = {picked: None}
    if dtype_bytes == 4:
        found.update({replace(picked, block_m=m, block_n=b): None for m in (16, 32, 64) for b in (32, 64)})
    else:
        for split in (1, 2, 4, 8):
            for block_m in (16, 32):
                found[replace(_few_rows(num_rows, num_experts, n, d, block_m, gpu), split_k=split)] = None
        if _tma(gpu):
            found[replace(_few_rows(num_rows, num_experts, n, d, 16, gpu), tma=True, split_k=1)] = None
        for block_m, block_n, warps in (
            (64, 128, 4),
            (64, 256, 8),
            (128, 128, 4),
            (128, 128, 8),
            (128, 256, 8),
        ):
            for per_sm in (0, 1):
                found[GroupedGemmConfig(block_m, block_n, 64 if gpu.shared > 128 << 10 else 32, warps, 3,
                                        tma=_tma(gpu), group_m=_group(gpu.num_sms, block_m, block_n),
                                        programs_per_sm=per_sm)] = None  # fmt: skip
        found.update({replace(picked, num_stages=s): None for s in (3, 4, 5)})
        found.update({replace(picked, group_m=g): None for g in (1, 4, 16)})
    for config in found:
        if ring_bytes(config, dtype_bytes) + BESIDE_RING <= gpu.shared and (
            config.split_k == 1 or config.split_k * num_rows * n * 4 <= MAX_PARTIALS
        ):
            yield config
