"""What the op tests share: the variants of a backend, the grid of (op, variant, dtype, case), calling an op."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moekern import _native, _op
from moekern._op import Case, OpSpec
from moekern.ops import SPECS

ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
DTYPE_IDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@functools.cache
def _refresh_isa() -> Callable[[], bytes | None] | None:
    """The library's function that reads MOEKERN_CPU_ISA again; None without a native library."""
    if _native.load()[1] is not None:
        return None
    refresh = ctypes.CDLL(str(_native.LIBRARY_PATH)).moekern_refresh_cpu_isa
    refresh.restype = ctypes.c_char_p
    return refresh


@contextlib.contextmanager
def cpu_isa(name: str | None) -> Iterator[str | None]:
    """Sets the instruction set of the CPU kernels; yields the one that is in use, None where it cannot run."""
    refresh, before = _refresh_isa(), os.environ.get("MOEKERN_CPU_ISA")
    if refresh is None:
        yield None
        return
    try:
        if name is not None:
            os.environ["MOEKERN_CPU_ISA"] = name
        used = refresh()
        yield None if used is None else used.decode()
    finally:
        if before is None:
            os.environ.pop("MOEKERN_CPU_ISA", None)
        else:
            os.environ["MOEKERN_CPU_ISA"] = before
        refresh()


@functools.cache
def variants() -> tuple[str, ...]:
    """The backends to test here; `cpu` once for every instruction set that this machine runs."""

    def runs(isa: str) -> bool:
        with cpu_isa(isa) as used:
            return used == isa

    cpu = tuple(f"cpu-{isa}" for isa in ISAS if runs(isa))
    return ("ref", *cpu, "triton", "cuda")


def backend_of(variant: str) -> str:
    return variant.partition("-")[0]


def device_of(variant: str) -> torch.device:
    """GPU backends run on the GPU where there is one; Triton runs in its interpreter on CPU tensors elsewhere."""
    on_gpu = backend_of(variant) in ("triton", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def use_variant(variant: str) -> contextlib.AbstractContextManager[str | None]:
    isa = variant.partition("-")[2]
    return cpu_isa(isa) if isa else contextlib.nullcontext(variant)


def available(spec: OpSpec, variant: str) -> bool:
    backend = spec.backends.get(backend_of(variant))
    return backend is not None and _op.unavailable(backend) is None


def best_cpu(spec: OpSpec) -> str:
    """The variant that a call on CPU tensors uses."""
    return next((v for v in reversed(variants()) if v.startswith("cpu") and available(spec, v)), "ref")


def grid(
    *,
    dtypes: tuple[torch.dtype, ...] | None = None,
    cases: Callable[[Case], bool] = lambda case: case.small,
    only: Callable[[OpSpec, str], bool] = lambda spec, variant: True,
    specs: Callable[[OpSpec], bool] = lambda spec: True,
    keep: Callable[[OpSpec, str, torch.dtype, Case], bool] = lambda spec, variant, dtype, case: True,
) -> list[Any]:
    """pytest parameters (spec, variant, dtype, case) of everything that this machine can run."""
    found = []
    for spec in filter(specs, SPECS.values()):
        for case in filter(cases, spec.cases):
            for dtype in spec.dtypes if dtypes is None else dtypes:
                for variant in variants():
                    if available(spec, variant) and only(spec, variant) and keep(spec, variant, dtype, case):
                        marks = [pytest.mark.gpu] if device_of(variant).type == "cuda" else []
                        name = f"{spec.name}-{case.id}-{DTYPE_IDS.get(dtype, dtype)}-{variant}"
                        found.append(pytest.param(spec, variant, dtype, case, id=name, marks=marks))
    return found


def make(
    spec: OpSpec, case: Case, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Every argument of the op for one case, defaults filled in. The same seed gives the same data everywhere."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(f"{spec.name}.{case.id}".encode()))
    return spec.bind((), case.make(generator, dtype, torch.device(device)))


def mutated(spec: OpSpec) -> tuple[str, ...]:
    """The arguments that the op writes to."""
    schema = getattr(torch.ops.moekern, spec.name).default._schema
    return tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def clone_strided(value: Tensor) -> Tensor:
    """A copy with the same strides."""
    span = (
        1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    )
    return value.new_zeros(span).as_strided(value.shape, value.stride()).copy_(value)


def evaluate(
    spec: OpSpec,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    copy: Callable[[Tensor], Tensor] = clone_strided,
) -> tuple[Tensor, ...]:
    """Calls an implementation; returns what it returned and then what it wrote to, which are copies."""
    arguments = {**arguments, **{name: copy(arguments[name]) for name in mutated(spec)}}
    result = function(**arguments)
    returned = () if result is None else result if isinstance(result, (tuple, list)) else (result,)
    return (*returned, *(arguments[name] for name in mutated(spec)))


def call(spec: OpSpec, variant: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Calls the op through torch with one backend forced."""

    def function(**bound: Any) -> Any:
        return _op.call(spec, backend_of(variant), **bound)

    backend = spec.backends[backend_of(variant)]
    with use_variant(variant):
        reason = backend.supports(**arguments)
        if reason is not None:
            pytest.skip(f"{variant} does not take this case: {reason}")
        return evaluate(spec, function, arguments)


def kinds(spec: OpSpec) -> tuple[str, ...]:
    """How each result of `call` is judged; what an op writes in place is model data."""
    return (*spec.outputs, *("model" for _ in mutated(spec)))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
    )
