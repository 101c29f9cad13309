"""route in plain PyTorch: the definition. Free of host syncs, so it also serves on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def route(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = ids.reshape(-1).long()
    valid = (flat >= 0) & (flat < num_experts)
    key = torch.where(valid, flat, num_experts)  # pairs without an expert sort behind all others
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    counts.scatter_add_(0, key, torch.ones_like(key, dtype=torch.int32))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    offsets[1:] = counts[:num_experts].cumsum(0)
    order = key.argsort(stable=True).int()
    position = torch.arange(flat.numel(), device=ids.device)
    perm = torch.where(position < offsets[num_experts], order, -1).int()
    return perm, offsets, counts[:num_experts].clone()
