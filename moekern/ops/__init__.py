"""The ops. One folder each: `__init__.py` is the contract, `ref.py` the definition, the rest are backends."""

from __future__ import annotations

from moekern import _op
from moekern.ops.gate_topk import SPEC as _GATE_TOPK
from moekern.ops.gate_topk import gate_topk

SPECS = {spec.name: spec for spec in (_GATE_TOPK,)}

for _spec in SPECS.values():
    _op.register(_spec)

__all__ = ["SPECS", "gate_topk"]
