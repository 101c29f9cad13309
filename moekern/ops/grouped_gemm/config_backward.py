"""Launch configurations of grouped_gemm's backward: pure functions of shape, element size and part."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moekern._triton import Gpu

MIN_CHUNK = 512  # rows a split keeps: below, reading fp32 partials costs more than the idle SMs
SHARED_MARGIN = 2 << 10  # bytes beside the operand tiles: barriers, the gathered indices


@dataclass(frozen=True)
class WeightGradConfig:
    """block_a x block_b: the tile of an expert's gradient; block_k: rows of a step. splits: an expert with more than
    1/splits of all rows is cut; 1 cuts none."""

    block_a: int
    block_b: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int

    def shared(self, element_size: int) -> int:
        return self.num_stages * self.block_k * (self.block_a + self.block_b) * element_size


@dataclass(frozen=True)
class RowsConfig:
    """block_rows x block_columns: what a program of a row-wise kernel holds at a time. splits: as above, of column
    sums."""

    block_rows: int
    block_columns: int
    num_warps: int
    splits: int = 1


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _tile(a: int, b: int, element_size: int, gpu: Gpu) -> WeightGradConfig:
    if element_size == 4:
        # No TF32: the products run on FMA units, where a 64 x 64 tile leaves registers for the operands.
        return WeightGradConfig(64, 64, 16, 1, 4, 2)
    if a <= 64 or b <= 64:
        return WeightGradConfig(64, 64, 64, 1, 4, 3)
    if gpu.capability in (90, 100):
        # A 128 x 256 accumulator halves the reads of one operand; 8 warps hold it in 128 registers a thread (sm_90),
        # tensor memory does on sm_100. 4 stages take 192 KB of 227; of the narrower tile two blocks of 3 fit.
        return WeightGradConfig(128, 256, 64, 1, 8, 4) if b > 128 else WeightGradConfig(128, 128, 64, 1, 8, 3)
    # HMMA reads its operands from shared memory at once, so 4 stages are 3 buffers: 48 KB, and two blocks fit in 99 KB.
    return WeightGradConfig(128, 128, 32, 1, 8, 4)


@functools.lru_cache(maxsize=4096)
def choose_dw(num_rows: int, a: int, b: int, element_size: int, gpu: Gpu) -> WeightGradConfig:
    """For [E, a, b] gradients from num_rows rows."""
    tile = _tile(a, b, element_size, gpu)
    tiles = _cdiv(a, tile.block_a) * _cdiv(b, tile.block_b)
    # If one expert got every row, its tiles alone would have to fill the machine.
    return replace(tile, splits=max(1, min(_cdiv(gpu.num_sms, tiles), num_rows // MIN_CHUNK)))


def candidates_dw(num_rows: int, a: int, b: int, element_size: int, gpu: Gpu) -> Iterator[WeightGradConfig]:
    picked = choose_dw(num_rows, a, b, element_size, gpu)
    if element_size == 4:
        tiles = [(64, 64, 16, 4), (64, 64, 32, 4), (32, 64, 32, 4)]
    else:
        tiles = [(64, 64, 64, 4), (64, 128, 64, 4), (128, 64, 64, 4), (128, 128, 32, 8), (128, 128, 64, 8)]
        tiles += [(128, 256, 64, 8), (256, 128, 64, 8)] if gpu.capability in (90, 100) else []
    for block_a, block_b, block_k, num_warps in tiles:
        for num_stages in (2, 3, 4):
            for splits in sorted({1, picked.splits} if num_stages == 3 else {picked.splits}):
                found = WeightGradConfig(block_a, block_b, block_k, splits, num_warps, num_stages)
                if found.shared(element_size) + SHARED_MARGIN <= gpu.shared:
                    yield found


@functools.lru_cache(maxsize=4096)
def choose_activation_backward(num_rows: int, width: int, num_sms: int) -> RowsConfig:
    """For gradients of [num_rows, width] activations."""
    # A row's sum stays in one program, so that its order is fixed; 4 rows while that fills the machine.
    block_rows = 4 if num_rows >= 16 * num_sms else 1
    return RowsConfig(block_rows, 256 if width > 128 else 128, 4)


def candidates_activation_backward(num_rows: int, width: int, num_sms: int) -> Iterator[RowsConfig]:
    for block_rows in (1, 2, 4, 8):
        for block_columns in (128, 256, 512, 1024):
            if block_rows * block_columns <= 2048:
                yield RowsConfig(block_rows, block_columns, 4)


@functools.lru_cache(maxsize=4096)
def choose_column_sum(num_rows: int, width: int, num_sms: int) -> RowsConfig:
    """For sums over each expert's rows, width columns."""
    block_columns = 128 if width > 64 else 64
    splits = max(1, min(_cdiv(num_sms, _cdiv(width, block_columns)), num_rows // MIN_CHUNK))
    return RowsConfig(32, block_columns, 4, splits)


def candidates_column_sum(num_rows: int, width: int, num_sms: int) -> Iterator[RowsConfig]:
    picked = choose_column_sum(num_rows, width, num_sms)
    for block_rows in (16, 32, 64):
        for block_columns in (32, 64, 128):
            for splits in sorted({1, picked.splits}):
                yield RowsConfig(block_rows, block_columns, 4, splits)


@functools.lru_cache(maxsize=4096)
def choose_row_sum(width: int) -> RowsConfig:
    """For sums of rows of width columns, one sum per program."""
    return RowsConfig(1, 1024 if width > 256 else 256, 4)  # 1024 bf16: 16 bytes a lane


def candidates_row_sum(width: int) -> Iterator[RowsConfig]:
    for block_columns in (256, 512, 1024, 2048):
        yield RowsConfig(1, block_columns, 4)
