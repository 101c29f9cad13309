"""route's launch configuration: a pure function of the shape and the GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moekern import _triton

# Up to here every program of one launch reads all ids, twice: 4096 int64 are 32 KB, 0.5 us of an SM's 64 bytes a clock.
# Two more launches, which is what it saves, are 2 us and more inside a CUDA graph.
ONE_LAUNCH_PAIRS = 4096
BLOCKS = (16, 64, 128, 512)  # pairs at a time in one launch; few values, because each is compiled on its own
ONE_HOT = 2048  # (expert, pair) comparisons at a time: 16 a thread at 4 warps, each with a 64-bit address
CHUNK = 128  # pairs that are compared with each other: CHUNK compares a pair, 128 a thread at 4 warps
BINS = (256, 1024, 4096)  # counters of a program; the last bounds E
MAX_EXPERTS = BINS[-1]


@dataclass(frozen=True)
class RouteConfig:
    """chunk: pairs that a program holds at a time. block_experts: experts of a program (of the prefix sum where there are
    several launches). num_chunks: chunks of a program; 0 for one launch, whose programs see every pair. bins: counters
    of a program in several launches."""

    chunk: int
    block_experts: int
    num_chunks: int = 0
    bins: int = 0
    num_warps: int = 4


@functools.lru_cache
def choose(num_pairs: int, num_experts: int, gpu: _triton.Gpu) -> RouteConfig:
    if num_pairs <= ONE_LAUNCH_PAIRS:
        chunk = next((b for b in BLOCKS if num_pairs <= b), BLOCKS[-1])
        # At least 8 experts a program, for every program reads every id. 64 or more are halved to fit E, but no further,
        # because every size is compiled on its own.
        block_experts = max(8, ONE_HOT // chunk)
        while block_experts > 64 and block_experts >= 2 * num_experts:
            block_experts //= 2
        return RouteConfig(chunk, block_experts)
    # Two programs an SM. More would not be faster, and the prefix sum runs over num_programs rows of E counters.
    num_chunks = -(-num_pairs // (2 * gpu.num_sms * CHUNK))
    return several_launches(num_experts, num_chunks)


def several_launches(num_experts: int, num_chunks: int, chunk: int = CHUNK) -> RouteConfig:
    return RouteConfig(chunk, 32, num_chunks, next(b for b in BINS if num_experts <= b))


def candidates(num_pairs: int, num_experts: int, gpu: _triton.Gpu) -> Iterator[RouteConfig]:
    """What the tuner tries: both structures near the boundary, and other sizes of each."""
    if num_pairs <= 8 * ONE_LAUNCH_PAIRS:
        for chunk in BLOCKS:
            for block_experts in (8, 16, 64, 256):
                if chunk * block_experts <= 2 * ONE_HOT and num_pairs <= 64 * chunk:
                    yield RouteConfig(chunk, block_experts)
    if num_pairs >= ONE_LAUNCH_PAIRS // 8:
        for programs_per_sm in (1, 2, 4):
            for chunk in (64, 128, 256):
                num_chunks = max(1, -(-num_pairs // (programs_per_sm * gpu.num_sms * chunk)))
                yield replace(several_launches(num_experts, num_chunks, chunk), num_warps=max(2, chunk // 32))
