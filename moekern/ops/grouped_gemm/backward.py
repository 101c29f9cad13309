"""grouped_gemm's gradient from its Triton kernels: the products again, their activation's gradient, then three products.

M rows sorted by expert, E experts, D width of a row, N width of a product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekern.ops.grouped_gemm import triton, triton_backward
from moekern.ops.grouped_gemm.triton_activation_backward import activation_backward


def contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 and (x.shape[0] <= 1 or x.stride(0) >= x.shape[1]) else x.contiguous()


def pre_activations(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool,
                    gather: Tensor | None, gather_div: int = 1) -> Tensor:  # fmt: skip
    """The products before the activation, [M, N] in fp32: rounded to bf16, values near a limit would change sides."""
    num_rows, width = (x if gather is None else gather).shape[0], weight.shape[2 if transposed else 1]
    z = x.new_empty((num_rows, width), dtype=torch.float32)
    triton.run(
        x, weight, offsets, gather=gather, gather_div=gather_div, bias=bias, transposed=transposed, out=z
    )
    return z


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
    need_x, need_weight, need_bias, need_scale = needs
    grad, x, offsets = contiguous_rows(grad), contiguous_rows(x), offsets.contiguous()
    gather = None if gather is None else gather.contiguous()
    bias = None if bias is None else contiguous_rows(bias)
    dz, d_scale = grad, None
    if row_scale is not None or activation != "none" or gated or limit is not None:
        z = pre_activations(x, weight, offsets, bias, transposed, gather)
        if need_scale and row_scale is not None:
            d_scale = torch.empty_like(row_scale, dtype=torch.float32, memory_format=torch.contiguous_format)
        dz, _ = activation_backward(
            z, grad, offsets, activation, gated, interleaved, limit, alpha, up_shift,
            scale=None if row_scale is None else row_scale.contiguous(), d_scale=d_scale,
        )  # fmt: skip
        del z
    d_x = d_weight = d_bias = None
    if need_x:
        d_x = triton.run(dz, weight, offsets, transposed=not transposed)
        if gather is not None:
            d_x = triton_backward.sum_gathered(d_x, gather, x.shape[0])
    if need_weight:
        a, b = (x, dz) if transposed else (dz, x)
        d_weight = triton_backward.weight_gradient(
            a, b, offsets, weight.dtype, gather=gather, gather_a=transposed
        )
    if need_bias and bias is not None:
        d_bias = triton_backward.bias_gradient(dz, offsets, bias.dtype)
    if d_scale is not None and row_scale is not None:
        d_scale = d_scale.to(row_scale.dtype)
    return [d for d in (d_x, d_weight, d_bias, d_scale) if d is not None]
