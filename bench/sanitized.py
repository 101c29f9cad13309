"""What compute-sanitizer watches: every op's shortest cases on every GPU backend, once each, nothing compared."""

from __future__ import annotations

import sys
from typing import Any

import torch

from bench.ledger import GPU_BACKENDS
from moekern import _op, ops
from moekern._op import Case, OpSpec

DEVICE = "cuda"
CASES_PER_OP = 6


def short_cases(spec: OpSpec, count: int = CASES_PER_OP) -> list[Case]:
    """The small cases with the fewest elements, of those that have any."""

    def elements(case: Case) -> int:
        arguments = case.make(torch.Generator().manual_seed(0), torch.bfloat16, torch.device("cpu"))
        sizes = [v.numel() for v in arguments.values() if isinstance(v, torch.Tensor)]
        return sum(sizes) if all(sizes) else 0

    sizes = {case.id: elements(case) for case in spec.cases if case.small}
    found = [case for case in spec.cases if sizes.get(case.id)]
    return sorted(found, key=lambda case: sizes[case.id])[:count]


def main() -> int:
    ran = 0
    for spec in ops.SPECS.values():
        for backend in GPU_BACKENDS:
            if backend not in spec.backends or _op.unavailable(spec.backends[backend]) is not None:
                continue
            for case in short_cases(spec):
                arguments: dict[str, Any] = case.make(
                    torch.Generator().manual_seed(0), torch.bfloat16, torch.device(DEVICE)
                )
                if spec.backends[backend].supports(**spec.bind((), arguments)) is not None:
                    continue
                with torch.no_grad():
                    getattr(ops, spec.name)(**arguments, backend=backend)
                ran += 1
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} calls")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
