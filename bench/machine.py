"""What a measurement was made on: the GPU, the versions, the commit."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.sources import ROOT


def git_revision(root: Path = ROOT) -> str | None:
    """The commit, with "+" when the tree differs from it; None outside a checkout."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _version(module: str) -> str | None:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def versions() -> dict[str, str | None]:
    import torch

    nvcc = re.search(r"release [\d.]+, V([\d.]+)", _output_of("nvcc", "--version"))
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "liger_kernel": _version("liger-kernel"),
        "nvcc": nvcc.group(1) if nvcc else None,
        "git": git_revision(),
    }


def device() -> dict[str, Any]:
    """The current GPU, with its clocks as they are: nothing here changes a setting."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    smi = _output_of("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit",
                     "--format=csv,noheader")  # fmt: skip
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": l2_bytes(),
        "nvidia_smi": smi.strip().splitlines()[:1],
    }


def l2_bytes() -> int:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "L2_cache_size", 0)) or 64 << 20


def no_gpu() -> str | None:
    """Why nothing can be measured here, or None."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU (driver, CUDA_VISIBLE_DEVICES)"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability {major}.{minor}; moekern needs 8.0 (Ampere) or newer"
    return None


def cannot_measure() -> str | None:
    """Why this process can measure no kernel, or None."""
    from moekern import _triton

    return no_gpu() or (
        "TRITON_INTERPRET is set: kernels would be interpreted" if _triton.interpreted() else None
    )


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def command_line() -> str:
    return " ".join([Path(sys.executable).name, *sys.argv])
