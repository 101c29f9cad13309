"""Routers: the forward that a patched router runs, and the checks before it is used.

T tokens, E experts, K selected experts per token, D model width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from moekern import ops
from moekern.hf import _common
from moekern.hf.routers import FUSED, NOT_EXPRESSIBLE, ROUTERS, Router

# Up to here one `gate` call is faster than a linear layer and gate_topk: 100 us against 156 for 16 tokens of a
# DeepSeek-V2-Lite router, 239 against 294 for 64 (bf16, which the class casts to fp32 in every call; one thread).
MAX_GATE_TOKENS = 64


def _is_fused(row: Router, module: Any, x: Tensor) -> bool:
    """Whether one `gate` call replaces the linear layer too: few tokens, inference, a kernel for it."""
    return (
        row.logits in FUSED
        and x.dim() == 2
        and x.shape[0] <= MAX_GATE_TOKENS
        and _common.has_kernel("gate", x.device)
        and not (torch.is_grad_enabled() and (x.requires_grad or module.weight.requires_grad))
        and not torch.is_autocast_enabled(x.device.type)
        and module.weight.dtype in _common.DTYPES
        and x.dtype in _common.DTYPES
    )


def _gating(row: Router, module: Any, argument: Tensor | None) -> dict[str, Any]:
    """The arguments of gate_topk for one call; attributes are read now, since loading and PEFT replace them."""
    gating: dict[str, Any] = {
        "top_k": _common.attribute(module, row.top_k),
        "scoring": row.scoring if isinstance(row.scoring, str) else row.scoring(module),
        "renormalize": row.renormalize
        if isinstance(row.renormalize, bool)
        else getattr(module, row.renormalize),
        "norm_eps": row.eps,
    }
    if row.minimum is not None:
        gating["norm_min"] = getattr(module, row.minimum)
    if row.scale is not None:
        gating["scale"] = getattr(module, row.scale) if isinstance(row.scale, str) else row.scale(module)
    if row.expert_scale is not None:
        gating["expert_scale"] = getattr(module, row.expert_scale)
    if row.bias is not None:
        bias = argument if row.bias == "argument" else _common.attribute(module, row.bias)
        # The bias selects and is no part of the weights: it has no gradient in the classes either.
        gating["bias"] = None if bias is None else bias.detach().reshape(-1)
    if row.preselected is not None and argument is not None:
        gating["preselected"] = getattr(module, row.preselected)[argument.reshape(-1)].long()
    if row.groups is not None and not (row.only_if_grouped and module.topk_method == "greedy"):
        gating.update(num_groups=module.num_group, topk_groups=module.topk_group, group_score=row.groups)
    return gating


def router_forward(
    module: Any, hidden_states: Tensor, argument: Tensor | None = None, **named: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Replaces the forward of a router instance.

    Args:
        module: the router.
        hidden_states: [B, S, D] or [T, D], as its class takes it.
        argument: what some classes take besides (correction bias [E], token ids), also by its own name.

    Returns:
        logits [T, E] (probabilities for Gemma 4), weights [T, K] in the dtype of the class, ids [T, K] int64.
    """
    row = cast(Router, _common.row_of(ROUTERS, module))  # patch has found it
    if argument is None and row.argument is not None:
        argument = named.get(row.argument)
    if row.flatten:
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
    gating = _gating(row, module, argument)
    if _is_fused(row, module, hidden_states):
        weights, ids, logits = ops.gate(
            hidden_states, module.weight, linear_bias=getattr(module, "bias", None),
            logits_dtype=torch.float32 if FUSED[row.logits] else hidden_states.dtype, **gating,
        )  # fmt: skip
    else:
        logits = row.logits(module, hidden_states)
        weights, ids = ops.gate_topk(logits.flatten(0, -2), **gating)
    if row.weights == "fp32":
        weights = weights.to(torch.float32)
    else:
        weights = weights.to(logits.dtype if row.weights == "logits" else hidden_states.dtype)
    if logits.dim() != 2:
        weights, ids = (value.unflatten(0, logits.shape[:-1]) for value in (weights, ids))
    return logits if row.first is None else row.first(logits), weights, ids


def reason_against(module: Any) -> str | None:
    """Why the router cannot be patched, or None."""
    name = type(module).__name__
    if name in NOT_EXPRESSIBLE:
        return NOT_EXPRESSIBLE[name]
    row = _common.row_of(ROUTERS, module)
    if row is None:
        return f"no row for {name}"
    reason = _common.reason_against_instance(module)
    if reason is not None:
        return reason
    try:
        weight = _common.attribute(module, row.weight)
    except AttributeError as error:
        return f"its class has changed: {error}"
    reason = _common.reason_against_weights({row.weight: weight})
    if reason is None and row.skip is not None:
        reason = row.skip(module)
    if reason is None and not isinstance(row.scoring, str) and row.scoring(module) is None:
        reason = "its scoring function is not one that gate_topk computes"
    return (
        reason or _common.reason_without_kernel("gate_topk", weight.device) or _mismatch(module, row, weight)
    )


def _mismatch(module: Any, row: Router, weight: Tensor) -> str | None:
    """Compares the row with the class on random tokens: a capability check that outlives versions."""
    num_tokens, num_experts = 16, weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    # Classes that flatten may insist on [B, S, D].
    hidden = hidden.unsqueeze(0) if row.flatten else hidden
    extra: tuple[Tensor, ...] = ()
    if row.preselected is not None:
        extra = (torch.arange(num_tokens, device=weight.device) % getattr(module, row.preselected).shape[0],)
    elif row.bias == "argument":
        extra = (torch.rand(num_experts, generator=generator).to(weight.device),)
    try:
        with torch.no_grad():
            ours = router_forward(module, hidden, *extra)
            own = type(module).forward(module, hidden, *extra)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        return f"its forward does not take or give what the table says ({error})"
    if not isinstance(own, tuple) or len(own) != 3:
        return "its forward returns something else than (logits, weights, ids)"
    for name, mine, theirs in zip(("logits", "weights", "ids"), ours, own, strict=True):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"its {name} are {theirs.dtype} {list(theirs.shape)}; the table gives {mine.dtype} {list(mine.shape)}"
    # Sorted, since classes order the experts as topk(sorted=False) does; most tokens, since rounded scores tie.
    tolerance = 16 * torch.finfo(own[1].dtype).eps
    mine, theirs = (value.flatten(0, -2).float().sort(dim=-1).values for value in (ours[1], own[1]))
    equal = torch.isclose(mine, theirs, rtol=tolerance, atol=tolerance, equal_nan=True).all(-1).float().mean()
    if not torch.allclose(ours[0].float(), own[0].float(), rtol=tolerance, atol=tolerance, equal_nan=True):
        return "its logits differ from what the table says"
    return None if equal >= 0.75 else "its weights differ from what the table says"
