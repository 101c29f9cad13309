"""Experts: the function behind `experts_implementation="moekern"`, and the table of activations it fuses.

T tokens, E experts, K selected experts, D model width, F expert width.
"""

from __future__ import annotations

import functools
import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekern import ops
from moekern.hf import _common

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gate:
    """What an experts class does between its two projections; strings name attributes of the module.

    activation: name of the op's activation, or None for the one that `act_fn` is.
    """

    activation: str | None = None
    limit: str | None = None
    alpha: str | None = None
    up_shift: float = 0.0
    interleaved: bool = False


# Classes with an `_apply_gate` of their own; `patch` checks each row against the class before it uses it.
GATES = {
    "GptOssExperts": Gate("silu", limit="limit", alpha="alpha", up_shift=1.0, interleaved=True),
    "OpenAIPrivacyFilterExperts": Gate("silu", limit="limit", alpha="alpha", up_shift=1.0),
    "MiniMaxM3VLExperts": Gate("silu", limit="swiglu_limit", alpha="swiglu_alpha", up_shift=1.0),
    "DeepseekV4Experts": Gate(limit="limit"),
    "HYV4Experts": Gate("silu", limit="swiglu_limit"),
    "Glm5NextTextExperts": Gate("silu", limit="swiglu_limit"),
    "BeamExperts": Gate(),  # the default gate in fp32, which is what the op computes anyway
}

DEFAULT_GATE = Gate()

# `act_fn` by the name of its class (or of the function itself) -> activation of the op.
ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "silu": "silu",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "LinearActivation": "none",
}


def _activation_of(module: Any) -> str | None:
    function = getattr(module, "act_fn", None)
    return ACTIVATIONS.get(type(function).__name__) or ACTIVATIONS.get(getattr(function, "__name__", ""))


def _gate_of(module: Any) -> Gate | None:
    row = _common.row_of(GATES, module)
    if row is not None:
        return row
    function = getattr(type(module), "_apply_gate", None)
    return DEFAULT_GATE if getattr(function, "__name__", "") == "_default_apply_gate" else None


def activation_arguments(module: Any) -> dict[str, Any] | None:
    """The op's activation arguments for this module, or None when the op has no such activation."""
    gated = module.has_gate
    gate = _gate_of(module) if gated else DEFAULT_GATE
    if gate is None:
        return None
    activation = gate.activation or _activation_of(module)
    if activation is None:
        return None
    return {
        "activation": activation,
        "gated": gated,
        "interleaved": gate.interleaved,
        "limit": None if gate.limit is None else getattr(module, gate.limit),
        "alpha": 1.0 if gate.alpha is None else getattr(module, gate.alpha),
        "up_shift": gate.up_shift,
    }


def is_experts(module: Any) -> bool:
    """Whether the module is an experts layer: of the registry (it carries the layout flags) or by its name."""
    state = module.__dict__
    return ("has_gate" in state and "num_experts" in state) or _looks_like_experts(module)


def _looks_like_experts(module: Any) -> bool:
    return type(module).__name__.endswith("Experts") and not isinstance(module, nn.ModuleList)


def _weights_of(module: Any) -> dict[str, Any]:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    names = (up, "down_proj", f"{up}_bias", "down_proj_bias") if module.has_bias else (up, "down_proj")
    return {name: getattr(module, name, None) for name in names}


def reason_against(module: Any) -> str | None:
    """Why the module cannot be patched, or None."""
    if "is_transposed" not in module.__dict__ or not hasattr(type(module).forward, "__wrapped__"):
        return "its class does not go through transformers' experts registry"
    reason = _common.reason_against_instance(module)
    if reason is not None:
        return reason
    if getattr(module, "has_post_expert_norm", False):
        return "a norm follows each expert (post_expert_norm)"
    arguments = activation_arguments(module)
    if arguments is None:
        if module.has_gate and _gate_of(module) is None:
            return f"{type(module).__name__}._apply_gate is not one the op computes"
        return f"activation {type(getattr(module, 'act_fn', None)).__name__} is not one the op computes"
    weights = _weights_of(module)
    reason = _common.reason_against_weights(weights)
    if reason is not None:
        return reason
    if any(weight.dim() != (2 if name.endswith("bias") else 3) for name, weight in weights.items()):
        return "its weights are not stacked per expert"
    if torch.compiler.is_compiling():  # a module chosen by name; what follows cannot be traced
        return None
    reason = _reason_without_kernel(module, weights, arguments)
    if reason is not None:
        return reason
    # Kept per instance, for a module that is chosen by name asks in every forward: 340 us, 40 with the answer at hand.
    key = (type(module), getattr(module, "act_fn", None), *arguments.values())
    known, answer = _MISMATCHES.get(module, (None, None))
    if known != key:
        answer = _mismatch(module, arguments)
        _MISMATCHES[module] = (key, answer)
    return answer


