"""Every op by itself: the cases of its SPEC that stand for a model's shape, on every backend that can run here.

`python -m bench ops`, or pytest with any of pytest-benchmark's options. Inputs are the same in every round, so small
ones come from the cache: these numbers follow a kernel's changes, they are not a model's speed (`python -m bench cpu`).
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from moekern import ops
from moekern._op import BACKEND_NAMES, Case, OpSpec, unavailable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Interpreted Triton is there for tests; ref on a GPU or at a model's size says nothing about moekern's speed.
SKIPPED = ("ref", "triton") if DEVICE.type == "cpu" else ("ref", "cpu")
# A prefill case of a second is measured a few times, a decode case of microseconds thousands of times.
MAX_SECONDS, MIN_ROUNDS = 1.0, 5


def measured() -> list[Any]:
    found = []
    for spec in ops.SPECS.values():
        names = ["model"] if spec.model is not None else []
        names += [n for n in BACKEND_NAMES if n in spec.backends and n not in SKIPPED]
        for case in spec.cases:
            if case.bench is not None:
                found += [pytest.param(spec, case, n, id=f"{spec.name}-{case.id}-{n}") for n in names]
    return found


@pytest.mark.parametrize(("spec", "case", "name"), measured())
def test_op(benchmark: Any, spec: OpSpec, case: Case, name: str) -> None:
    """`model` is what transformers' own code computes with the same arguments."""
    arguments = case.make(torch.Generator().manual_seed(0), torch.bfloat16, DEVICE)
    bound = spec.bind((), arguments)
    if name == "model":
        assert spec.model is not None
        run = spec.model
    else:
        backend = spec.backends[name]
        reason = unavailable(backend) or backend.supports(**bound)
        if reason is not None:
            pytest.skip(reason)
        run = getattr(ops, spec.name)
        bound = {**arguments, "backend": name}

    def call() -> None:
        run(**bound)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{spec.name}: {case.bench}"
    with torch.no_grad():
        benchmark.pedantic(call, warmup_rounds=1, rounds=rounds_for(call))
    seconds = benchmark.stats.stats.median
    everything = spec.bind((), arguments)
    benchmark.extra_info.update(
        gflops=spec.flops(**everything) / seconds / 1e9,
        gbytes_per_s=spec.bytes(**everything) / seconds / 1e9,
        threads=torch.get_num_threads(),
    )


def rounds_for(call: Any) -> int:
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    return max(MIN_ROUNDS, min(2000, int(MAX_SECONDS / max(once, 1e-7))))
