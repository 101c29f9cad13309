"""What `moekern info` shows: versions, backends with the reasons for those that are missing, and the machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from moekern import _native, _op, ops


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """CPU features, the instruction set that the kernels run with, and memory: from the runtime module."""
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": None, "isa": None, "memory": None, "reason": None,
    }  # fmt: skip
    try:
        runtime = importlib.import_module("moekern._runtime")
    except ImportError as error:
        found["reason"] = f"the runtime module is not there ({error}); {_native.REBUILD}"
        return found
    found["features"] = runtime.cpu_features()
    try:
        found["isa"] = runtime.cpu_isa()
        budget = runtime.memory_budget()
        found["memory"] = {name: getattr(budget, name) for name in ("limit", "used", "available", "source")}
    except RuntimeError as error:
        found["reason"] = str(error)
    return found


def gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory": properties.total_memory,
            }
        )
    return found


def missing() -> list[str]:
    """What was not built or cannot be used here, with the reason; empty when nothing is."""
    leaves, reason = _native.load()
    if reason is not None:
        reasons = [reason]
    elif any(name.endswith("_cuda") for name in leaves):
        reasons = []
    else:
        reasons = [f"CUDA kernels: not built ({_native.build_note().get('cuda', 'no nvcc')})"]
    if version_of("triton") is None:
        reasons.append("Triton kernels: triton is not installed")
    if not torch.cuda.is_available():
        cpu_only = torch.version.cuda is None
        reasons.append(
            "GPU: " + ("this torch is built for CPUs only" if cpu_only else "torch sees no CUDA device")
        )
    return reasons


def collect() -> dict[str, Any]:
    """Everything, as plain data (what `moekern info --json` prints)."""
    from moekern import __version__

    versions = {name: version_of(name) for name in ("torch", "triton", "transformers", "numpy")}
    return {
        "moekern": __version__,
        "python": platform.python_version(),
        "platform": "-".join((platform.system(), platform.machine(), "".join(platform.libc_ver()))),
        "versions": versions,
        "build": _native.build_note(),
        "machine": machine(),
        "gpus": gpus(),
        "backends": {name: _op.backends_of(spec) for name, spec in ops.SPECS.items()},
        "missing": missing(),
    }


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def backend_lines(backends: dict[str, dict[str, str | None]]) -> list[str]:
    """One line per op with what runs here, then each reason once with the ops that it holds for."""
    width = max(len(name) for name in backends)
    lines = []
    reasons: dict[str, list[str]] = {}
    for op, found in backends.items():
        lines.append(
            f"  {op:<{width}}  {', '.join(name for name, reason in found.items() if reason is None)}"
        )
        for name, reason in found.items():
            if reason is not None:
                # An op that a backend does not implement says so with its own name, which would split the group.
                shared = "not implemented" if reason.startswith(f"{op} has no") else reason
                reasons.setdefault(f"{name}: {shared}", []).append(op)
    for reason, names in reasons.items():
        lines.append(f"  {reason} ({', '.join(names) if len(names) < len(backends) else 'every op'})")
    return lines


def text(found: dict[str, Any]) -> str:
    """What `moekern info` prints."""
    note, here = found["build"], found["machine"]
    lines = [f"moekern {found['moekern']}, Python {found['python']}, {found['platform']}"]
    lines += [f"  {name} {version or 'not installed'}" for name, version in found["versions"].items()]
    lines.append("build")
    lines += [f"  {key}: {value}" for key, value in note.items() if value is not None]
    lines.append(
        f"processor\n  {here['processor']}, {here['cores']} cores, torch uses {here['threads']} threads"
    )
    if here["features"] is not None:
        usable = [name for name, has in here["features"].items() if has]
        lines.append(f"  features: {', '.join(usable) or 'none that the kernels use'}")
    if here["isa"] is not None:
        lines.append(f"  kernels run with: {here['isa']} (MOEKERN_CPU_ISA chooses a lower one)")
    if here["memory"] is not None:
        memory = here["memory"]
        lines.append(
            f"memory\n  {gib(memory['available'])} can be allocated: {gib(memory['limit'])} less "
            f"{gib(memory['used'])} in use ({memory['source']})"
        )
    if here["reason"] is not None:
        lines.append(f"  {here['reason']}")
    lines.append("GPU")
    for gpu in found["gpus"]:
        lines.append(f"  {gpu['name']}, compute capability {gpu['capability']}, {gib(gpu['memory'])}")
    if not found["gpus"]:
        lines.append("  none")
    lines.append("backends")
    lines += backend_lines(found["backends"])
    lines.append("not built or not usable")
    lines += [f"  {reason}" for reason in found["missing"]] or ["  nothing"]
    return "\n".join(lines)
