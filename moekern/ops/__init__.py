"""The ops. One folder each: `__init__.py` is the contract, `ref.py` the definition, the rest are backends."""

from __future__ import annotations

from moekern import _op
from moekern.ops.combine import SPEC as _COMBINE, combine
from moekern.ops.fused_experts import SPEC as _FUSED_EXPERTS, fused_experts
from moekern.ops.gate import SPEC as _GATE, gate
from moekern.ops.gate_topk import SPEC as _GATE_TOPK, gate_topk
from moekern.ops.grouped_gemm import SPEC as _GROUPED_GEMM, grouped_gemm
from moekern.ops.mla_cache_write import SPEC as _MLA_CACHE_WRITE, mla_cache_write
from moekern.ops.mla_decode import SPEC as _MLA_DECODE, mla_decode
from moekern.ops.mla_decompress import SPEC as _MLA_DECOMPRESS, mla_decompress
from moekern.ops.route import SPEC as _ROUTE, route

SPECS = {spec.name: spec for spec in (
    _GATE_TOPK, _GATE, _ROUTE, _GROUPED_GEMM, _COMBINE, _FUSED_EXPERTS,
    _MLA_DECODE, _MLA_DECOMPRESS, _MLA_CACHE_WRITE,
)}  # fmt: skip

for _spec in SPECS.values():
    _op.register(_spec)


def backends(op: str) -> dict[str, str | None]:
    """For each backend of an op: None where it runs on this machine, else the reason why it does not.

    Raises:
        ValueError: for an unknown op.
    """
    if op not in SPECS:
        raise ValueError(f"backends: unknown op {op!r}; expected one of {', '.join(SPECS)}")
    return _op.backends_of(SPECS[op])


__all__ = [
    "SPECS", "backends", "combine", "fused_experts", "gate", "gate_topk", "grouped_gemm", "mla_cache_write", "mla_decode",
    "mla_decompress", "route",
]  # fmt: skip
