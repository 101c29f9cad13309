"""What every Triton backend needs around its kernel. Does not import Triton: an install without it still imports.

The functions that run inside kernels are in `moekern/_triton_lib.py`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ASSUMED_SMS = 132  # of the part that the interpreter and the ahead-of-time compiler pretend to run on


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors. Triton reads this once, at import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def unavailable() -> str | None:
    """Why no Triton kernel can run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU (TRITON_INTERPRET=1 runs Triton kernels on CPU tensors, slowly)"
    return None


def refuses(tensor: Tensor) -> str | None:
    """Why a Triton kernel cannot take tensors on this tensor's device, or None."""
    if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and interpreted()):
        return None
    return f"tensors are on {tensor.device}"


def guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device current: Triton launches on the current device, whatever its arguments."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return ASSUMED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, to be compiled ahead of time and held to the static gate.

    constants: the constexpr arguments; types: Triton's type of every other argument ("*fp32", "i64", ...); aligned:
    those that the caller passes divisible by 16. `tensor_cores` says which matrix instruction has to be there, by
    compute capability ("" for none at all).
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: Mapping[int, str] = field(default_factory=dict)
    worst: bool = True  # of its config: compiled by `make test`; the others by `make gate-full`
