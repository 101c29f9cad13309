"""gate_topk's launch configuration: a pure function of shape and SM count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

KEYS_PER_LANE = 16  # selection keys that a lane holds in registers before a row is spread over another warp


@dataclass(frozen=True)
class GateTopkConfig:
    """block_experts: padded slots of a row, num_groups x next power of two of the group size, each a power of two.
    block_tokens: rows per program. num_warps: warps per program."""

    block_experts: int
    block_tokens: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def choose(num_tokens: int, num_experts: int, num_groups: int, num_sms: int) -> GateTopkConfig:
    block_experts = next_power_of_2(num_groups) * next_power_of_2(num_experts // num_groups)
    num_warps = max(1, block_experts // (32 * KEYS_PER_LANE))
    # Rows shorter than 256 slots leave lanes with less than a 16-byte load; several rows per program shorten the
    # reductions too (fewer lanes a row). Only when that still leaves 4 programs per SM to hide latency.
    block_tokens = min(16, max(1, 256 // block_experts))
    while block_tokens > 1 and num_tokens < 4 * num_sms * block_tokens:
        block_tokens //= 2
    return GateTopkConfig(block_experts, block_tokens, num_warps)


def candidates(num_tokens: int, num_experts: int, num_groups: int, num_sms: int) -> Iterator[GateTopkConfig]:
    """What the tuner tries: other numbers of rows and warps per program; the slots of a row are given by the shape."""
    picked = choose(num_tokens, num_experts, num_groups, num_sms)
    for num_warps in sorted({max(1, picked.num_warps // 2), picked.num_warps, 2 * picked.num_warps}):
        for block_tokens in (1, 2, 4, 8, 16):
            # Beyond 8192 slots a program the keys no longer fit in registers.
            if block_tokens * picked.block_experts <= max(8192, picked.block_experts):
                yield replace(picked, block_tokens=block_tokens, num_warps=num_warps)
