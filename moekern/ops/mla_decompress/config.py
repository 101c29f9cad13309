"""mla_decompress's launch configuration: a pure function of shape, element size and GPU.

S tokens, H heads, N nope width, V value width, R latent rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moekern._triton import Gpu


@dataclass(frozen=True)
class MlaDecompressConfig:
    """block_tokens x block_columns: the tile of a program, columns being rows of the weight of one head's key or value
    part. block_rank: of the rank per step. group_tokens: token blocks that a wave of programs shares the weight between.
    tma: operands through TMA descriptors, where the strides allow it."""

    block_tokens: int
    block_columns: int
    block_rank: int
    group_tokens: int
    num_warps: int
    num_stages: int
    tma: bool


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def column_tiles(nope: int, value: int, block_columns: int) -> int:
    """Tiles of one head: a tile never crosses from the key part into the value part."""
    return -(-nope // block_columns) + -(-value // block_columns)


@functools.lru_cache(maxsize=1024)
def choose(
    num_tokens: int,
    num_sequences: int,
    num_heads: int,
    nope: int,
    value: int,
    rank: int,
    itemsize: int,
    gpu: Gpu,
) -> MlaDecompressConfig:
    columns = min(128, max(16, next_power_of_2(max(nope, value))))
    step = max(16, next_power_of_2(rank))
    if itemsize == 4:
        # fp32 products are fused multiply-adds, 16 elements of the tile a thread: up to 152 registers. Wider tiles take
        # 255 and spill on some parts.
        return MlaDecompressConfig(64, min(64, columns), min(64, step), 8, 8, 2, False)
    # 128 columns where that wastes at most an eighth: 64-column tiles read the latent twice as often.
    if columns == 128 and 8 * column_tiles(nope, value, 128) * 128 > 9 * (nope + value):
        columns = 64
    tokens = 128 if num_tokens > 64 else 64  # 64 rows are what one warpgroup's instruction takes

    def programs() -> int:
        return num_sequences * -(-num_tokens // tokens) * num_heads * column_tiles(nope, value, columns)

    # Less than half a wave of programs: smaller tiles.
    if 2 * programs() <= gpu.num_sms:
        tokens = 64
    if 2 * programs() <= gpu.num_sms:
        columns = min(columns, 64)
    # Two programs on an SM, so that one stores while the other multiplies: each has half the shared memory for its
    # stages. With 227 KB that is 3 stages of 128 x 128 in steps of 64 (a 128-byte line); small tiles take longer steps,
    # as they wait for memory and not for the tensor cores. Parts with 99 KB take steps of 32.
    step = min(step, 32 if gpu.shared < 200 << 10 else 128 if tokens == 64 else 64)
    stages = max(2, min(4, (gpu.shared // 2 - 1024) // ((tokens + columns) * step * itemsize)))
    # With a spare stage there is one per step at most.
    stages = min(stages, max(2, -(-rank // step)))
    # sm_120 has TMA too, but its kernels keep barriers and descriptors on the stack there (8 bytes, Triton 3.6).
    tma = 90 <= gpu.capability < 120
    return MlaDecompressConfig(
        tokens, columns, step, 16, 8 if tokens * columns >= 128 * 128 else 4, stages, tma
    )


def candidates(
    num_tokens: int,
    num_sequences: int,
    num_heads: int,
    nope: int,
    value: int,
    rank: int,
    itemsize: int,
    gpu: Gpu,
) -> Iterator[MlaDecompressConfig]:
    """What the tuner tries: other tiles, stages and operand paths that fit the part."""
    picked = choose(num_tokens, num_sequences, num_heads, nope, value, rank, itemsize, gpu)
    yield from (replace(picked, group_tokens=g) for g in (1, 8, 32))
    if itemsize == 4:
        return
    if picked.tma:
        yield replace(picked, tma=False)
    for tokens, columns, warps in ((64, 64, 4), (128, 64, 4), (64, 128, 4), (128, 128, 8), (128, 256, 8)):
        for step in (32, 64, 128):
            fits = gpu.shared // 2 // ((tokens + columns) * step * itemsize)
            if fits >= 2 and step <= max(16, next_power_of_2(rank)):
                yield replace(picked, block_tokens=tokens, block_columns=columns, block_rank=step, num_warps=warps,
                              num_stages=min(4, fits))  # fmt: skip
