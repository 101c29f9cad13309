"""What happens to a product before it is stored, inside Triton kernels; as moekern/ops/grouped_gemm/activation.py."""

from __future__ import annotations

import triton
import triton.language as tl

from moekern._triton_lib import round_to, sigmoid
from moekern.ops.grouped_gemm.activation import ACTIVATIONS

SILU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("silu"))
GELU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("gelu"))
GELU_TANH: tl.constexpr = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
RELU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("relu"))
RELU2: tl.constexpr = tl.constexpr(ACTIVATIONS.index("relu2"))


@triton.jit
def fast_sigmoid(x, EXACT: tl.constexpr):
    """1 / (1 + e^-x). Without EXACT within 1e-6 for |x| < 20, in a third of the instructions: for 16-bit results."""
    if EXACT:
        return sigmoid(x)
    else:
        return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def apply_activation(g, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """act(g) in fp32. NaN stays NaN. EXACT: for fp32 results."""
    if ACTIVATION == SILU:
        return g * fast_sigmoid(g * ALPHA, EXACT)
    elif ACTIVATION == GELU:
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # 0.5 * (1 + tanh(y)) = sigmoid(2 y)
        return g * fast_sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g), EXACT)
    elif ACTIVATION == RELU:
        return tl.where(g < 0, 0.0, g)
    elif ACTIVATION == RELU2:
        g = tl.where(g < 0, 0.0, g)
        return g * g
    else:
        return g


@triton.jit
def activate_single(
    g, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, EXACT: tl.constexpr
):
    """The epilogue of a product that is not gated."""
    if LIMIT is not None:
        g = tl.where(g > LIMIT, LIMIT, tl.where(g < -LIMIT, -LIMIT, g))
    return apply_activation(g, ACTIVATION, ALPHA, EXACT)


@triton.jit
def activate_gated(g, u, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, UP_SHIFT: tl.constexpr,
                   EXACT: tl.constexpr):  # fmt: skip
    """The epilogue of gate and up products."""
    if LIMIT is not None:
        g = tl.where(g > LIMIT, LIMIT, g)
        u = tl.where(u > LIMIT, LIMIT, tl.where(u < -LIMIT, -LIMIT, u))
    return apply_activation(g, ACTIVATION, ALPHA, EXACT) * (u + UP_SHIFT)


@triton.jit
def split_columns(
    z, BLOCK_M: tl.constexpr, OUT_N: tl.constexpr, INTERLEAVED: tl.constexpr, SWAP: tl.constexpr
):
    """Gate and up of a tile [BLOCK_M, 2 * OUT_N], or [2 * OUT_N, BLOCK_M] when swapped."""
    if SWAP:
        if INTERLEAVED:
            return tl.split(tl.permute(tl.reshape(z, (OUT_N, 2, BLOCK_M)), (0, 2, 1)))
        else:
            return tl.split(tl.permute(tl.reshape(z, (2, OUT_N, BLOCK_M)), (1, 2, 0)))
    else:
        if INTERLEAVED:
            return tl.split(tl.reshape(z, (BLOCK_M, OUT_N, 2)))
        else:
            return tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, OUT_N)), (0, 2, 1)))


@triton.jit
def finish_tile(
    g,  # products [BLOCK_M, WIDTH] or, when swapped, [WIDTH, BLOCK_M]; of the gate columns when gated
    u,  # those of the up columns, or None
    col0,  # of the result
    rows,  # [BLOCK_M]
    row_ok,
    expert,
    live,  # whether the rows have an expert; if not they are 0
    bias_ptr,
    row_scale_ptr,
    scatter_ptr,
    out_ptr,
    num_out_rows,
    n_out,
    stride_bias,
    stride_out,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    SWAP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Bias, activation, row scale, one rounding, and the store of a tile of the result."""
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    cols = col0 + tl.arange(0, WIDTH)
    col_ok = cols < n_out
    if bias_ptr is not None:
        bias = bias_ptr + expert.to(tl.int64) * stride_bias + (cols * 2 if INTERLEAVED else cols)
        b = tl.load(bias, mask=col_ok, other=0.0).to(tl.float32)
        g += b[:, None] if SWAP else b[None, :]
        if GATED:
            b = tl.load(bias + (1 if INTERLEAVED else n_out), mask=col_ok, other=0.0).to(tl.float32)
            u += b[:, None] if SWAP else b[None, :]
    if GATED:
        y = activate_gated(g, u, ACTIVATION, LIMIT, ALPHA, UP_SHIFT, EXACT)
    else:
        y = activate_single(g, ACTIVATION, LIMIT, ALPHA, EXACT)
    if row_scale_ptr is not None:
        scale = tl.load(row_scale_ptr + rows, mask=row_ok, other=0.0).to(tl.float32)
        y *= scale[None, :] if SWAP else scale[:, None]
    if scatter_ptr is not None:
        at = tl.load(scatter_ptr + rows, mask=row_ok, other=-1)
        row_ok = (at >= 0) & (at < num_out_rows)
    else:
        y = tl.where(live, y, 0.0)
        at = rows
    value = round_to(y, out_ptr.dtype.element_ty)
    at = at.to(tl.int64) * stride_out
    if SWAP:
        tl.store(out_ptr + at[None, :] + cols[:, None], value, mask=row_ok[None, :] & col_ok[:, None])
    else:
        tl.store(out_ptr + at[:, None] + cols[None, :], value, mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def _grouped_gemm_reduce_kernel(
    partial_ptr,  # [S, M, N] fp32
    offsets_ptr,  # [E + 1] int32
    scatter_ptr,
    bias_ptr,
    row_scale_ptr,
    out_ptr,  # [R, F]
    num_rows,
    num_out_rows,
    num_experts,
    n_out,
    split_k,
    stride_bias,
    stride_out,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sums the partial products of one row in the order of the splits, and finishes it."""
    row = tl.program_id(0)
    s = tl.arange(0, BLOCK_E)
    bounds = tl.load(offsets_ptr + s, mask=s <= num_experts, other=2147483647)
    segment = tl.sum((bounds <= row).to(tl.int32), axis=0)
    live = (segment > 0) & (segment <= num_experts)
    expert = tl.where(live, segment - 1, 0)
    col0 = tl.program_id(1) * BLOCK_N
    cols = col0 + tl.arange(0, BLOCK_N)
    ok = (cols < n_out) & live
    n = n_out * 2 if GATED else n_out
    at = partial_ptr + row.to(tl.int64) * n + (cols * 2 if INTERLEAVED else cols)
    g = tl.zeros((BLOCK_N,), dtype=tl.float32)
    u = g
    for _ in range(split_k):
        g += tl.load(at, mask=ok, other=0.0)
        if GATED:
            u += tl.load(at + (1 if INTERLEAVED else n_out), mask=ok, other=0.0)
        at += tl.cast(num_rows, tl.int64) * n
    rows = row + tl.arange(0, 1)
    finish_tile(g[None, :], u[None, :], col0, rows, (rows < num_rows) & (live | (scatter_ptr is None)), expert, live,
                bias_ptr, row_scale_ptr, scatter_ptr, out_ptr, num_out_rows, n_out, stride_bias, stride_out, ACTIVATION,
                GATED, INTERLEAVED, LIMIT, ALPHA, UP_SHIFT, False, BLOCK_N)  # fmt: skip
