"""fused_experts in Triton. Few tokens: two launches without routing. Otherwise route, grouped_gemm twice, combine.

T tokens, E experts, K selected experts per token, D model width, F expert width, N columns of the gate-up product; a
pair is one (token, selected expert). In the few-token kernels weight rows are the rows of the matrix instruction and
tokens (or a token's pairs) its columns, so that one token wastes no weight bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moekern import _triton
from moekern._triton_lib import dot, round_to
from moekern.ops.fused_experts.config import STAGE_BYTES, FewConfig, RoutedConfig, choose, next_power_of_2
from moekern.ops.grouped_gemm.activation import ACTIVATIONS
from moekern.ops.grouped_gemm.triton_epilogue import activate_gated, activate_single, split_columns


@triton.jit
def _load_id(ids_ptr, at, num_experts):
    """int64 id of one pair; -1 for an id outside [0, E)."""
    e = tl.load(ids_ptr + at).to(tl.int64)
    return tl.where((e >= 0) & (e < num_experts), e, -1)


@triton.jit
def _weight_tile(w_ptr, row, column, stride_row, mask, TRANSPOSED: tl.constexpr):
    """[len(row), len(column)] of one expert's [rows, columns] matrix, stored as it is or transposed."""
    if TRANSPOSED:
        at = column[None, :].to(tl.int64) * stride_row + row[:, None]
    else:
        at = row[:, None].to(tl.int64) * stride_row + column[None, :]
    return tl.load(w_ptr + at, mask=mask, other=0.0)


