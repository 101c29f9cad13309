"""Runs the Triton gradients of the expert ops with every tensor between two pages that may not be touched.

As guarded.py, whose helpers it uses; run by ops/test_experts_backward.py in a process of its own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import importlib

import torch
from guarded import GuardAllocations, Guarded
from support import make
from torch import Tensor

from moekern.ops import SPECS

CASES = {
    "grouped_gemm": (("ragged_all_options", torch.float32), ("transposed_ragged", torch.bfloat16)),
    "fused_experts": (("gpt_oss_small", torch.bfloat16), ("ids_outside", torch.float32)),
}


def main() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name, cases in CASES.items():
        spec = SPECS[name]
        assert spec.backward is not None
        module = "backward" if name == "grouped_gemm" else "triton_backward"
        function = getattr(importlib.import_module(f"moekern.ops.{name}.{module}"), f"{name}_backward")
        for case_id, dtype in cases:
            case = next(c for c in spec.cases if c.id == case_id)
            arguments = make(spec, case, dtype)
            values = [spec.ref(**arguments), *(arguments[n] for n in spec.arguments)]
            needs = [arguments[n] is not None for n in spec.backward.inputs]
            expected = function(*values, needs)
            for at_end in (True, False):
                print(name, case.id, dtype, "end" if at_end else "start", flush=True)
                guarded = Guarded(at_end)
                inside = [guarded.copy(v) if isinstance(v, Tensor) else v for v in values]
                with GuardAllocations(guarded):
                    found = [g.clone() for g in function(*inside, needs)]
                for a, b in zip(found, expected, strict=True):
                    # Not bit for bit: numpy's products, which stand for dot, depend on alignment.
                    torch.testing.assert_close(a, b)
                del inside, found
                guarded.free()


if __name__ == "__main__":
    main()
