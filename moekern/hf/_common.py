"""What the three tables share: the capability checks that decide whether a module can be patched."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moekern import _op, ops

Row = TypeVar("Row")

# What the kernels read. The references take fp64 too, but would be a silent slow path.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The attribute that marks a patched module and holds what `unpatch` puts back.
STATE = "_moekern"


@dataclass
class Saved:
    """What a patched module was before.

    kind: "experts", "router", "mla" or "linear". replaced: attributes to put back. added: attributes to remove.
    A class of this package, so that unpickling a patched model imports moekern and with it the registered names.
    """

    kind: str
    replaced: dict[str, Any]
    added: tuple[str, ...] = ()


def saved_of(module: nn.Module) -> Saved | None:
    """The undo record of a patched module, None for an unpatched one."""
    return module.__dict__.get(STATE)


def row_of(table: Mapping[str, Row], module: nn.Module) -> Row | None:
    """The row of the module's class or of the nearest base class (parametrised modules are subclasses)."""
    for cls in type(module).__mro__:
        if cls.__name__ in table:
            return table[cls.__name__]
    return None


def attribute(module: Any, path: str) -> Any:
    """module.a.b for the path "a.b"."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def reason_against_instance(module: nn.Module) -> str | None:
    """Why this instance is not its class any more: an accelerate hook, or another patch. None when it is."""
    if any(hasattr(owner, "_hf_hook") for owner in module.modules()):
        return "an accelerate hook moves its weights"
    if "forward" in module.__dict__ or "expand_kv" in module.__dict__:
        return "its forward is replaced on the instance already"
    return None


def reason_against_weights(weights: Mapping[str, Any]) -> str | None:
    """Why a kernel cannot read these weights (missing, on meta, quantized, fp64), or None."""
    for name, weight in weights.items():
        if not isinstance(weight, Tensor):
            return f"{name} is not a tensor"
        if type(weight) not in (Tensor, nn.Parameter, nn.Buffer):
            return f"{name} is a {type(weight).__name__}"
        if weight.device.type == "meta":
            return f"{name} is on meta"
        if weight.dtype not in DTYPES:
            return f"{name} is {str(weight.dtype).removeprefix('torch.')}"
    return None


def reason_without_kernel(op: str, device: torch.device, **arguments: Any) -> str | None:
    """Why an op has nothing faster than its reference on this device, or None. MOEKERN_BACKEND overrules it.

    arguments: a call's arguments, to ask the kernels too whether they take them; only shapes and dtypes matter.
    """
    if os.environ.get("MOEKERN_BACKEND"):
        return None
    spec = ops.SPECS[op]
    reasons = {}
    for name in _op.default_order(device.type):
        backend = spec.backends.get(name)
        if name != "ref" and backend is not None:
            reasons[name] = _op.unavailable(backend) or (
                backend.supports(**spec.bind((), arguments)) if arguments else None
            )
    if None in reasons.values():
        return None
    kind = "" if device.type == "cpu" else f"{device.type} "
    return f"no {kind}kernel for {op}: {'; '.join(filter(None, reasons.values())) or 'there is none yet'}"


@functools.cache
def _has_kernel(op: str, device_type: str, _forced: str | None) -> bool:
    return reason_without_kernel(op, torch.device(device_type)) is None


def has_kernel(op: str, device: torch.device) -> bool:
    """reason_without_kernel for a forward: the weights may have gone, after patching, to where there is no kernel.

    Cached, and taken for granted on the CPU and by a compiler, which would trace into the search for Triton.
    """
    if device.type == "cpu" or torch.compiler.is_compiling():
        return True
    return _has_kernel(op, device.type, os.environ.get("MOEKERN_BACKEND"))