@triton.jit
def _few_up_fwd_kernel(
    x_ptr,  # [T, D]
    w_ptr,  # [E, N, D], or [E, D, N] when transposed
    b_ptr,  # [E, N] or None
    ids_ptr,  # [T, K]
    h_ptr,  # [T*K, F]: the rows of the pairs whose id is in [0, E)
    num_tokens,
    num_experts,
    d,
    f,
    stride_xt,
    stride_we,
    stride_wr,
    stride_be,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    BLOCK_F: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    pair = tl.program_id(0)
    block = tl.program_id(1)
    # The first pair of an expert computes for every token of it, so that its weights are read once.
    e = _load_id(ids_ptr, pair, num_experts)
    if e < 0:
        return
    p = tl.arange(0, BLOCK_P)
    same = tl.load(ids_ptr + p, mask=p < num_tokens * TOP_K, other=-1).to(tl.int64) == e
    if tl.min(tl.where(same, p, BLOCK_P), axis=0) < pair:
        return

    j = tl.arange(0, BLOCK_N)
    if not GATED:
        n = block * BLOCK_N + j
        exists = n < f
    elif INTERLEAVED:
        n = block * BLOCK_N + j
        exists = n < 2 * f
    else:  # BLOCK_F gate columns, then the up columns that belong to them
        n = block * BLOCK_F + j % BLOCK_F
        exists = n < f
        n += j // BLOCK_F * f
    t = tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    live_t = t < num_tokens
    w_ptr += e * stride_we
    x_ptr += t[None, :].to(tl.int64) * stride_xt
    acc = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    for start in tl.range(0, d, BLOCK_K, num_stages=NUM_STAGES):
        real = start + k < d
        w = _weight_tile(w_ptr, n, start + k, stride_wr, exists[:, None] & real[None, :], TRANSPOSED)
        x = tl.load(x_ptr + (start + k)[:, None], mask=real[:, None] & live_t[None, :], other=0.0)
        acc = dot(w, x, acc)
    if b_ptr is not None:
        acc += tl.load(b_ptr + e * stride_be + n, mask=exists, other=0.0).to(tl.float32)[:, None]
    EXACT: tl.constexpr = h_ptr.dtype.element_ty == tl.float32
    if GATED:
        gate, up = split_columns(acc, BLOCK_T, BLOCK_F, INTERLEAVED, True)
        h = activate_gated(gate, up, ACTIVATION, LIMIT, ALPHA, UP_SHIFT, EXACT)
    else:
        h = activate_single(acc, ACTIVATION, LIMIT, ALPHA, EXACT)
    h = round_to(h, h_ptr.dtype.element_ty)

    column = block * BLOCK_F + tl.arange(0, BLOCK_F)
    for i in range(TOP_K):
        chosen = tl.load(ids_ptr + t * TOP_K + i, mask=live_t, other=-1).to(tl.int64) == e
        at = (t * TOP_K + i)[None, :].to(tl.int64) * f + column[:, None]
        tl.store(h_ptr + at, h, mask=(column < f)[:, None] & chosen[None, :])


@triton.jit
def _few_down_fwd_kernel(
    h_ptr,  # [T*K, F]
    w_ptr,  # [E, D, F], or [E, F, D] when transposed
    b_ptr,  # [E, D] or None
    ids_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    out_ptr,  # [T, D]; [T*K, D] without REDUCE
    num_experts,
    d,
    f,
    stride_we,
    stride_wr,
    stride_be,
    TOP_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    first = tl.program_id(0) * TOP_K  # pair of this token
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = n < d
    i = tl.arange(0, BLOCK_P)
    # Read before the loop: an id loaded inside it would take a second round trip, and half of the ring of loads.
    ids = tl.load(ids_ptr + first + i, mask=i < TOP_K, other=-1).to(tl.int64)
    live = (ids >= 0) & (ids < num_experts)
    experts = tl.where(live, ids, -1).to(tl.int32)
    half = tl.cdiv(tl.cdiv(f, BLOCK_K), 2)  # stages of one pair, each of a tile from either half of F
    column = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_P], dtype=tl.float32)
    # One loop over all pairs, so that the loads of the next pair are under way while one ends. Column i sums pair i.
    for step in tl.range(0, TOP_K * half, num_stages=NUM_STAGES):
        at = step // half
        e = tl.max(tl.where(i == at, experts, -1), axis=0)
        w_e = w_ptr + tl.maximum(e, 0).to(tl.int64) * stride_we
        h_e = h_ptr + (first + at).to(tl.int64) * f
        mine = (i == at) & (e >= 0)
        # Two sums side by side: one would wait for each matrix instruction in turn.
        c = step % half * BLOCK_K + column
        real = (c < f) & (e >= 0)
        w = _weight_tile(w_e, n, c, stride_wr, exists[:, None] & real[None, :], TRANSPOSED)
        h = tl.load(h_e + c[:, None], mask=real[:, None] & mine[None, :], other=0.0)
        c += half * BLOCK_K
        real = (c < f) & (e >= 0)
        w2 = _weight_tile(w_e, n, c, stride_wr, exists[:, None] & real[None, :], TRANSPOSED)
        h2 = tl.load(h_e + c[:, None], mask=real[:, None] & mine[None, :], other=0.0)
        zeros = tl.zeros([BLOCK_N, BLOCK_P], dtype=tl.float32)
        # A product with 0 is NaN where a weight is infinite: other pairs' columns stay as they are.
        acc = tl.where(mine[None, :], acc + (dot(w, h, zeros) + dot(w2, h2, zeros)), acc)

    if b_ptr is not None:
        at_b = tl.maximum(experts, 0).to(tl.int64)[None, :] * stride_be + n[:, None]
        acc += tl.load(b_ptr + at_b, mask=exists[:, None] & live[None, :], other=0.0).to(tl.float32)
    y = round_to(acc, out_ptr.dtype.element_ty)
    if REDUCE:
        weights = tl.load(weights_ptr + first + i, mask=live, other=0.0).to(tl.float32)
        y = tl.where(live[None, :], y.to(tl.float32), 0.0)
        total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for k in range(TOP_K):  # the same product and sum as in combine, so that its bits are these
            mine = i == k
            total += tl.sum(tl.where(mine[None, :], y, 0.0), axis=1) * tl.sum(
                tl.where(mine, weights, 0.0), axis=0
            )
        row = out_ptr + tl.program_id(0).to(tl.int64) * d
        tl.store(row + n, round_to(total, out_ptr.dtype.element_ty), mask=exists)
    else:
        at_y = (first + i)[None, :].to(tl.int64) * d + n[:, None]
        tl.store(out_ptr + at_y, y, mask=exists[:, None] & (i < TOP_K)[None, :])


