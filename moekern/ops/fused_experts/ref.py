"""fused_experts in plain PyTorch: the definition, and its gradient.

T tokens, E experts, K selected experts per token, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moekern.ops.combine.ref import combine
from moekern.ops.grouped_gemm.activation import activate, activate_backward
from moekern.ops.grouped_gemm.ref import compute_dtype, linear


def pairs_by_expert(ids: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, flat indices of its pairs) for every expert that has one."""
    flat = ids.reshape(-1)
    for e in flat.unique().tolist():
        if 0 <= e < num_experts:
            yield e, (flat == e).nonzero().squeeze(-1)


def fused_experts(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    ids: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_shift: float = 0.0,
    reduce: bool = True,
) -> Tensor:
    num_experts, top_k, compute = w_gate_up.shape[0], ids.shape[1], compute_dtype(x)
    rows = x.new_zeros((ids.numel(), x.shape[1]))
    for e, pairs in pairs_by_expert(ids, num_experts):
        x_mD = x[pairs // top_k].to(compute)
        z = linear(x_mD, w_gate_up[e], None if b_gate_up is None else b_gate_up[e], transposed)
        h = activate(z, activation, gated, interleaved, limit, alpha, up_shift).to(x.dtype)
        rows[pairs] = linear(h.to(compute), w_down[e], None if b_down is None else b_down[e], transposed).to(
            x.dtype
        )
    return combine(rows, weights, ids, num_experts) if reduce else rows


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
    """Gradients of x, w_gate_up, w_down, weights, b_gate_up and b_down, those that `needs` asks for, in that order.

    The activations are computed again, one expert at a time: nothing of size T*K*F is kept.
    """
    num_experts, top_k, compute = w_gate_up.shape[0], ids.shape[1], compute_dtype(x)
    act = (activation, gated, interleaved, limit, alpha, up_shift)
    inputs = (x, w_gate_up, w_down, weights, b_gate_up, b_down)
    d_x, d_up, d_down, d_weights, d_b_up, d_b_down = (
        torch.zeros_like(t, dtype=compute if t is x else t.dtype, memory_format=torch.contiguous_format)
        if need and t is not None
        else None
        for t, need in zip(inputs, needs, strict=True)
    )
    weights_P = weights.reshape(-1).to(compute)
    for e, pairs in pairs_by_expert(ids, num_experts):
        tokens = pairs // top_k
        x_mD = x[tokens].to(compute)
        w_up, w_dn = w_gate_up[e].to(compute), w_down[e].to(compute)
        w_up_ND, w_down_DF = (w_up.t(), w_dn.t()) if transposed else (w_up, w_dn)
        z = linear(x_mD, w_gate_up[e], None if b_gate_up is None else b_gate_up[e], transposed)
        h = activate(z, *act).to(x.dtype).to(compute)
        dy = grad[tokens if reduce else pairs].to(compute)
        if reduce:
            if d_weights is not None:
                y = linear(h, w_down[e], None if b_down is None else b_down[e], transposed)
                d_weights.view(-1)[pairs] = (dy * y).sum(-1).to(weights.dtype)
            dy = dy * weights_P[pairs, None]
        if d_down is not None:
            dw_DF = dy.t() @ h
            d_down[e] = (dw_DF.t() if transposed else dw_DF).to(x.dtype)
        if d_b_down is not None:
            d_b_down[e] = dy.sum(0).to(x.dtype)
        dz = activate_backward(dy @ w_down_DF, z, *act)
        if d_up is not None:
            dw_ND = dz.t() @ x_mD
            d_up[e] = (dw_ND.t() if transposed else dw_ND).to(x.dtype)
        if d_b_up is not None:
            d_b_up[e] = dz.sum(0).to(x.dtype)
        if d_x is not None:
            d_x.index_add_(0, tokens, dz @ w_up_ND)
    d_x = None if d_x is None else d_x.to(x.dtype)
    return [d for d in (d_x, d_up, d_down, d_weights, d_b_up, d_b_down) if d is not None]
