"""grouped_gemm in Triton: a grid that finds its tiles in the offsets, on the device.

M rows sorted by expert, E experts, D width of a row, N columns of the product, F columns of the result (N / 2 when gated).
A segment is a run of rows of one expert; the rows before the first and after the last are segments of zeros, so there are
E + 2. A tile is BLOCK_M rows of one segment times BLOCK_N product columns; when gated, half of them gate and half up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moekern import _triton
from moekern._triton_lib import dot
from moekern.ops.grouped_gemm.activation import ACTIVATIONS
from moekern.ops.grouped_gemm.config import GroupedGemmConfig, cdiv, choose, max_row_blocks
from moekern.ops.grouped_gemm.triton_epilogue import _grouped_gemm_reduce_kernel, finish_tile, split_columns
from moekern.ops.grouped_gemm.variants import variants

REDUCE_COLUMNS = 512  # of a program that sums partial products: 16 bytes a thread and load


@triton.jit
def _segments(
    offsets_ptr, num_experts, num_rows, WITH_ZEROS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Row blocks of each of the E + 2 segments [BLOCK_E], and their running sum."""
    s = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + s - 1, mask=(s > 0) & (s < num_experts + 2), other=0)
    end = tl.load(offsets_ptr + s, mask=s <= num_experts, other=0)
    end = tl.where(s == num_experts + 1, num_rows, end)
    rows = tl.minimum(tl.maximum(end, 0), num_rows) - tl.minimum(tl.maximum(begin, 0), num_rows)
    blocks = (tl.maximum(rows, 0) + BLOCK_M - 1) // BLOCK_M
    real = s < num_experts + 2
    if not WITH_ZEROS:
        real = (s > 0) & (s <= num_experts)
    blocks = tl.where(real, blocks, 0)
    return blocks, tl.cumsum(blocks, axis=0)


