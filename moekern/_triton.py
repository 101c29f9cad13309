"""What every Triton backend needs around its kernel. Does not import Triton: an install without it still imports.

The functions that run inside kernels are in `moekern/_triton_lib.py`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gpu:
    """What a configuration may depend on. capability: 10 * major + minor; shared: bytes a block may opt in to."""

    capability: int
    num_sms: int
    shared: int


# One part per architecture that kernels are compiled for ahead of time (A100, RTX 3090 class, RTX 4090, H100, B200,
# RTX 5090): a configuration may use any property of the part it runs on, never its name.
PARTS = {
    80: Gpu(80, 108, 163 << 10),
    86: Gpu(86, 84, 99 << 10),
    89: Gpu(89, 128, 99 << 10),
    90: Gpu(90, 132, 227 << 10),
    100: Gpu(100, 148, 227 << 10),
    120: Gpu(120, 170, 99 << 10),
}
ASSUMED = PARTS[90]  # what the interpreter pretends to run on


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
def gpu_of(device: torch.device) -> Gpu:
    """The device's properties, read once; those of ASSUMED where Triton interprets."""
    if device.type != "cuda":
        return ASSUMED
    found = torch.cuda.get_device_properties(device)
    capability = 10 * found.major + found.minor
    # The field appeared after torch 2.10; the parts of one architecture agree on it.
    shared = getattr(found, "shared_memory_per_block_optin", None) or _shared_of(capability)
    return Gpu(capability, found.multi_processor_count, shared)


def _shared_of(capability: int) -> int:
    known = max((c for c in PARTS if c <= capability), default=80)
    return PARTS[known].shared


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, to be compiled ahead of time and held to the static gate.

    constants: the constexpr arguments; types: Triton's type of every other argument ("*fp32", "i64",
    "tensordesc<bf16[128,64]>", ...); aligned: those that the caller passes divisible by 16. tensor_cores: the one matrix
    instruction that has to be there ("" for none at all). requires: other instructions that have to be there, each an
    opcode with all the modifiers that matter ("LDGSTS.128" matches LDGSTS.E.BYPASS.128). min_shared: bytes of shared
    memory below which buffers that the kernel lives on were optimised away.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: str = ""
    requires: tuple[str, ...] = ()
    min_shared: int = 0
    worst: bool = True  # of its config: compiled by `make test`; the others by `make gate-full`
