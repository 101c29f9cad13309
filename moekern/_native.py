"""Finds and loads the native op library; knows why it is absent.

Native kernels are private leaves `moekern::_<op>_{cpu,cuda}(Tensor(a!) out, ...) -> ()`. A leaf's schema is written here
in Python, its types again in C++; a difference would be silent garbage, so the library exports the types that it was
compiled with and a library that differs is refused.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moekern._op import _LIBRARY

LIBRARY_PATH = Path(__file__).with_name("_C.so")
REBUILD = "rebuild it with `pip install --no-build-isolation .` (or `make build` in a checkout)"

_SCHEMAS: dict[
    str, str
] = {}  # leaf name -> comma-separated argument types, as C++ spells them in csrc/common/leaf.h


def leaf(schema: str) -> Callable[..., None]:
    """Declares a native leaf and returns a function that calls it with positional arguments."""
    parsed = torch._C.parse_schema(f"moekern::{schema}")
    name = parsed.name.removeprefix("moekern::")
    _SCHEMAS[name] = ",".join(str(a.type).replace("Optional[Tensor]", "Tensor?") for a in parsed.arguments)
    _LIBRARY.define(schema)
    overload: Callable[..., None] = getattr(torch.ops.moekern, name).default
    return overload


def mismatch(library: dict[str, str], expected: dict[str, str]) -> str | None:
    """Why a library with these leaves is not the one that this package calls, or None. Absent leaves are not built."""
    for name, types in library.items():
        if name not in expected:
            return f"it exports {name}, which this version of moekern does not know"
        if types != expected[name]:
            return f"its {name} takes ({types}) where this version of moekern passes ({expected[name]})"
    return None


def leaves_of(path: Path) -> dict[str, str]:
    """The leaves that a library exports: name -> argument types. Raises OSError when it is not ours or cannot load."""
    torch.ops.load_library(str(path))
    try:
        signatures = ctypes.CDLL(str(path)).moekern_leaf_signatures
    except AttributeError as error:
        raise OSError(f"{path.name} is not a moekern library") from error
    signatures.restype = ctypes.c_char_p
    return dict(line.split("|", 1) for line in signatures().decode().splitlines())


def build_note() -> dict[str, Any]:
    """What setup.py wrote down of the build: "built", "reason" and, from CMake, compilers and architectures."""
    path = LIBRARY_PATH.with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {"built": False, "reason": None}


@functools.cache
def load() -> tuple[frozenset[str], str | None]:
    """Loads the library once: (names of the leaves that it has, why it cannot be used or None)."""
    import moekern.ops  # noqa: F401  every op declares its leaves before the library is compared with them

    if not LIBRARY_PATH.exists():
        reason = build_note()["reason"]
        return frozenset(), f"the native library was not built{f' ({reason})' if reason else ''}; {REBUILD}"
    try:
        library = leaves_of(LIBRARY_PATH)
    except OSError as error:
        return frozenset(), f"the native library does not load ({error}); {REBUILD}"
    reason = mismatch(library, _SCHEMAS)
    if reason is not None:
        return frozenset(), f"the native library is of another version: {reason}; {REBUILD}"
    return frozenset(library), None


@functools.cache
def no_gpu() -> str | None:
    """Why no CUDA leaf can run here although it was built, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if not ctypes.CDLL(str(LIBRARY_PATH)).moekern_cuda_streams():
        return "torch's CUDA streams were not found by the native library; rebuild it against this torch"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"compute capability {major}.{minor}; 8.0 (Ampere) is the oldest that runs"


def reason_without(name: str) -> str | None:
    """Why a leaf cannot be called here, or None."""
    leaves, reason = load()
    cuda = name.endswith("_cuda")
    if reason is None and name not in leaves:
        what = f"CUDA code was not built ({build_note().get('cuda', 'no nvcc')})" if cuda else "not built"
        reason = f"{name}: {what}; {REBUILD}"
    return reason or (no_gpu() if cuda else None)


@functools.cache
def _cpu_isa_function() -> Callable[[], bytes | None]:
    function = ctypes.CDLL(str(LIBRARY_PATH)).moekern_cpu_isa
    function.restype = ctypes.c_char_p
    return function


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run with. The library must be loaded."""
    name = _cpu_isa_function()()
    return name.decode() if name is not None else ""