def _up_constants(config: FewConfig, num_pairs: int, top_k: int, activation: str, gated: bool, interleaved: bool,
                  transposed: bool, limit: float | None, alpha: float, up_shift: float) -> dict[str, Any]:  # fmt: skip
    return {
        "TOP_K": top_k, "ACTIVATION": ACTIVATIONS.index(activation), "GATED": gated, "INTERLEAVED": interleaved,
        "TRANSPOSED": transposed, "LIMIT": limit, "ALPHA": alpha, "UP_SHIFT": up_shift,
        "BLOCK_P": next_power_of_2(num_pairs), "BLOCK_T": config.block_t, "BLOCK_N": config.up_n,
        "BLOCK_K": config.up_k, "NUM_STAGES": config.up_stages,
    }  # fmt: skip


def _down_constants(config: FewConfig, top_k: int, transposed: bool, reduce: bool) -> dict[str, Any]:
    return {
        "TOP_K": top_k, "TRANSPOSED": transposed, "REDUCE": reduce, "BLOCK_P": max(8, next_power_of_2(top_k)),
        "BLOCK_N": config.down_n, "BLOCK_K": config.down_k, "NUM_STAGES": config.down_stages,
    }  # fmt: skip


def _run_few(config: FewConfig, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor,
             b_gate_up: Tensor | None, b_down: Tensor | None, activation: str, gated: bool, interleaved: bool,
             transposed: bool, limit: float | None, alpha: float, up_shift: float, reduce: bool) -> Tensor:  # fmt: skip
    num_tokens, d = x.shape
    num_experts, top_k, num_pairs = w_down.shape[0], ids.shape[1], ids.numel()
    f = w_down.shape[1 if transposed else 2]
    h = x.new_empty((num_pairs, f))
    out = x.new_empty((num_tokens if reduce else num_pairs, d))
    up_blocks = -(-f // (config.up_n // 2 if gated else config.up_n))
    up = _up_constants(
        config, num_pairs, top_k, activation, gated, interleaved, transposed, limit, alpha, up_shift
    )
    with _triton.guard(x):
        if num_pairs * up_blocks > 0:
            _few_up_fwd_kernel[(num_pairs, up_blocks)](
                x, w_gate_up, b_gate_up, ids, h, num_tokens, num_experts, d, f, x.stride(0), w_gate_up.stride(0),
                w_gate_up.stride(1), 0 if b_gate_up is None else b_gate_up.stride(0), **up, num_warps=config.up_warps,
            )  # fmt: skip
        _few_down_fwd_kernel[(num_tokens, -(-d // config.down_n))](
            h, w_down, b_down, ids, weights, out, num_experts, d, f, w_down.stride(0), w_down.stride(1),
            0 if b_down is None else b_down.stride(0), **_down_constants(config, top_k, transposed, reduce),
            num_warps=config.down_warps,
        )  # fmt: skip
    return out


def _run_routed(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor, b_gate_up: Tensor | None,
                b_down: Tensor | None, activation: str, gated: bool, interleaved: bool, transposed: bool,
                limit: float | None, alpha: float, up_shift: float, reduce: bool) -> Tensor:  # fmt: skip
    from moekern.ops.combine import triton as combine
    from moekern.ops.grouped_gemm import triton as grouped_gemm
    from moekern.ops.route import triton as route

    num_tokens, d = x.shape
    num_experts, top_k, num_pairs = w_down.shape[0], ids.shape[1], ids.numel()
    perm, offsets, _ = route.run(ids, num_experts)
    h = grouped_gemm.run(
        x, w_gate_up, offsets, gather=perm, gather_div=top_k, bias=b_gate_up, activation=activation, gated=gated,
        interleaved=interleaved, transposed=transposed, limit=limit, alpha=alpha, up_shift=up_shift,
    )  # fmt: skip
    # combine does not read the rows of skipped pairs, so only rows that are returned have to be zero there.
    rows = x.new_empty((num_pairs, d)) if reduce else x.new_zeros((num_pairs, d))
    grouped_gemm.run(h, w_down, offsets, scatter=perm, bias=b_down, transposed=transposed, out=rows)
    return combine.run(x.new_empty((num_tokens, d)), rows, weights, ids, num_experts) if reduce else rows


def run(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor, b_gate_up: Tensor | None,
        b_down: Tensor | None, activation: str, gated: bool, interleaved: bool, transposed: bool, limit: float | None,
        alpha: float, up_shift: float, reduce: bool) -> Tensor:  # fmt: skip
    """fused_experts; arguments as in the op. x has contiguous rows, biases too, weights and ids are contiguous."""
    num_tokens, d = x.shape
    if num_tokens * d == 0 or (not reduce and ids.numel() == 0):
        return x.new_empty((num_tokens if reduce else ids.numel(), d))
    config = choose(
        num_tokens, w_down.shape[0], ids.shape[1], d, w_down.shape[1 if transposed else 2], gated, transposed,
        x.element_size(), _triton.gpu_of(x.device),
    )  # fmt: skip
    arguments = (x, w_gate_up, w_down, weights, ids, b_gate_up, b_down, activation, gated, interleaved, transposed, limit,
                 alpha, up_shift, reduce)  # fmt: skip
    return _run_routed(*arguments) if isinstance(config, RoutedConfig) else _run_few(config, *arguments)


BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_TYPES = {"num_tokens": "i32", "num_experts": "i32", "d": "i32", "f": "i32", "stride_xt": "i32", "stride_we": "i32",
          "stride_wr": "i32", "stride_be": "i32", "ids_ptr": "*i64", "weights_ptr": "*fp32"}  # fmt: skip


def _variant(
    kernel: Any, config: FewConfig, constants: dict[str, Any], dtype: str, worst: bool
) -> _triton.Variant:
    up = kernel is _few_up_fwd_kernel
    names = [n for n in kernel.arg_names if n not in constants]
    warps, num_stages = (config.up_warps, config.up_stages) if up else (config.down_warps, config.down_stages)
    layout = "transposed " * constants["TRANSPOSED"] + "interleaved " * constants.get("INTERLEAVED", False)
    layout += "plain " * (not constants.get("GATED", True)) + "pairs " * (not constants.get("REDUCE", True))
    tile = f"{constants['BLOCK_N']}x{constants['BLOCK_K']}x{constants['BLOCK_T' if up else 'BLOCK_P']}"
    return _triton.Variant(
        name=f"{dtype} {layout}{tile} S{num_stages}",
        kernel=kernel,
        types={n: _TYPES.get(n, f"*{dtype}") for n in names},
        constants=constants,
        aligned=tuple(n for n in names if n not in ("num_tokens", "num_experts")),
        num_warps=warps,
        num_stages=num_stages,
        tensor_cores="" if dtype == "fp32" else "HMMA",
        requires=("LDGSTS.128",),
        min_shared=(num_stages - 1) * STAGE_BYTES,
        worst=worst,
    )


def aot_variants(gpu: _triton.Gpu) -> Iterator[_triton.Variant]:
    """Specialisations for the static gate: every configuration that `choose` returns, in every layout."""
    # E, K, D, F: Mixtral, gpt-oss, Qwen3-30B-A3B, DeepSeek-V2-Lite, many narrow experts, a layer of a toy.
    shapes = ((8, 2, 4096, 14336), (32, 4, 2880, 2880), (128, 8, 2048, 768), (64, 6, 2048, 1408), (512, 10, 2048, 128),
              (8, 2, 64, 64))  # fmt: skip
    layouts = [(g, i, t) for t in (False, True) for g, i in ((True, False), (True, True), (False, False))]
    for dtype, size in BYTES.items():
        for gated, interleaved, transposed in layouts:
            found = (
                choose(t, e, k, d, f, gated, transposed, size, gpu) for e, k, d, f in shapes for t in (1, 2, 8, 16)
            )  # fmt: skip
            few = [config for config in found if isinstance(config, FewConfig)]
            # Of one tile the deepest ring with the most columns is the worst; a gated layer with bias and limit.
            worst = dtype != "fp16" and gated and interleaved == transposed
            ups = {(c.up_n, c.up_stages, c.block_t): c for c in few}
            for (up_n, *size_of), config in ups.items():
                constants = _up_constants(config, 8 * config.block_t, 8, "silu", gated, interleaved, transposed, 7.0, 1.702,
                                          1.0)  # fmt: skip
                largest = size_of == max(rest for n, *rest in ups if n == up_n)
                yield _variant(_few_up_fwd_kernel, config, constants, dtype, worst and largest)
            if not gated or interleaved:
                continue
            downs = {(c.down_n, c.down_stages): c for c in few}
            for (down_n, num_stages), config in downs.items():
                largest = num_stages == max(s for n, s in downs if n == down_n)
                for reduce in (True, False):
                    constants = _down_constants(config, 8, transposed, reduce)
                    yield _variant(
                        _few_down_fwd_kernel, config, constants, dtype, dtype != "fp16" and reduce and largest
                    )