@triton.jit
def product_columns(col0, n_out, OUT_N: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The product columns of a tile whose first result column is col0, and which of them exist."""
    if GATED and not INTERLEAVED:
        r = tl.arange(0, 2 * OUT_N)
        f = col0 + r % OUT_N
        return f + r // OUT_N * n_out, f < n_out
    elif GATED:
        cols = 2 * col0 + tl.arange(0, 2 * OUT_N)
        return cols, cols < 2 * n_out
    else:
        cols = col0 + tl.arange(0, OUT_N)
        return cols, cols < n_out


@triton.jit
def _grouped_gemm_fwd_kernel(
    x_ptr,  # [X, D], rows stride_x apart; a descriptor [X, D] when X_TMA
    weight_ptr,  # [E, N, D] or [E, D, N]; a descriptor when W_TMA, see `_weight_descriptor`
    offsets_ptr,  # [E + 1] int32
    gather_ptr,  # [M] int32 or None
    scatter_ptr,  # [M] int32 or None
    bias_ptr,  # [E, N] or None
    row_scale_ptr,  # [M] or None
    out_ptr,  # [R, F]; partial products [split_k, M, N] fp32 when SPLIT
    num_rows,  # M
    num_x_rows,  # X
    num_out_rows,  # R
    num_experts,
    n_out,  # F
    d,
    gather_div,
    split_k,
    stride_x,
    stride_we,
    stride_wr,  # between rows of one expert's matrix
    stride_bias,
    stride_out,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    SWAP: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    OUT_N: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    ZEROS: tl.constexpr = scatter_ptr is None and not SPLIT
    n_product = n_out * 2 if GATED else n_out
    blocks, ends = _segments(offsets_ptr, num_experts, num_rows, ZEROS, BLOCK_E, BLOCK_M)
    col_blocks = (n_out + OUT_N - 1) // OUT_N
    num_tiles = tl.sum(blocks, axis=0) * col_blocks
    if SPLIT:
        num_tiles *= split_k
    k_blocks = (d + BLOCK_K - 1) // BLOCK_K

    for work in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = work // split_k if SPLIT else work
        # The segment: as many as end at or before this tile. Its tiles run down GROUP_M row blocks, then right.
        before = ends * col_blocks <= tile
        segment = tl.sum(before.to(tl.int32), axis=0)
        first = tl.sum(tl.where(before, blocks, 0), axis=0)
        begin = tl.load(offsets_ptr + segment - 1, mask=segment > 0, other=0)
        end = tl.load(offsets_ptr + segment, mask=segment <= num_experts, other=num_rows)
        begin = tl.minimum(tl.maximum(begin, 0), num_rows)
        end = tl.minimum(tl.maximum(end, 0), num_rows)
        live = (segment > 0) & (segment <= num_experts)
        expert = tl.where(live, segment - 1, 0)
        row_blocks = (end - begin + BLOCK_M - 1) // BLOCK_M
        local = tile - first * col_blocks
        group = local // (GROUP_M * col_blocks)
        group_rows = tl.minimum(row_blocks - group * GROUP_M, GROUP_M)
        in_group = local - group * (GROUP_M * col_blocks)
        row0 = begin + (group * GROUP_M + in_group % group_rows) * BLOCK_M
        col0 = in_group // group_rows * OUT_N

        rows = row0 + tl.arange(0, BLOCK_M)
        row_ok = rows < end
        k_begin = 0
        k_end = tl.where(live, k_blocks, 0)
        if SPLIT:
            share = (k_blocks + split_k - 1) // split_k
            k_begin = (work - tile * split_k) * share
            k_end = tl.minimum(k_begin + share, k_end)
        k = tl.arange(0, BLOCK_K)
        cols, col_ok = product_columns(col0, n_out, OUT_N, GATED, INTERLEAVED)
        if not X_TMA:
            if gather_ptr is not None:
                index = tl.load(gather_ptr + rows, mask=row_ok, other=-1)
                x_ok = (index >= 0) & (index // gather_div < num_x_rows)
                index = tl.where(x_ok, index // gather_div, 0)
            else:
                x_ok = row_ok
                index = rows
            x_ptrs = x_ptr + index.to(tl.int64)[:, None] * stride_x + k[None, :]
        if not W_TMA:
            w_base = weight_ptr + expert.to(tl.int64) * stride_we
            if TRANSPOSED:
                w_ptrs = w_base + k.to(tl.int64)[:, None] * stride_wr + cols[None, :]
                w_step = BLOCK_K * tl.cast(stride_wr, tl.int64)
            else:
                w_ptrs = w_base + cols.to(tl.int64)[:, None] * stride_wr + k[None, :]
                w_step = BLOCK_K

        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for kb in range(k_begin, k_end):
            k0 = kb * BLOCK_K
            if X_TMA:
                x = x_ptr.load([row0, k0])
            elif EVEN_K:
                x = tl.load(x_ptrs + k0, mask=x_ok[:, None], other=0.0)
            else:
                x = tl.load(x_ptrs + k0, mask=x_ok[:, None] & (k[None, :] < d - k0), other=0.0)
            if W_TMA:
                if TRANSPOSED:
                    if GATED and not INTERLEAVED:
                        w = tl.reshape(weight_ptr.load([expert, k0, 0, col0]), (BLOCK_K, BLOCK_N))
                    else:
                        w = tl.reshape(
                            weight_ptr.load([expert, k0, col0 * (BLOCK_N // OUT_N)]), (BLOCK_K, BLOCK_N)
                        )
                else:
                    if GATED and not INTERLEAVED:
                        w = tl.reshape(weight_ptr.load([expert, 0, col0, k0]), (BLOCK_N, BLOCK_K))
                    else:
                        w = tl.reshape(
                            weight_ptr.load([expert, col0 * (BLOCK_N // OUT_N), k0]), (BLOCK_N, BLOCK_K)
                        )
            else:
                at = w_ptrs + kb * w_step
                if TRANSPOSED:
                    if EVEN_K:
                        w = tl.load(at, mask=col_ok[None, :], other=0.0)
                    else:
                        w = tl.load(at, mask=col_ok[None, :] & (k[:, None] < d - k0), other=0.0)
                else:
                    if EVEN_K:
                        w = tl.load(at, mask=col_ok[:, None], other=0.0)
                    else:
                        w = tl.load(at, mask=col_ok[:, None] & (k[None, :] < d - k0), other=0.0)
            if SWAP:
                acc = dot(tl.trans(w) if TRANSPOSED else w, tl.trans(x), acc)
            else:
                acc = dot(x, w if TRANSPOSED else tl.trans(w), acc)

        if SPLIT:
            at = (work - tile * split_k).to(tl.int64) * num_rows + rows
            if SWAP:
                ptrs = out_ptr + at[None, :] * n_product + cols[:, None]
                tl.store(ptrs, acc, mask=row_ok[None, :] & col_ok[:, None])
            else:
                ptrs = out_ptr + at[:, None] * n_product + cols[None, :]
                tl.store(ptrs, acc, mask=row_ok[:, None] & col_ok[None, :])
        else:
            if GATED:
                g, u = split_columns(acc, BLOCK_M, OUT_N, INTERLEAVED, SWAP)
                finish_tile(g, u, col0, rows, row_ok, expert, live, bias_ptr, row_scale_ptr, scatter_ptr, out_ptr,
                            num_out_rows, n_out, stride_bias, stride_out, ACTIVATION, True, INTERLEAVED, LIMIT, ALPHA,
                            UP_SHIFT, SWAP, OUT_N)  # fmt: skip
            elif BLOCK_N >= 256:
                # In halves: 128 accumulators a thread, and bias and addresses of as many columns, are too many registers.
                g, u = split_columns(acc, BLOCK_M, BLOCK_N // 2, False, SWAP)
                finish_tile(g, None, col0, rows, row_ok, expert, live, bias_ptr, row_scale_ptr, scatter_ptr, out_ptr,
                            num_out_rows, n_out, stride_bias, stride_out, ACTIVATION, False, False, LIMIT, ALPHA,
                            UP_SHIFT, SWAP, BLOCK_N // 2)  # fmt: skip
                finish_tile(u, None, col0 + BLOCK_N // 2, rows, row_ok, expert, live, bias_ptr, row_scale_ptr,
                            scatter_ptr, out_ptr, num_out_rows, n_out, stride_bias, stride_out, ACTIVATION, False, False,
                            LIMIT, ALPHA, UP_SHIFT, SWAP, BLOCK_N // 2)  # fmt: skip
            else:
                finish_tile(acc, None, col0, rows, row_ok, expert, live, bias_ptr, row_scale_ptr, scatter_ptr, out_ptr,
                            num_out_rows, n_out, stride_bias, stride_out, ACTIVATION, False, False, LIMIT, ALPHA,
                            UP_SHIFT, SWAP, BLOCK_N)  # fmt: skip


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _aligned(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: base and strides of 16 bytes, no empty dimension."""
    size = tensor.element_size()
    return (
        tensor.data_ptr() % 16 == 0
        and all(s * size % 16 == 0 and s > 0 for s in tensor.stride()[:-1])
        and tensor.numel() > 0
    )


def _weight_descriptor(weight: Tensor, config: GroupedGemmConfig, gated: bool, interleaved: bool, transposed: bool) -> TensorDescriptor:  # fmt: skip
    """[E, N, D] in boxes of [1, block_n, block_k]; where gate and up are far apart [E, 2, F, D], so that one box holds
    both. The last two (three) the other way round when transposed."""
    (e, a, b), (stride_e, stride_r, _) = weight.shape, weight.stride()
    block_n, block_k = config.block_n, config.block_k
    if not gated or interleaved:
        box = [1, block_k, block_n] if transposed else [1, block_n, block_k]
        return TensorDescriptor(weight, [e, a, b], [stride_e, stride_r, 1], box)
    if transposed:
        f = b // 2
        return TensorDescriptor(
            weight, [e, a, 2, f], [stride_e, stride_r, f, 1], [1, block_k, 2, block_n // 2]
        )
    f = a // 2
    return TensorDescriptor(
        weight, [e, 2, f, b], [stride_e, f * stride_r, stride_r, 1], [1, 2, block_n // 2, block_k]
    )


@dataclass(frozen=True, eq=False)
class _Plan:
    """What of a launch follows from shapes and options. epilogue: constants of both kernels; constants: of the first.
    halves_aligned: whether the up columns of a transposed weight begin at a multiple of 16 bytes."""

    config: GroupedGemmConfig
    grid: tuple[int]
    epilogue: dict[str, Any]
    constants: dict[str, Any]
    halves_aligned: bool


@functools.lru_cache(maxsize=4096)
def _plan(num_rows: int, num_experts: int, width: int, d: int, dtype_bytes: int, activation: str, gated: bool,
          interleaved: bool, transposed: bool, limit: float | None, alpha: float, up_shift: float, device: torch.device,
          config: GroupedGemmConfig | None) -> _Plan:  # fmt: skip
    """Kept, because it takes the host longer than the launch of a small kernel takes the GPU."""
    gpu = _triton.gpu_of(device)
    config = config or choose(num_rows, num_experts, width, d, dtype_bytes, gated, gpu)
    parts = 2 if gated else 1
    tiles = max_row_blocks(num_rows, num_experts, config.block_m) * cdiv(
        width // parts, config.block_n // parts
    )
    programs = tiles * config.split_k
    if config.programs_per_sm:
        programs = min(programs, config.programs_per_sm * gpu.num_sms)
    epilogue = {
        "ACTIVATION": ACTIVATIONS.index(activation), "GATED": gated, "INTERLEAVED": interleaved, "LIMIT": limit,
        "ALPHA": alpha, "UP_SHIFT": up_shift, "BLOCK_E": next_power_of_2(num_experts + 2),
    }  # fmt: skip
    constants = {
        "TRANSPOSED": transposed, "SPLIT": config.split_k > 1, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, "GROUP_M": config.group_m, "SWAP": config.swap, "EVEN_K": d % config.block_k == 0,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    far = gated and not interleaved
    return _Plan(config, (programs,), epilogue, constants, not far or width // 2 * dtype_bytes % 16 == 0)


def run(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    gather: Tensor | None = None,
    gather_div: int = 1,
    scatter: Tensor | None = None,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_shift: float = 0.0,
    out: Tensor | None = None,
    config: GroupedGemmConfig | None = None,
) -> Tensor:
    """grouped_gemm for the Triton backends of other ops too; arguments as in the op, and:

    gather_div: row i is x[gather[i] // gather_div]: with K, the permutation of pairs is the index of tokens.
    scatter: [M] int32; row i goes to out[scatter[i]], nowhere if that is outside out. Rows of out that nothing is
        scattered to keep what they held.
    out: [R, F] to write to, rows any distance apart; allocated [M, F] when None.
    config: replaces the choice.

    x and bias have contiguous rows, index tensors and row_scale are contiguous. Weights: the last dimension contiguous.
    """
    num_rows = (x if gather is None else gather).shape[0]
    num_experts, width = weight.shape[0], weight.shape[2 if transposed else 1]
    n_out = width // 2 if gated else width
    if out is None:
        out = x.new_empty((num_rows, n_out))
    if num_rows == 0 or n_out == 0:
        return out
    plan = _plan(num_rows, num_experts, width, x.shape[1], x.element_size(), activation, gated, interleaved, transposed,
                 limit, alpha, up_shift, x.device, config)  # fmt: skip
    config = plan.config
    x_tma = config.tma and gather is None and _aligned(x)
    w_tma = config.tma and _aligned(weight) and (plan.halves_aligned or not transposed)
    split = config.split_k > 1
    target = x.new_empty((config.split_k, num_rows, width), dtype=torch.float32) if split else out
    stride_bias = 0 if bias is None else bias.stride(0)
    with _triton.guard(x):
        _grouped_gemm_fwd_kernel[plan.grid](
            TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [config.block_m, config.block_k]) if x_tma else x,
            _weight_descriptor(weight, config, gated, interleaved, transposed) if w_tma else weight,
            offsets, gather, scatter, bias, row_scale, target, num_rows, x.shape[0], out.shape[0], num_experts, n_out,
            x.shape[1], gather_div, config.split_k, x.stride(0), weight.stride(0), weight.stride(1), stride_bias,
            out.stride(0), X_TMA=x_tma, W_TMA=w_tma, **plan.epilogue, **plan.constants,
        )  # fmt: skip
        if split:
            _grouped_gemm_reduce_kernel[(num_rows, cdiv(n_out, REDUCE_COLUMNS))](
                target, offsets, scatter, bias, row_scale, out, num_rows, out.shape[0], num_experts, n_out,
                config.split_k, stride_bias, out.stride(0), **plan.epilogue, BLOCK_N=REDUCE_COLUMNS, num_warps=4,
            )  # fmt: skip
    return out


def aot_variants(gpu: _triton.Gpu) -> Iterator[_triton.Variant]:
    """Specialisations for the static gate."""
    return variants(gpu, _grouped_gemm_fwd_kernel, _grouped_gemm_reduce_kernel, REDUCE_COLUMNS)
