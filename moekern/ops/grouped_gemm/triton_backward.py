"""Gradients of grouped products in Triton: of the expert matrices, of the biases and of the gathered rows.

M rows sorted by expert, E experts, N and D widths of rows. An expert's matrix gradient is [A, B], the product of two row
blocks over the expert's rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekern import _triton
from moekern._triton_lib import dot, round_to
from moekern.ops.grouped_gemm import config_backward
from moekern.ops.grouped_gemm.config_backward import RowsConfig, WeightGradConfig
from moekern.ops.grouped_gemm.triton_activation_backward import bounded

REDUCE_BLOCK = 1024  # elements of a gradient that one program sums from its partials


@triton.jit
def _splits_of(offsets_ptr, num_rows, num_experts, chunk, BLOCK_E: tl.constexpr):
    """For every expert: where its rows begin and end, and into how many splits they are cut (0: not cut)."""
    e = tl.arange(0, BLOCK_E)
    begin = bounded(tl.load(offsets_ptr + e, mask=e < num_experts, other=0), num_rows)
    end = bounded(tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0), num_rows)
    # end + chunk may pass 2^31.
    return begin, end, tl.where(end - begin > chunk, (end - begin - 1) // chunk + 1, 0)


@triton.jit
def _split(offsets_ptr, num_rows, num_experts, chunk, slot, BLOCK_E: tl.constexpr):
    """Expert (-1: none) and rows of a slot: the splits of all experts that are cut, one after the other."""
    begins, ends, splits = _splits_of(offsets_ptr, num_rows, num_experts, chunk, BLOCK_E)
    last = tl.cumsum(splits, axis=0)
    expert = tl.sum((last <= slot).to(tl.int32), axis=0)
    mine = tl.arange(0, BLOCK_E) == expert
    first = tl.sum(tl.where(mine, last - splits, 0), axis=0)
    begin = tl.sum(tl.where(mine, begins, 0), axis=0) + (slot - first) * chunk
    left = tl.sum(tl.where(mine, ends, 0), axis=0) - begin
    return tl.where(expert < num_experts, expert, -1), begin, begin + tl.minimum(left, chunk)


@triton.jit
def _rows_of(
    unit, offsets_ptr, num_rows, num_experts, num_slots, chunk, CUT: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Expert (-1: none) and rows of a unit of work: the first num_slots are splits, which have the most rows, then come
    the experts that are not cut."""
    if not CUT:
        expert = unit
        begin = bounded(tl.load(offsets_ptr + unit), num_rows)
        end = bounded(tl.load(offsets_ptr + unit + 1), num_rows)
    elif unit >= num_slots:
        expert = unit - num_slots
        begin = bounded(tl.load(offsets_ptr + expert), num_rows)
        end = bounded(tl.load(offsets_ptr + expert + 1), num_rows)
        if end - begin > chunk:
            expert = -1
    else:
        expert, begin, end = _split(offsets_ptr, num_rows, num_experts, chunk, unit, BLOCK_E)
    return expert, begin, end


