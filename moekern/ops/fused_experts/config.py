"""fused_experts' path and launch configuration: pure functions of shape, layout and device properties.

T tokens, E experts, K selected experts per token, D model width, F expert width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moekern._triton import Gpu

# A launch in a graph, from the last program of one kernel to the first bytes of the next. Few tokens take 2, the routed
# path at least 4.
LAUNCH_US = 2.5
L2_BYTES_PER_US = 5.5e6  # what 132 SMs read from the L2; a second read of weights takes this long at most
FEW_TOKENS = 16  # columns of two matrix instructions that take weights as their rows
STAGE_BYTES = 8 << 10  # of weights per stage of the ring of loads
# Twice what 3.35 TB/s * 1 us / 132 SMs asks for on an H100, about what 8 TB/s / 148 asks for on a B200.
BYTES_IN_FLIGHT = 48 << 10
MAX_STAGES = 7  # 6 buffers of at most 12 KB, inputs included: 72 of 99 KB on the smallest part


@dataclass(frozen=True)
class RoutedConfig:
    """route, grouped_gemm, grouped_gemm and combine, each of which chooses its own configuration."""


@dataclass(frozen=True)
class FewConfig:
    """The path without routing.

    block_t: token columns of the gate-up product, at least T. up_n, down_n: weight rows per program (gate and up
    together). up_k, down_k: elements of a weight row per stage."""

    block_t: int
    up_n: int
    up_k: int
    up_warps: int
    up_stages: int
    down_n: int
    down_k: int
    down_warps: int
    down_stages: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def repeated_pairs(num_tokens: int, num_experts: int, top_k: int) -> float:
    """Pairs whose expert another pair has already read, when tokens are routed evenly."""
    unread = max(0.0, 1 - top_k / max(1, num_experts)) ** num_tokens  # probability, of one expert
    return num_tokens * top_k - num_experts * (1 - unread)


def stages(num_programs: int, num_sms: int) -> int:
    """One buffer of a ring is computed on while the others load; up to four programs share an SM."""
    per_sm = min(4, max(1, num_programs // num_sms))
    return min(MAX_STAGES, 2 + -(-BYTES_IN_FLIGHT // (per_sm * STAGE_BYTES)))


def few_tokens(num_tokens: int, num_experts: int, top_k: int, d: int, f: int, dtype_bytes: int) -> bool:
    """Whether two launches that read W_down once per pair take less than the routed path's four."""
    if num_tokens > FEW_TOKENS:
        return False
    repeated = repeated_pairs(num_tokens, num_experts, top_k) * d * f * dtype_bytes
    return repeated / L2_BYTES_PER_US < 2 * LAUNCH_US


@functools.lru_cache(maxsize=4096)
def choose(num_tokens: int, num_experts: int, top_k: int, d: int, f: int, gated: bool, transposed: bool,
           dtype_bytes: int, gpu: Gpu) -> FewConfig | RoutedConfig:  # fmt: skip
    if not few_tokens(num_tokens, num_experts, top_k, d, f, dtype_bytes):
        return RoutedConfig()
    width = 2 * f if gated else f
    if transposed:
        # Rows of a tile are neighbours in memory: 64 in 16 bits are a cache line; 32 keep more programs in the down
        # product, which has one per token and block of D.
        up_n, down_n = 128 // dtype_bytes, 32
    else:
        # 32 rows are the matrix instructions of two warps; 16 where that leaves SMs with less than two programs, each of
        # which reads more than a few stages.
        up_n, down_n = 32, 16
        few_programs = num_tokens * top_k * -(-width // up_n) < 2 * gpu.num_sms
        if few_programs and up_n * d * dtype_bytes > 4 * STAGE_BYTES:
            up_n = 16
    up_programs = num_tokens * top_k * -(-width // up_n)
    return FewConfig(
        block_t=8 if num_tokens <= 8 else 16,
        up_n=up_n,
        up_k=STAGE_BYTES // (up_n * dtype_bytes),
        up_warps=min(
            2, up_n // 16
        ),  # with four, 64 rows by 16 columns would be one wgmma: shared memory once more
        up_stages=stages(up_programs, gpu.num_sms),
        down_n=down_n,
        down_k=STAGE_BYTES // (2 * down_n * dtype_bytes),  # two tiles a stage
        down_warps=2,
        down_stages=stages(num_tokens * -(-d // down_n), gpu.num_sms),
    )


def candidates(num_tokens: int, num_experts: int, top_k: int, d: int, f: int, gated: bool, transposed: bool,
               dtype_bytes: int, gpu: Gpu) -> Iterator[FewConfig | RoutedConfig]:  # fmt: skip
    """What the tuner tries: the other path, rows per program, stages."""
    yield RoutedConfig()
    if num_tokens > FEW_TOKENS:
        return
    # One token's configuration has every choice but the columns.
    picked = choose(1, num_experts, top_k, d, f, gated, transposed, dtype_bytes, gpu)
    assert isinstance(picked, FewConfig)
    picked = replace(picked, block_t=8 if num_tokens <= 8 else 16)
    for up_n in (16, 32, 64):
        for down_n in (16, 32):
            for num_stages in (4, 5, 7):
                yield replace(
                    picked, up_n=up_n, up_k=STAGE_BYTES // (up_n * dtype_bytes), up_warps=min(2, up_n // 16),
                    up_stages=num_stages, down_n=down_n, down_k=STAGE_BYTES // (2 * down_n * dtype_bytes),
                    down_stages=num_stages,
                )  # fmt: skip
