"""combine in plain PyTorch: the definition. T tokens, K pairs per token, D width."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(y: Tensor, weights: Tensor, ids: Tensor | None = None, num_experts: int | None = None) -> Tensor:
    compute = torch.float64 if y.dtype == torch.float64 else torch.float32
    rows_TKD = y.unflatten(0, weights.shape)
    total = y.new_zeros((weights.shape[0], y.shape[1]), dtype=compute)
    for k in range(weights.shape[1]):
        term = rows_TKD[:, k].to(compute) * weights[:, k, None].to(compute)
        if ids is not None:
            assert num_experts is not None
            kept = (ids[:, k] >= 0) & (ids[:, k] < num_experts)
            term = torch.where(kept[:, None], term, 0.0)  # where, not a product: a skipped row may hold NaN
        total = total + term
    return total.to(y.dtype)
