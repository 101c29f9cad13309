"""Runs one op with every tensor between two pages that may not be touched: `python guarded.py OP VARIANT...`.

Inputs and outputs, workspace included, end right before an inaccessible page (first pass) or start right behind one
(second pass), so a single element read or written outside dies with a segmentation fault. The line printed last names
the case. Run by test_memory.py in a process of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from typing import Any

import torch
from support import DTYPE_IDS, backend_of, evaluate, make, same_bits, use_variant
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moekern import _op
from moekern._op import OpSpec
from moekern.ops import SPECS

PAGE = mmap.PAGESIZE
MOST_ELEMENTS = 200_000  # edges show in small tensors as well as in large ones
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FACTORIES = ("empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_full", "empty_like", "zeros_like",
              "empty_strided", "new_empty_strided", "_to_copy", "clone", "arange")  # fmt: skip


class Guarded:
    """Hands out memory between inaccessible pages."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.mappings: list[tuple[int, int]] = []

    def bytes_at(self, size: int) -> int:
        """Address of `size` bytes that end at, or start behind, an inaccessible page."""
        body = max(1, -(-size // PAGE)) * PAGE
        length = body + 2 * PAGE
        base = _libc.mmap(
            None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        assert base not in (None, ctypes.c_void_p(-1).value), "mmap failed"
        for edge in (base, base + PAGE + body):
            assert _libc.mprotect(edge, PAGE, 0) == 0
        self.mappings.append((base, length))
        return base + PAGE + (body - size if self.at_end else 0)

    def copy(self, value: Tensor) -> Tensor:
        """The same values and strides in guarded memory."""
        if value.numel() == 0 or value.device.type != "cpu":
            return value
        span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        size = span * value.element_size()
        buffer = (ctypes.c_char * size).from_address(self.bytes_at(size))
        flat = torch.frombuffer(buffer, dtype=value.dtype)
        return flat.as_strided(value.shape, value.stride()).copy_(value)

    def free(self) -> None:
        for base, length in self.mappings:
            _libc.munmap(base, length)
        self.mappings.clear()


class GuardAllocations(TorchDispatchMode):
    """Moves every tensor that is made under it into guarded memory."""

    def __init__(self, guarded: Guarded) -> None:
        super().__init__()
        self.guarded = guarded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _FACTORIES and isinstance(result, Tensor):
            return self.guarded.copy(result)
        return result


def run(spec: OpSpec, variant: str, arguments: dict[str, Any], at_end: bool) -> tuple[Tensor, ...]:
    guarded = Guarded(at_end)
    try:
        inside = {n: guarded.copy(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}

        def function(**bound: Any) -> Any:
            # Not through the dispatcher: a mode sees an op as a whole, not what it allocates.
            with GuardAllocations(guarded):
                return _op.select(spec, bound, backend_of(variant)).run(**bound)

        return tuple(t.clone() for t in evaluate(spec, function, inside, copy=guarded.copy))
    finally:
        guarded.free()


def main(name: str, variants: Iterable[str]) -> None:
    spec = SPECS[name]
    torch.use_deterministic_algorithms(True, warn_only=True)
    for variant in variants:
        for case in spec.cases:
            for dtype in spec.dtypes if case.small else ():
                arguments = make(spec, case, dtype)
                if sum(v.numel() for v in arguments.values() if isinstance(v, Tensor)) > MOST_ELEMENTS:
                    continue
                backend = spec.backends[backend_of(variant)]
                with use_variant(variant):
                    if backend.supports(**arguments) is not None:
                        continue
                    expected = evaluate(spec, backend.run, arguments)
                    for at_end in (True, False):
                        edge = "end" if at_end else "start"
                        print(
                            f"{name} {variant} {DTYPE_IDS[dtype]} {case.id} ({edge} of the buffer)",
                            flush=True,
                        )
                        for i, (a, b) in enumerate(
                            zip(run(spec, variant, arguments, at_end), expected, strict=True)
                        ):
                            assert same_bits(a, b), f"output {i} depends on where the buffers lie"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
