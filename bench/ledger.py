"""What a measured row is: statistics, the hash of the sources it was measured on, the machine and its versions."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def statistics_of(microseconds: Sequence[float]) -> dict[str, float | int]:
    """Median, 10th and 90th percentile (nearest rank), and the number of samples."""
    if not microseconds:
        raise ValueError("no samples")
    ordered = sorted(microseconds)
    last = len(ordered) - 1
    middle = (ordered[last // 2] + ordered[(last + 1) // 2]) / 2
    return {
        "median_us": middle,
        "p10_us": ordered[round(0.1 * last)],
        "p90_us": ordered[round(0.9 * last)],
        "samples": len(ordered),
    }


def sources_of(op: str, root: Path = ROOT) -> list[Path]:
    """The files that an op's GPU kernels are built from."""
    patterns = (
        f"moekern/ops/{op}/triton*.py", f"moekern/ops/{op}/config.py", "moekern/_triton*.py", "cmake/cuda.cmake",
        f"csrc/ops/{op}/*.cu", f"csrc/ops/{op}/*.cuh", f"csrc/ops/{op}/params.h", f"csrc/ops/{op}/bind.cpp",
        "csrc/common/*.cuh", "csrc/common/*cuda*", "csrc/common/dispatch.h", "csrc/common/scalar.h",
    )  # fmt: skip
    return sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})


def source_hash(op: str, root: Path = ROOT) -> str:
    """Changes when a source of the op changes: a row with another hash is stale."""
    digest = hashlib.sha256()
    for path in sources_of(op, root):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


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
    import importlib.metadata

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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all: a run that is killed leaves no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def command_line() -> str:
    return " ".join([Path(sys.executable).name, *sys.argv])
