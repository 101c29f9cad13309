"""The gradient of an activation between two expert products, in Triton.

M rows sorted by expert, E experts, F width of an activation, N width of a product (2F when gated).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekern import _triton
from moekern._triton_lib import exp_nonpositive, round_to, sigmoid
from moekern.ops.grouped_gemm import config_backward
from moekern.ops.grouped_gemm.activation import ACTIVATIONS
from moekern.ops.grouped_gemm.config_backward import RowsConfig

NONE: tl.constexpr = tl.constexpr(ACTIVATIONS.index("none"))
SILU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("silu"))
GELU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("gelu"))
GELU_TANH: tl.constexpr = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
RELU: tl.constexpr = tl.constexpr(ACTIVATIONS.index("relu"))
RELU2: tl.constexpr = tl.constexpr(ACTIVATIONS.index("relu2"))


@triton.jit
def bounded(offset, num_rows):
    return tl.minimum(tl.maximum(offset, 0), num_rows)


@triton.jit
def _value_and_slope(g, alpha, ACTIVATION: tl.constexpr):
    """act(g) and its derivative, in fp32."""
    if ACTIVATION == SILU:
        s = sigmoid(alpha * g)
        return g * s, s * (1 + alpha * g * (1 - s))
    elif ACTIVATION == GELU:
        p = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        return g * p, p + g * exp_nonpositive(-0.5 * g * g) * 0.3989422804014327
    elif ACTIVATION == GELU_TANH:
        # 0.5 (1 + tanh x) = sigmoid(2x), which keeps its digits in both tails.
        s = sigmoid(1.5957691216057308 * (g + 0.044715 * (g * g * g)))
        rest = sigmoid(-1.5957691216057308 * (g + 0.044715 * (g * g * g)))  # 1 - s would lose them
        return g * s, s + g * (s * rest) * 1.5957691216057308 * (1 + 0.134145 * (g * g))
    elif ACTIVATION == RELU:
        r = tl.where(g < 0, 0.0, g)  # NaN stays NaN
        return r, (g > 0).to(tl.float32)
    elif ACTIVATION == RELU2:
        r = tl.where(g < 0, 0.0, g)
        return r * r, 2 * r
    else:
        return g, tl.zeros_like(g) + 1.0


@triton.jit
def _grouped_gemm_activation_bwd_kernel(
    z_ptr,  # [M, N] fp32: the products before the activation
    dh_ptr,  # [M, F], rows stride_dh apart: gradient of the scaled activations
    scale_ptr,  # or None: what the activations are multiplied by
    index_ptr,  # [M] or None: the scale of row i and its gradient are at index[i] instead of i
    offsets_ptr,  # [E+1]
    dz_ptr,  # [M, N]
    h_ptr,  # [M, F] or None: the scaled activations
    d_scale_ptr,  # fp32, or None
    num_rows,
    num_experts,
    F,
    stride_dh,
    limit,
    alpha,
    up_shift,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    ADD: tl.constexpr,  # to what is in d_scale
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = bounded(tl.load(offsets_ptr), num_rows)
    end = bounded(tl.load(offsets_ptr + num_experts), num_rows)
    live = (row >= begin) & (row < end)
    index = row
    if index_ptr is not None:
        index = tl.load(index_ptr + row, mask=live, other=-1).to(tl.int64)
        live = index >= 0
    scale = tl.zeros([BLOCK_R], dtype=tl.float32) + 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + index, mask=live, other=0.0).to(tl.float32)
    d_scale = tl.zeros([BLOCK_R], dtype=tl.float32)
    N = 2 * F if GATED else F
    for begin_f in range(0, F, BLOCK_F):
        f = begin_f + tl.arange(0, BLOCK_F)
        wanted = live[:, None] & (f < F)[None, :]
        at_h = row[:, None] * F + f[None, :]
        dh = tl.load(dh_ptr + row[:, None] * stride_dh + f[None, :], mask=wanted, other=0.0).to(tl.float32)
        if GATED:
            if INTERLEAVED:
                n = 2 * begin_f + tl.arange(0, 2 * BLOCK_F)
                at_pair = row[:, None] * N + n[None, :]
                wanted_pair = live[:, None] & (n < N)[None, :]
                pair = tl.load(z_ptr + at_pair, mask=wanted_pair, other=0.0)
                g, u = tl.split(tl.reshape(pair, [BLOCK_R, BLOCK_F, 2]))
            else:
                at_g = row[:, None] * N + f[None, :]
                g = tl.load(z_ptr + at_g, mask=wanted, other=0.0)
                u = tl.load(z_ptr + at_g + F, mask=wanted, other=0.0)
            gc = g
            uc = u
            if LIMITED:
                gc = tl.where(g > limit, limit, g)
                uc = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
            value, slope = _value_and_slope(gc, alpha, ACTIVATION)
            h = value * (uc + up_shift)
            scaled = dh * scale[:, None]
            dg = scaled * slope * (uc + up_shift)
            du = scaled * value
            if LIMITED:
                dg *= (g <= limit).to(tl.float32)
                du *= (tl.abs(u) <= limit).to(tl.float32)
            if INTERLEAVED:
                dz = tl.reshape(tl.join(dg, du), [BLOCK_R, 2 * BLOCK_F])
                tl.store(dz_ptr + at_pair, round_to(dz, dz_ptr.dtype.element_ty), mask=wanted_pair)
            else:
                tl.store(dz_ptr + at_g, round_to(dg, dz_ptr.dtype.element_ty), mask=wanted)
                tl.store(dz_ptr + at_g + F, round_to(du, dz_ptr.dtype.element_ty), mask=wanted)
        else:
            z = tl.load(z_ptr + at_h, mask=wanted, other=0.0)
            zc = z
            if LIMITED:
                zc = tl.where(z > limit, limit, tl.where(z < -limit, -limit, z))
            h, slope = _value_and_slope(zc, alpha, ACTIVATION)
            dz = dh * scale[:, None] * slope
            if LIMITED:
                dz *= (tl.abs(z) <= limit).to(tl.float32)
            tl.store(dz_ptr + at_h, round_to(dz, dz_ptr.dtype.element_ty), mask=wanted)
        if d_scale_ptr is not None:
            d_scale += tl.sum(tl.where(wanted, dh * h, 0.0), axis=1)
        if h_ptr is not None:
            tl.store(h_ptr + at_h, round_to(h * scale[:, None], h_ptr.dtype.element_ty), mask=wanted)
    if d_scale_ptr is not None:
        if index_ptr is None:
            tl.store(d_scale_ptr + row, d_scale, mask=row < num_rows)  # 0 outside every segment
        else:
            if ADD:
                d_scale += tl.load(d_scale_ptr + index, mask=live, other=0.0)
            tl.store(d_scale_ptr + index, d_scale, mask=live)


def activation_backward(z: Tensor, dh: Tensor, offsets: Tensor, activation: str, gated: bool, interleaved: bool,
                        limit: float | None, alpha: float, up_shift: float, *, scale: Tensor | None = None,
                        index: Tensor | None = None, keep_activations: bool = False, d_scale: Tensor | None = None,
                        add: bool = False) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dz [M, N], and with keep_activations the scaled activations [M, F], both in dh.dtype; rows outside every segment
    are left unwritten.

    z: [M, N] fp32, contiguous. dh: gradient of scale * activate(z). scale: contiguous; row i has scale[index[i]], without
    index scale[i]. d_scale: fp32, contiguous; takes the gradient of the scale, added to what is there with `add`.
    """
    num_rows, width = z.shape[0], z.shape[1] // (2 if gated else 1)
    dz = torch.empty_like(z, dtype=dh.dtype)
    h = dh.new_empty((num_rows, width)) if keep_activations else None
    if num_rows > 0 and width > 0:
        config = config_backward.choose_activation_backward(num_rows, width, _triton.gpu_of(z.device).num_sms)
        with _triton.guard(z):
            _grouped_gemm_activation_bwd_kernel[(triton.cdiv(num_rows, config.block_rows),)](
                z, dh, scale, index, offsets, dz, h, d_scale, num_rows, offsets.shape[0] - 1, width, dh.stride(0),
                limit or 0.0, alpha, up_shift,
                **activation_constants(config, activation, gated, interleaved, limit is not None, add),
                num_warps=config.num_warps,
            )  # fmt: skip
    return dz, h


def activation_constants(config: RowsConfig, activation: str, gated: bool, interleaved: bool, limited: bool,
                          add: bool) -> dict[str, Any]:  # fmt: skip
    return {
        "ACTIVATION": ACTIVATIONS.index(activation), "GATED": gated, "INTERLEAVED": interleaved, "LIMITED": limited,
        "ADD": add, "BLOCK_R": config.block_rows, "BLOCK_F": config.block_columns,
    }  # fmt: skip