@triton.jit
def _grouped_gemm_dw_kernel(
    a_ptr,  # [M, A], rows stride_a apart
    b_ptr,  # [M, B], rows stride_b apart
    gather_ptr,  # [M] or None: row i of a (GATHER_A) or of b is row gather[i] // GATHER_DIV; others are zeros
    offsets_ptr,  # [E+1]
    out_ptr,  # [E, A, B]
    partial_ptr,  # [num_slots, A, B] fp32, or None: no expert is cut
    num_rows,
    num_gathered,  # rows that gather indexes into
    num_experts,
    num_slots,
    chunk,  # rows of a split
    A,
    B,
    stride_a,
    stride_b,
    GATHER_A: tl.constexpr,
    GATHER_DIV: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tiles_a = tl.cdiv(A, BLOCK_A)
    tiles_b = tl.cdiv(B, BLOCK_B)
    unit = tl.program_id(0) // (tiles_a * tiles_b)
    tile = tl.program_id(0) % (tiles_a * tiles_b)

    expert, begin, end = _rows_of(
        unit, offsets_ptr, num_rows, num_experts, num_slots, chunk, partial_ptr is not None, BLOCK_E
    )
    if expert < 0:
        return

    # 8 tiles of a share the columns of b that are in the cache.
    first_a = tile // (8 * tiles_b) * 8
    height = tl.minimum(tiles_a - first_a, 8)
    tile_a = first_a + tile % (8 * tiles_b) % height
    tile_b = tile % (8 * tiles_b) // height
    at_a = tile_a * BLOCK_A + tl.arange(0, BLOCK_A)
    at_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    in_a = (at_a < A)[:, None]
    in_b = (at_b < B)[None, :]

    row = begin + tl.arange(0, BLOCK_K)
    if gather_ptr is not None:
        # A step ahead: an index loaded in the step that uses it would halve the stages of the pipeline.
        following = tl.load(gather_ptr + row, mask=row < end, other=-1)
    acc = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    for _ in range(begin, end, BLOCK_K):
        live = row < end
        row_a = row.to(tl.int64)
        row_b = row_a
        live_a = live
        live_b = live
        row += BLOCK_K
        if gather_ptr is not None:
            index = following
            following = tl.load(gather_ptr + row, mask=row < end, other=-1)
            source = (index // GATHER_DIV).to(tl.int64)
            valid = (index >= 0) & (source < num_gathered)
            if GATHER_A:
                row_a = source
                live_a = valid
            else:
                row_b = source
                live_b = valid
        # Loaded turned: as tl.trans of a load, the HMMA parts read it without cp.async.
        a = tl.load(a_ptr + row_a[None, :] * stride_a + at_a[:, None], mask=live_a[None, :] & in_a, other=0.0)
        b = tl.load(b_ptr + row_b[:, None] * stride_b + at_b[None, :], mask=live_b[:, None] & in_b, other=0.0)
        acc = dot(a, b, acc)

    at = at_a.to(tl.int64)[:, None] * B + at_b[None, :]
    wanted = in_a & in_b
    if partial_ptr is not None and unit < num_slots:
        tl.store(partial_ptr + unit.to(tl.int64) * A * B + at, acc, mask=wanted)
    else:
        # An expert without rows gets its zeros here.
        tl.store(
            out_ptr + expert.to(tl.int64) * A * B + at, round_to(acc, out_ptr.dtype.element_ty), mask=wanted
        )


@triton.jit
def _grouped_gemm_dw_reduce_kernel(partial_ptr, offsets_ptr, out_ptr, num_rows, num_experts, chunk, size,
                                   BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """Sums the partials of the program_id(1)-th expert that is cut, in the order of its rows. size: A * B."""
    _, _, splits = _splits_of(offsets_ptr, num_rows, num_experts, chunk, BLOCK_E)
    e = tl.arange(0, BLOCK_E)
    cut = tl.cumsum((splits > 0).to(tl.int32), axis=0)
    expert = tl.sum((cut <= tl.program_id(1)).to(tl.int32), axis=0)
    if expert >= num_experts:
        return
    first = tl.sum(tl.where(e < expert, splits, 0), axis=0)
    num_splits = tl.sum(tl.where(e == expert, splits, 0), axis=0)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = at < size
    total = tl.zeros([BLOCK], dtype=tl.float32)
    part = partial_ptr + first.to(tl.int64) * size + at
    for _ in range(num_splits):
        total += tl.load(part, mask=wanted, other=0.0)
        part += size
    tl.store(
        out_ptr + expert.to(tl.int64) * size + at, round_to(total, out_ptr.dtype.element_ty), mask=wanted
    )


@triton.jit
def _grouped_gemm_db_kernel(
    a_ptr,  # [M, N], rows stride_a apart
    gather_ptr,  # [M] or None: row i is row gather[i] // GATHER_DIV
    scale_ptr,  # or None; row i is multiplied by scale[gather[i]], without gather by scale[i]
    offsets_ptr,  # [E+1]
    out_ptr,  # [E, N]
    partial_ptr,  # [num_slots, N] fp32, or None: no expert is cut
    num_rows,
    num_gathered,
    num_experts,
    num_slots,
    chunk,
    N,
    stride_a,
    GATHER_DIV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Column sums of each expert's rows."""
    tiles = tl.cdiv(N, BLOCK_N)
    unit = tl.program_id(0) // tiles
    expert, begin, end = _rows_of(
        unit, offsets_ptr, num_rows, num_experts, num_slots, chunk, partial_ptr is not None, BLOCK_E
    )
    if expert < 0:
        return
    at = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    # A running sum per element; those of a column are added once, at the end, in the order of a tree.
    total = tl.zeros([BLOCK_R, BLOCK_N], dtype=tl.float32)
    for r in range(begin, end, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        live = row < end
        index = row
        source = row.to(tl.int64)
        if gather_ptr is not None:
            index = tl.load(gather_ptr + row, mask=live, other=-1)
            source = (index // GATHER_DIV).to(tl.int64)
            live = (index >= 0) & (source < num_gathered)
        a = tl.load(
            a_ptr + source[:, None] * stride_a + at[None, :],
            mask=live[:, None] & (at < N)[None, :],
            other=0.0,
        )
        a = a.to(tl.float32)
        if scale_ptr is not None:
            a *= tl.load(scale_ptr + index, mask=live, other=0.0).to(tl.float32)[:, None]
        total += a
    found = tl.sum(total, axis=0)
    if partial_ptr is not None and unit < num_slots:
        tl.store(partial_ptr + unit.to(tl.int64) * N + at, found, mask=at < N)
    else:
        tl.store(
            out_ptr + expert.to(tl.int64) * N + at, round_to(found, out_ptr.dtype.element_ty), mask=at < N
        )


@triton.jit
def _grouped_gemm_dx_kernel(
    rows_ptr,  # [.., D], contiguous
    starts_ptr,  # [X+1] or None: row i sums what stands at starts[i]:starts[i+1] of order; None: rows i*K ... i*K + K-1
    order_ptr,  # the rows in the order of their sum, or None with starts_ptr
    ids_ptr,  # or None; rows whose id is outside [0, E) are never read
    out_ptr,  # [X, D]
    num_experts,
    D,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each input row's gradient: the sum of the rows that it was gathered to, in a fixed order."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    if starts_ptr is None:
        for k in range(K):
            row = i * K + k
            valid = True
            if ids_ptr is not None:
                id = tl.load(ids_ptr + row)
                valid = (id >= 0) & (id < num_experts)
            total += tl.load(rows_ptr + row * D + at, mask=valid & (at < D), other=0.0).to(tl.float32)
    else:
        for j in range(tl.load(starts_ptr + i), tl.load(starts_ptr + i + 1)):
            row = tl.load(order_ptr + j).to(tl.int64)
            total += tl.load(rows_ptr + row * D + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + i * D + at, round_to(total, out_ptr.dtype.element_ty), mask=at < D)


def block_experts(num_experts: int) -> int:
    return 1 << max(num_experts - 1, 0).bit_length()


def _cut(out: Tensor, num_rows: int, splits: int, multiple: int) -> tuple[Tensor | None, int, int]:
    """Workspace, number of slots and rows of a split for a gradient [E, ..]; an expert with more rows is cut."""
    if splits == 1:
        return None, 0, 0
    # chunk >= M / splits, so fewer than `splits` experts are cut, and the last split of each is rounded up: at most
    # 2 * splits - 2 altogether.
    chunk = triton.cdiv(triton.cdiv(num_rows, splits), multiple) * multiple
    num_slots = 2 * splits - 2
    return out.new_empty((num_slots, *out.shape[1:]), dtype=torch.float32), num_slots, chunk


def _sum_partials(
    out: Tensor, partial: Tensor, offsets: Tensor, num_rows: int, splits: int, chunk: int
) -> None:
    size = out.stride(0)
    _grouped_gemm_dw_reduce_kernel[(triton.cdiv(size, REDUCE_BLOCK), splits - 1)](
        partial, offsets, out, num_rows, out.shape[0], chunk, size, BLOCK=REDUCE_BLOCK,
        BLOCK_E=block_experts(out.shape[0]),
    )  # fmt: skip


def weight_gradient(a: Tensor, b: Tensor, offsets: Tensor, dtype: torch.dtype, *, gather: Tensor | None = None,
                    gather_a: bool = False, gather_div: int = 1) -> Tensor:  # fmt: skip
    """[E, A, B]: for every expert the product of its rows of a (transposed) and b; 0 for an expert without rows.

    gather: row i of b (of a with gather_a) is row gather[i] // gather_div of the tensor, one outside it 0.
    """
    num_experts = offsets.shape[0] - 1
    num_rows = (a if gather is None else gather).shape[0]
    size_a, size_b = a.shape[1], b.shape[1]
    out = a.new_empty((num_experts, size_a, size_b), dtype=dtype)
    if out.numel() == 0:
        return out
    gpu = _triton.gpu_of(a.device)
    config = config_backward.choose_dw(num_rows, size_a, size_b, a.element_size(), gpu)
    partial, num_slots, chunk = _cut(out, num_rows, config.splits, config.block_k)
    tiles = triton.cdiv(size_a, config.block_a) * triton.cdiv(size_b, config.block_b)
    with _triton.guard(a):
        _grouped_gemm_dw_kernel[(tiles * (num_experts + num_slots),)](
            a, b, gather, offsets, out, partial, num_rows, (a if gather_a else b).shape[0], num_experts, num_slots, chunk,
            size_a, size_b, a.stride(0), b.stride(0), **dw_constants(config, num_experts, gather_a, gather_div),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if partial is not None:
            _sum_partials(out, partial, offsets, num_rows, config.splits, chunk)
    return out


def dw_constants(
    config: WeightGradConfig, num_experts: int, gather_a: bool, gather_div: int
) -> dict[str, Any]:
    return {
        "GATHER_A": gather_a, "GATHER_DIV": gather_div, "BLOCK_A": config.block_a, "BLOCK_B": config.block_b,
        "BLOCK_K": config.block_k, "BLOCK_E": block_experts(num_experts),
    }  # fmt: skip


def bias_gradient(a: Tensor, offsets: Tensor, dtype: torch.dtype, *, gather: Tensor | None = None, gather_div: int = 1,
                  scale: Tensor | None = None) -> Tensor:  # fmt: skip
    """[E, N]: for every expert the sum of its rows, each times its scale; gather as in weight_gradient."""
    num_experts, width = offsets.shape[0] - 1, a.shape[1]
    out = a.new_empty((num_experts, width), dtype=dtype)
    if out.numel() == 0:
        return out
    num_rows = (a if gather is None else gather).shape[0]
    config = config_backward.choose_column_sum(num_rows, width, _triton.gpu_of(a.device).num_sms)
    partial, num_slots, chunk = _cut(out, num_rows, config.splits, config.block_rows)
    tiles = triton.cdiv(width, config.block_columns)
    with _triton.guard(a):
        _grouped_gemm_db_kernel[(tiles * (num_experts + num_slots),)](
            a, gather, scale, offsets, out, partial, num_rows, a.shape[0], num_experts, num_slots, chunk, width, a.stride(0),
            **db_constants(config, num_experts, gather_div), num_warps=config.num_warps,
        )  # fmt: skip
        if partial is not None:
            _sum_partials(out, partial, offsets, num_rows, config.splits, chunk)
    return out


def db_constants(config: RowsConfig, num_experts: int, gather_div: int) -> dict[str, Any]:
    return {
        "GATHER_DIV": gather_div, "BLOCK_R": config.block_rows, "BLOCK_N": config.block_columns,
        "BLOCK_E": block_experts(num_experts),
    }  # fmt: skip


def sum_gathered(rows: Tensor, gather: Tensor, num_sources: int) -> Tensor:
    """[num_sources, D]: the sum of the rows that were gathered from each source, in the order of the rows."""
    # Stable, so that the order within a source is that of the rows. Indices outside the sources sort before or behind.
    sources, order = gather.sort(stable=True)
    starts = torch.searchsorted(
        sources, torch.arange(num_sources + 1, dtype=gather.dtype, device=gather.device), out_int32=True
    )
    return _sum_rows(rows, num_sources, starts=starts, order=order.int())


def sum_pairs(rows: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """[T, D]: the sum of each token's pair rows [T*K, D], in the order of k; ids [T, K], contiguous."""
    return _sum_rows(rows, ids.shape[0], ids=ids, num_experts=num_experts)


def _sum_rows(rows: Tensor, count: int, *, starts: Tensor | None = None, order: Tensor | None = None,
              ids: Tensor | None = None, num_experts: int = 0) -> Tensor:  # fmt: skip
    width = rows.shape[1]
    out = rows.new_empty((count, width))
    if out.numel() > 0:
        config = config_backward.choose_row_sum(width)
        with _triton.guard(rows):
            _grouped_gemm_dx_kernel[(count, triton.cdiv(width, config.block_columns))](
                rows, starts, order, ids, out, num_experts, width, K=0 if ids is None else ids.shape[1],
                BLOCK_D=config.block_columns, num_warps=config.num_warps,
            )  # fmt: skip
    return out
