"""fused_experts' gradient from grouped kernels: no loop over experts, no host sync.

T tokens, E experts, K selected experts per token, D model width, F expert width; P = T*K pairs, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekern import _triton
from moekern.ops.grouped_gemm import triton as grouped_gemm, triton_backward
from moekern.ops.grouped_gemm.backward import contiguous_rows, pre_activations
from moekern.ops.grouped_gemm.config_backward import choose_row_sum
from moekern.ops.grouped_gemm.triton_activation_backward import activation_backward
from moekern.ops.grouped_gemm.triton_backward_variants import specialised
from moekern.ops.route import route


@triton.jit
def _fused_experts_bias_dot_kernel(
    grad_ptr,  # [T, D], rows stride_t apart
    bias_ptr,  # [E, D], rows stride_e apart
    ids_ptr,  # [T, K]
    out_ptr,  # [T, K] fp32
    num_experts,
    D,
    stride_t,
    stride_e,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """<gradient of the token, bias of the expert> of each pair; 0 for an id outside [0, E)."""
    pair = tl.program_id(0).to(tl.int64)
    id = tl.load(ids_ptr + pair).to(tl.int64)
    valid = (id >= 0) & (id < num_experts)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        at = d + tl.arange(0, BLOCK_D)
        wanted = valid & (at < D)
        grad = tl.load(grad_ptr + pair // K * stride_t + at, mask=wanted, other=0.0).to(tl.float32)
        total += grad * tl.load(bias_ptr + id * stride_e + at, mask=wanted, other=0.0).to(tl.float32)
    tl.store(out_ptr + pair, tl.sum(total, axis=0))


def _bias_dot(grad: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    out = torch.empty_like(ids, dtype=torch.float32)
    config = choose_row_sum(grad.shape[1])
    with _triton.guard(grad):
        _fused_experts_bias_dot_kernel[(ids.numel(),)](
            grad, bias, ids, out, bias.shape[0], grad.shape[1], grad.stride(0), bias.stride(0), K=ids.shape[1],
            BLOCK_D=config.block_columns, num_warps=config.num_warps,
        )  # fmt: skip
    return out


def fused_experts_backward(
    grad: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    ids: Tensor,
    b_gate_up: Tensor | None,
    b_down: Tensor | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    limit: float | None,
    alpha: float,
    up_shift: float,
    reduce: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, w_gate_up, w_down, weights, b_gate_up and b_down, those that `needs` asks for, in that order."""
    num_experts, top_k, dtype = w_gate_up.shape[0], ids.shape[1], x.dtype
    need_x, need_up, need_down, need_weights, need_b_up, need_b_down = needs
    need_b_up, need_b_down = need_b_up and b_gate_up is not None, need_b_down and b_down is not None
    if ids.numel() == 0 or x.shape[1] == 0 or w_down.numel() == 0:
        inputs = (x, w_gate_up, w_down, weights, b_gate_up, b_down)
        return [torch.zeros_like(t, memory_format=torch.contiguous_format)
                for t, need in zip(inputs, needs, strict=True) if need and t is not None]  # fmt: skip
    grad, x, ids = contiguous_rows(grad), contiguous_rows(x), ids.contiguous()
    b_gate_up, b_down = (None if b is None else contiguous_rows(b) for b in (b_gate_up, b_down))
    perm, offsets, _ = route(ids, num_experts)
    grad_div = top_k if reduce else 1  # pair -> row of grad
    scale = weights.contiguous() if reduce else None

    d_x = d_up = d_down = d_weights = d_b_up = d_b_down = None
    if need_weights:
        # <grad, y> of a pair with y = h W^T + b is <grad W, h> + <grad, b>: y and its gradient are never formed.
        if reduce and b_down is not None:
            d_weights = _bias_dot(grad, b_down, ids)
        else:
            d_weights = torch.zeros_like(ids, dtype=torch.float32)
    if need_x or need_up or need_down or need_b_up or (need_weights and reduce):
        z = pre_activations(x, w_gate_up, offsets, b_gate_up, transposed, perm, top_k)
        dh = grouped_gemm.run(
            grad, w_down, offsets, gather=perm, gather_div=grad_div, transposed=not transposed
        )
        dz, h = activation_backward(
            z, dh, offsets, activation, gated, interleaved, limit, alpha, up_shift, scale=scale, index=perm,
            keep_activations=need_down, d_scale=d_weights if reduce else None, add=b_down is not None,
        )  # fmt: skip
        del z, dh
        if h is not None:
            a, b = (h, grad) if transposed else (grad, h)
            d_down = triton_backward.weight_gradient(
                a, b, offsets, dtype, gather=perm, gather_a=not transposed, gather_div=grad_div
            )
            del h
        if need_up:
            a, b = (x, dz) if transposed else (dz, x)
            d_up = triton_backward.weight_gradient(
                a, b, offsets, dtype, gather=perm, gather_a=transposed, gather_div=top_k
            )
        if need_b_up:
            d_b_up = triton_backward.bias_gradient(dz, offsets, dtype)
        if need_x:
            rows = x.new_empty((ids.numel(), x.shape[1]))
            grouped_gemm.run(dz, w_gate_up, offsets, transposed=not transposed, scatter=perm, out=rows)
            d_x = triton_backward.sum_pairs(rows, ids, num_experts)
    if need_b_down:
        d_b_down = triton_backward.bias_gradient(
            grad, offsets, dtype, gather=perm, gather_div=grad_div, scale=scale
        )
    d_weights = None if d_weights is None else d_weights.to(weights.dtype)
    return [d for d in (d_x, d_up, d_down, d_weights, d_b_up, d_b_down) if d is not None]


def aot_variants(gpu: _triton.Gpu) -> Iterator[_triton.Variant]:
    """Specialisations for the static gate."""
    for dtype in ("bf16", "fp16", "fp32"):
        types = {"grad_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}", "ids_ptr": "*i64", "out_ptr": "*fp32",
                 "num_experts": "i32", "D": "i32", "stride_t": "i32", "stride_e": "i32"}  # fmt: skip
        for width in (256, 2048):
            config = choose_row_sum(width)
            constants = {"K": 8, "BLOCK_D": config.block_columns}
            yield specialised(f"{dtype} {config.block_columns}", _fused_experts_bias_dot_kernel, types, constants, (),
                              num_warps=config.num_warps, worst=dtype == "bf16")  # fmt: skip
