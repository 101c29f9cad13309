"""combine's launch configuration: a pure function of the shape and the GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from moekern import _triton

LOAD_BYTES = 16  # a thread loads at a time


@dataclass(frozen=True)
class CombineConfig:
    """block_d: columns per program. unroll: rows whose loads are in flight together. num_warps: warps per program."""

    block_d: int
    unroll: int
    num_warps: int


def unroll_of(top_k: int) -> int:
    """All rows of a token up to 8, which is 32 registers of data; more in rounds of 8."""
    return max(1, min(top_k, 8))


@functools.lru_cache
def choose(num_tokens: int, top_k: int, width: int, element_size: int, gpu: _triton.Gpu) -> CombineConfig:
    columns = 32 * LOAD_BYTES // element_size  # of a warp
    # Four warps a program: 16 of them fill an SM's 64 warps. Fewer where that would leave less than two programs for each
    # SM (one token of width 2048 becomes 8 programs of a warp), and for rows that half of them cover.
    num_warps = 4
    while num_warps > 1 and (
        num_tokens * -(-width // (columns * num_warps)) < 2 * gpu.num_sms or columns * num_warps >= 2 * width
    ):
        num_warps //= 2
    return CombineConfig(columns * num_warps, unroll_of(top_k), num_warps)


def candidates(
    num_tokens: int, top_k: int, width: int, element_size: int, gpu: _triton.Gpu
) -> Iterator[CombineConfig]:
    """What the tuner tries: programs of every width, with one load a thread and row or two."""
    for num_warps in (1, 2, 4, 8):
        for loads in (1, 2):
            block_d = 32 * num_warps * loads * LOAD_BYTES // element_size
            for unroll in sorted({unroll_of(top_k), max(1, unroll_of(top_k) // 2)}):
                yield CombineConfig(block_d, unroll, num_warps)
