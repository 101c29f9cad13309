"""The ops. One folder each: `__init__.py` is the contract, `ref.py` the definition, the rest are backends."""

from __future__ import annotations

from moekern import _op
from moekern.ops.gate_topk import SPEC as _GATE_TOPK
from moekern.ops.gate_topk import gate_topk
from moekern.ops.mla_cache_write import SPEC as _MLA_CACHE_WRITE
from moekern.ops.mla_cache_write import mla_cache_write
from moekern.ops.mla_decode import SPEC as _MLA_DECODE
from moekern.ops.mla_decode import mla_decode
from moekern.ops.mla_decompress import SPEC as _MLA_DECOMPRESS
from moekern.ops.mla_decompress import mla_decompress

SPECS = {spec.name: spec for spec in (_GATE_TOPK, _MLA_DECODE, _MLA_DECOMPRESS, _MLA_CACHE_WRITE)}

for _spec in SPECS.values():
    _op.register(_spec)

__all__ = ["SPECS", "gate_topk", "mla_cache_write", "mla_decode", "mla_decompress"]
