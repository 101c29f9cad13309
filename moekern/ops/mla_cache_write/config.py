"""mla_cache_write's launch configuration: a pure function of shape and SM count."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

VALUES_PER_LANE = 32  # of a row's latent, held in fp32 registers between the load and the store


@dataclass(frozen=True)
class MlaCacheWriteConfig:
    """block_tokens: rows per program. num_warps: warps per program."""

    block_tokens: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.lru_cache(maxsize=1024)
def choose(num_tokens: int, rank: int, num_sms: int) -> MlaCacheWriteConfig:
    # A row of 512 is one warp: the norm's sum needs no barrier, and 16 such programs on an SM have 18 KB of bf16 rows in
    # flight, about what 3.35 TB/s / 132 SMs x 700 ns asks for. Longer rows take more warps, shorter ones share a program
    # once there are more rows than that.
    block_rank = next_power_of_2(rank)
    num_warps = min(8, max(1, block_rank // (32 * VALUES_PER_LANE)))
    block_tokens = min(8, max(1, 512 // block_rank))
    while block_tokens > 1 and num_tokens < 16 * num_sms * block_tokens:
        block_tokens //= 2
    return MlaCacheWriteConfig(block_tokens, num_warps)


def candidates(num_tokens: int, rank: int, num_sms: int) -> Iterator[MlaCacheWriteConfig]:
    """What the tuner tries: other numbers of rows and warps per program."""
    picked = choose(num_tokens, rank, num_sms)
    block_rank = next_power_of_2(rank)
    for num_warps in sorted({max(1, picked.num_warps // 2), picked.num_warps, 2 * picked.num_warps, 4}):
        for block_tokens in (1, 2, 4, 8):
            if block_tokens * block_rank <= 64 * 32 * num_warps:  # 64 fp32 values a lane
                yield replace(picked, block_tokens=block_tokens, num_warps=num_warps)
