"""gate in plain PyTorch: the definition. T tokens, E experts, D model width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekern.ops.gate_topk.ref import gate_topk


def gate(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    linear_bias: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    **gating: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    logits = x.to(compute) @ weight.to(compute).t()
    if linear_bias is not None:
        logits = logits + linear_bias.to(compute)
    logits = logits.to(logits_dtype or compute)
    return *gate_topk(logits, top_k, **gating), logits
