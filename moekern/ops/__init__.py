"""The ops. One folder each: `__init__.py` is the contract, `ref.py` the definition, the rest are backends."""

from __future__ import annotations

from moekern import _op
from moekern.ops.combine import SPEC as _COMBINE
from moekern.ops.combine import combine
from moekern.ops.fused_experts import SPEC as _FUSED_EXPERTS
from moekern.ops.fused_experts import fused_experts
from moekern.ops.gate import SPEC as _GATE
from moekern.ops.gate import gate
from moekern.ops.gate_topk import SPEC as _GATE_TOPK
from moekern.ops.gate_topk import gate_topk
from moekern.ops.grouped_gemm import SPEC as _GROUPED_GEMM
from moekern.ops.grouped_gemm import grouped_gemm
from moekern.ops.mla_cache_write import SPEC as _MLA_CACHE_WRITE
from moekern.ops.mla_cache_write import mla_cache_write
from moekern.ops.mla_decode import SPEC as _MLA_DECODE
from moekern.ops.mla_decode import mla_decode
from moekern.ops.mla_decompress import SPEC as _MLA_DECOMPRESS
from moekern.ops.mla_decompress import mla_decompress
from moekern.ops.route import SPEC as _ROUTE
from moekern.ops.route import route

SPECS = {spec.name: spec for spec in (
    _GATE_TOPK, _GATE, _ROUTE, _GROUPED_GEMM, _COMBINE, _FUSED_EXPERTS,
    _MLA_DECODE, _MLA_DECOMPRESS, _MLA_CACHE_WRITE,
)}  # fmt: skip

for _spec in SPECS.values():
    _op.register(_spec)

__all__ = [
    "SPECS", "combine", "fused_experts", "gate", "gate_topk", "grouped_gemm", "mla_cache_write", "mla_decode",
    "mla_decompress", "route",
]  # fmt: skip