_MISMATCHES: weakref.WeakKeyDictionary[Any, tuple[Any, str | None]] = weakref.WeakKeyDictionary()


def _reason_without_kernel(module: Any, weights: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    w_gate_up, w_down, *biases = weights.values()
    width = w_gate_up.shape[1 if module.is_transposed else 2]
    b_gate_up, b_down = biases or (None, None)
    return _common.reason_without_kernel(
        "fused_experts", w_gate_up.device, x=w_gate_up.new_empty(1, width), w_gate_up=w_gate_up, w_down=w_down,
        weights=w_gate_up.new_empty(1, 1), ids=w_gate_up.new_empty(1, 1, dtype=torch.int64), b_gate_up=b_gate_up,
        b_down=b_down, transposed=module.is_transposed, **arguments,
    )  # fmt: skip


def _mismatch(module: Any, arguments: dict[str, Any]) -> str | None:
    """Compares the activation with the class's own on random rows: a capability check that outlives versions."""
    width = 8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(16, 2 * width if module.has_gate else width, generator=generator) * 4
    try:
        with torch.no_grad():
            own = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    except RuntimeError as error:
        return f"its activation failed on a CPU tensor ({error})"
    rows = torch.zeros(16, 1, dtype=torch.int64)
    identity = torch.eye(hidden.shape[1]).unsqueeze(0)
    ours = ops.fused_experts(hidden, identity, identity[:, :, :width], torch.ones(16, 1), rows, backend="ref",
                             **arguments)[:, :width]  # fmt: skip
    if own.shape != ours.shape or not torch.allclose(own, ours, rtol=1e-5, atol=1e-5):
        return "its activation computes something else than the table says"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts function over `moekern::fused_experts`.

    Args:
        module: the experts module; its weights are read at each call, since PEFT, FSDP and offloading replace them.
        hidden_states: [T, D].
        top_k_index: [T, K] ids; an id outside [0, E), such as the expert-parallel sentinel, contributes nothing.
        top_k_weights: [T, K].

    Returns:
        [T, D] in the dtype of hidden_states.
    """
    if _common.saved_of(module) is None:
        # Chosen by name: nothing has looked at this module yet.
        reason = reason_against(module)
        if reason is not None:
            _warn_once(f"moekern: {type(module).__name__} runs transformers' own experts: {reason}")
            return _own_forward(module, hidden_states, top_k_index, top_k_weights)
    arguments = activation_arguments(module)
    prefix = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, prefix)
    if arguments is None or not _common.has_kernel("fused_experts", weight.device):
        return _own_forward(module, hidden_states, top_k_index, top_k_weights)
    # transformers' grouped_mm casts to the weight dtype too: autocast does not reach a custom op.
    out = ops.fused_experts(
        hidden_states.to(weight.dtype),
        weight,
        module.down_proj.to(weight.dtype),
        top_k_weights,
        top_k_index,
        b_gate_up=getattr(module, f"{prefix}_bias") if module.has_bias else None,
        b_down=module.down_proj_bias if module.has_bias else None,
        transposed=module.is_transposed,
        **arguments,
    )
    return out.to(hidden_states.dtype)


def _own_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the module would do without moekern."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    saved = _common.saved_of(module)
    name = saved.replaced["config"]._experts_implementation if saved is not None else "grouped_mm"
    eager = type(module).forward.__wrapped__
    own = eager if name == "eager" else ALL_EXPERTS_FUNCTIONS.get(name, eager)
    if own is experts_forward:
        own = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return own(module, hidden_states, top_k_index, top_k_weights)


def fp8_experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The name "moekern" for FP8 experts: transformers' own grouped_mm, with one warning, for there is no FP8 kernel."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    _warn_once("moekern: FP8 experts run transformers' own grouped_mm: there is no FP8 kernel yet")
    return ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden_states, top_k_index, top_k_weights)
