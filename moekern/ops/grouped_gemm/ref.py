"""grouped_gemm in plain PyTorch: the definition, and its gradient.

M rows sorted by expert, E experts, D width of a row, N width of a product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from moekern.ops.grouped_gemm.activation import activate, activate_backward


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x [m, D] times one expert's weight, [N, D] or transposed [D, N], in the dtype of x."""
    weight = weight.to(x.dtype)
    y = x @ (weight if transposed else weight.t())
    return y if bias is None else y + bias.to(x.dtype)


def segments(offsets: Tensor, num_rows: int) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows; rows past num_rows do not exist."""
    bounds = [min(max(b, 0), num_rows) for b in offsets.tolist()]
    for e, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin < end:
            yield e, slice(begin, end)


def rows_of(x: Tensor, gather: Tensor | None, rows: slice) -> Tensor:
    """Input rows of one segment in the dtype of the computation; a gather index outside x gives a row of zeros."""
    if gather is None:
        return x[rows].to(compute_dtype(x))
    index = gather[rows].long()
    valid = (index >= 0) & (index < x.shape[0])
    if x.shape[0] == 0:
        return x.new_zeros((index.numel(), x.shape[1]), dtype=compute_dtype(x))
    return torch.where(valid[:, None], x[index.clamp(0, x.shape[0] - 1)], 0).to(compute_dtype(x))


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    gather: Tensor | None = None,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_shift: float = 0.0,
) -> Tensor:
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    width = weight.shape[2 if transposed else 1] // (2 if gated else 1)
    out = x.new_zeros((num_rows, width))
    for e, rows in segments(offsets, num_rows):
        z = linear(rows_of(x, gather, rows), weight[e], None if bias is None else bias[e], transposed)
        y = activate(z, activation, gated, interleaved, limit, alpha, up_shift)
        if row_scale is not None:
            y = y * row_scale[rows, None].to(y.dtype)
        out[rows] = y.to(x.dtype)
    return out


def grouped_gemm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    gather: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    limit: float | None,
    alpha: float,
    up_shift: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias and row_scale, those that `needs` asks for, in that order."""
    compute = compute_dtype(x)
    act = (activation, gated, interleaved, limit, alpha, up_shift)
    grad_x = torch.zeros_like(x, dtype=compute, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    grad_bias = (
        torch.zeros_like(bias, memory_format=torch.contiguous_format)
        if needs[2] and bias is not None
        else None
    )
    grad_scale = torch.zeros_like(row_scale) if needs[3] and row_scale is not None else None
    for e, rows in segments(offsets, grad.shape[0]):
        x_mD = rows_of(x, gather, rows)
        w_ND = weight[e].to(compute).t() if transposed else weight[e].to(compute)
        z = linear(x_mD, weight[e], None if bias is None else bias[e], transposed)
        dy = grad[rows].to(compute)
        if grad_scale is not None:
            grad_scale[rows] = (dy * activate(z, *act)).sum(-1).to(grad_scale.dtype)
        if row_scale is not None:
            dy = dy * row_scale[rows, None].to(compute)
        dz = activate_backward(dy, z, *act)
        if grad_weight is not None:
            dw_ND = dz.t() @ x_mD
            grad_weight[e] = (dw_ND.t() if transposed else dw_ND).to(weight.dtype)
        if grad_bias is not None:
            grad_bias[e] = dz.sum(0).to(grad_bias.dtype)
        if needs[0]:
            dx = dz @ w_ND
            if gather is None:
                grad_x[rows] = dx
            else:
                index = gather[rows].long()
                valid = (index >= 0) & (index < x.shape[0])
                grad_x.index_add_(0, index[valid], dx[valid])
    found = (grad_x.to(x.dtype), grad_weight, grad_bias, grad_scale)
    return [g for g, need in zip(found, needs, strict=True) if need and g is not None]
