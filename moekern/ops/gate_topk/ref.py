"""gate_topk in plain PyTorch: the definition.

T tokens, E experts, K selected experts per token, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_topk", "sigmoid_topk")
GROUP_SCORES = ("max", "top2")


def scores_of(logits: Tensor, scoring: str) -> Tensor:
    """Scores of all experts; the *_topk scorings select on the logits and score what they selected."""
    if scoring == "softmax":
        return logits.softmax(dim=-1)
    if scoring == "sigmoid":
        return logits.sigmoid()
    if scoring == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits).sqrt()
    return logits


def select(choice: Tensor, top_k: int, num_groups: int, topk_groups: int, group_score: str) -> Tensor:
    """Ids [T, K] of the largest choices among the experts of the best groups; ties go to the lower id."""
    # NaN and -inf rank last among the eligible; what a group mask removes ranks below even those.
    lowest = torch.finfo(choice.dtype).min
    choice = choice.nan_to_num(nan=lowest, neginf=lowest, posinf=float("inf"))
    if num_groups > 1:
        grouped_TGe = choice.unflatten(-1, (num_groups, -1))
        best = grouped_TGe.sort(dim=-1, descending=True).values
        # In two steps: a sum of two `lowest` would overflow to -inf, which is what masks.
        group_TG = best[..., 0] if group_score == "max" else best[..., :2].sum(-1).clamp(min=lowest)
        kept = group_TG.sort(dim=-1, descending=True, stable=True).indices[..., :topk_groups]
        eligible = torch.zeros_like(group_TG, dtype=torch.bool).scatter(-1, kept, True)
        choice = grouped_TGe.masked_fill(~eligible.unsqueeze(-1), float("-inf")).flatten(-2)
    return choice.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def weights_of(
    logits: Tensor,
    ids: Tensor,
    scoring: str,
    renormalize: bool,
    norm_eps: float,
    norm_min: float,
    scale: float,
    expert_scale: Tensor | None,
) -> Tensor:
    """Weights [T, K] of given experts; differentiable in logits and expert_scale."""
    num_experts = logits.shape[-1]
    valid = (ids >= 0) & (ids < num_experts)
    index = ids.long().clamp(0, max(num_experts - 1, 0))
    weights = scores_of(logits, scoring).gather(-1, index)
    if scoring == "softmax_topk":
        weights = weights.masked_fill(~valid, float("-inf")).softmax(dim=-1)
    elif scoring == "sigmoid_topk":
        weights = weights.sigmoid()
    weights = torch.where(valid, weights, 0.0)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + norm_eps).clamp(min=norm_min)
    weights = weights * scale
    if expert_scale is not None:
        weights = weights * expert_scale.to(weights.dtype)[index]
    return weights


def gate_topk(
    logits: Tensor,
    top_k: int,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    renormalize: bool = False,
    norm_eps: float = 0.0,
    norm_min: float = 0.0,
    scale: float = 1.0,
    expert_scale: Tensor | None = None,
    preselected: Tensor | None = None,
    ids_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(compute)
    if preselected is None:
        choice = scores_of(logits, scoring)
        if bias is not None:
            choice = choice + bias.to(compute)
        ids = select(choice, top_k, num_groups, topk_groups, group_score)
    else:
        ids = preselected
    weights = weights_of(logits, ids, scoring, renormalize, norm_eps, norm_min, scale, expert_scale)
    return weights, ids.to(ids_dtype or torch.int64, copy=True)
