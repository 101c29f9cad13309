"""The files that a kernel is built from, and their hash: a row measured on another hash is stale."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of the CUDA C++ kernels; a header of another op that a source includes is found in the source itself.
CUDA_SOURCES = (
    "csrc/ops/{op}/*.cu", "csrc/ops/{op}/*.cuh", "csrc/ops/{op}/params.h", "csrc/ops/{op}/bind.cpp",
    "csrc/common/*.cuh", "csrc/common/*cuda*", "csrc/common/dispatch.h", "csrc/common/scalar.h", "cmake/cuda.cmake",
)  # fmt: skip
TRITON_SOURCES = ("moekern/ops/{op}/triton*.py", "moekern/ops/{op}/config*.py")
# What an op means, is tested with and is compiled as ahead of time, not what it is built from.
NOT_BUILT = ("ref.py", "cases.py", "variants.py")


def _imported(path: Path, only_lazy: bool = False) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import in a file; only_lazy: of those inside functions."""
    tree = ast.parse(path.read_text(), filename=str(path))
    scopes: list[ast.AST] = [tree]
    if only_lazy:
        scopes = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for scope in scopes:
        for node in ast.walk(scope):
            if isinstance(node, ast.Import):
                yield from ((alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                yield from ((node.module, alias.name) for alias in node.names)


def _forward(op: str, root: Path) -> list[Path]:
    """An op's kernels and configurations; those of its backward, which no row measures, only where these import them."""
    found = [path for pattern in TRITON_SOURCES for path in root.glob(pattern.format(op=op))]
    return [path for path in found if "backward" not in path.name]


def _kernels_of(op: str, root: Path) -> list[Path]:
    """What an op's Triton backend begins with: its kernels, its configurations, and what its contract imports lazily."""
    found = _forward(op, root)
    contract = root / "moekern" / "ops" / op / "__init__.py"
    if found and contract.is_file():
        for module, name in _imported(contract, only_lazy=True):
            found += [path for path in _resolved(module, name, root) if "backward" not in path.name]
    return found


def _resolved(module: str, name: str | None, root: Path) -> list[Path]:
    """The files of kernels behind one import; of another op's package, that op's kernels."""
    parts = module.split(".")
    if parts[0] != "moekern":
        return []
    base = root.joinpath(*parts)
    candidates = [base / f"{name}.py", base.with_suffix(".py")] if name else [base.with_suffix(".py")]
    for path in candidates:
        if path.is_file():
            host_only = path.parent == root / "moekern" and not path.name.startswith("_triton")
            return [] if host_only or path.name in NOT_BUILT else [path]
    if parts[:2] == ["moekern", "ops"]:
        op = parts[2] if len(parts) > 2 else name
        if op and (root / "moekern" / "ops" / op).is_dir():
            return _forward(op, root)
    return []


def _triton_sources(op: str, root: Path) -> set[Path]:
    found: set[Path] = set()
    waiting = _kernels_of(op, root)
    if waiting:
        waiting += root.glob("moekern/_triton*.py")
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for module, name in _imported(path):
            waiting += _resolved(module, name, root)
    return found


def sources_of(op: str, backend: str, root: Path = ROOT) -> list[Path]:
    """The files that an op's kernels of one backend are built from: for Triton whatever its modules import of moekern,
    other ops' kernels included."""
    if backend == "triton":
        return sorted(_triton_sources(op, root))
    if backend == "cuda":
        if not any(root.glob(f"csrc/ops/{op}/*.cu")):
            return []
        found = [path for pattern in CUDA_SOURCES for path in root.glob(pattern.format(op=op))]
        return sorted({path for path in found if path.is_file()})
    raise ValueError(f"sources_of: no GPU backend is named {backend!r}")


@functools.lru_cache(maxsize=256)
def _content(path: Path, _: int, __: int) -> bytes:
    return path.read_bytes()


def hash_of(paths: list[Path], root: Path = ROOT) -> str:
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        content = _content(path, status.st_mtime_ns, status.st_size)
        digest.update(str(path.relative_to(root)).encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:16]


def source_hash(op: str, backend: str, root: Path = ROOT) -> str | None:
    """Changes when a source of the op's kernels changes; None where the op has no kernel of that backend."""
    paths = sources_of(op, backend, root)
    return hash_of(paths, root) if paths else None


def model_hash(root: Path = ROOT) -> str:
    """Of every kernel and the patch layer: what an end-to-end row rests on."""
    ops = sorted(p.name for p in (root / "moekern" / "ops").iterdir() if p.is_dir())
    paths = {path for op in ops for path in sources_of(op, "triton", root)}
    paths |= set(root.glob("moekern/hf/*.py"))
    return hash_of(sorted(paths), root)
