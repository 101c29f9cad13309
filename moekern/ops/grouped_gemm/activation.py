"""Activations between the two expert GEMMs: definition, gradient and check. Shared by grouped_gemm and fused_experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu", "relu2")


def _apply(g: Tensor, activation: str, alpha: float) -> Tensor:
    if activation == "silu":
        return g * torch.sigmoid(alpha * g)
    if activation == "gelu":
        return functional.gelu(g)
    if activation == "gelu_tanh":
        return functional.gelu(g, approximate="tanh")
    if activation == "relu":
        return g.relu()
    if activation == "relu2":
        return g.relu().square()
    return g


def _derivative(g: Tensor, activation: str, alpha: float) -> Tensor:
    if activation == "silu":
        s = torch.sigmoid(alpha * g)
        return s * (1 + alpha * g * (1 - s))
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(g * math.sqrt(0.5))) + g * torch.exp(-0.5 * g * g) / math.sqrt(
            2 * math.pi
        )
    if activation == "gelu_tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))
        return 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * g * g)
    if activation == "relu":
        return (g > 0).to(g.dtype)
    if activation == "relu2":
        return 2 * g.relu()
    return torch.ones_like(g)


def split(z: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up columns of z [.., 2F]."""
    if interleaved:
        return z[..., ::2], z[..., 1::2]
    return z.tensor_split(2, dim=-1)  # type: ignore[return-value]


def activate(
    z: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    limit: float | None,
    alpha: float,
    up_shift: float,
) -> Tensor:
    """z [.., 2F] -> act(g) * (u + up_shift) [.., F], or act(z) when not gated."""
    if not gated:
        return _apply(z if limit is None else z.clamp(-limit, limit), activation, alpha)
    g, u = split(z, interleaved)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return _apply(g, activation, alpha) * (u + up_shift)


def activate_backward(
    grad: Tensor,
    z: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    limit: float | None,
    alpha: float,
    up_shift: float,
) -> Tensor:
    """Gradient of `activate` with respect to z."""
    bound = math.inf if limit is None else limit
    if not gated:
        return grad * _derivative(z.clamp(-bound, bound), activation, alpha) * (z.abs() <= bound)
    g, u = split(z, interleaved)
    gc, uc = g.clamp(max=bound), u.clamp(-bound, bound)
    grad_g = grad * _derivative(gc, activation, alpha) * (uc + up_shift) * (g <= bound)
    grad_u = grad * _apply(gc, activation, alpha) * (u.abs() <= bound)
    if interleaved:
        return torch.stack((grad_g, grad_u), dim=-1).flatten(-2)
    return torch.cat((grad_g, grad_u), dim=-1)


def check_activation(
    op: str,
    activation: str,
    gated: bool,
    interleaved: bool,
    limit: float | None,
    alpha: float,
    up_shift: float,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    if interleaved and not gated:
        raise ValueError(f"{op}: interleaved applies to gated experts only")
    if up_shift != 0 and not gated:
        raise ValueError(f"{op}: up_shift applies to gated experts only; got {up_shift}")
    if alpha != 1 and activation != "silu":
        raise ValueError(f"{op}: alpha applies to silu only; got {alpha} with {activation!r}")
    if limit is not None and not limit > 0:
        raise ValueError(f"{op}: limit must be positive or None; got {limit}")
