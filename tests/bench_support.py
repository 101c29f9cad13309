"""A machine with a GPU that is the CPU: kernels interpreted, times made up, everything else as it runs on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from bench import gpu_bench, gpu_inputs, gpu_timing, machine
from bench.gpu_cases import CASES, GpuCase

CEILINGS = {
    "gemm_tflops": 800.0, "read_gbytes_per_s": 3000.0, "copy_gbytes_per_s": 4000.0, "empty_node_us": 1.25,
}  # fmt: skip
DEVICE = {"name": "NVIDIA Test 1", "sms": 132, "capability": "9.0", "l2_bytes": 1024}
SMALL = {
    "T": 5,
    "D": 64,
    "F": 32,
    "E": 8,
    "K": 3,
    "B": 2,
    "S": 40,
    "H": 2,
    "R": 64,
    "P": 16,
    "N": 32,
    "V": 32,
}

needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a GPU: gpu-check itself runs here"
)


def shrunk(case: GpuCase) -> GpuCase:
    shape = {n: min(v, SMALL[n]) if n in SMALL else v for n, v in case.shape.items()}
    return dataclasses.replace(case, shape=shape, compiled_peers=False)


def case(op: str, index: int = 0) -> GpuCase:
    return shrunk([c for c in CASES if c.op == op][index])


def source(cache_bytes: int = 1024, dtype: torch.dtype = torch.bfloat16) -> gpu_inputs.Source:
    return gpu_inputs.Source(torch.Generator().manual_seed(0), torch.device("cpu"), cache_bytes, dtype)


def row(**changes: Any) -> dict[str, Any]:
    """A row of a ledger."""
    return {
        "op": "gate_topk", "case": "E 64 K 8, T 1", "backend": "triton", "run": "first", "method": "graph", "median_us": 2.0,
        "p10_us": 1.9, "p90_us": 2.2, "samples": 50, "input_sets": 4, "bytes": 6e6, "flops": 4e9, "error": 0.0,
        "tflops": 2000.0, "gbytes_per_s": 3000.0, "ceiling": "copy", "percent_of_ceiling": 75.0, "source_hash": "0",
        "peers": {"torch": {"median_us": 5.0, "method": "graph"}, "absent": {"missing": "not installed"}}, **changes,
    }  # fmt: skip


def run_entry(**changes: Any) -> dict[str, Any]:
    versions = {"torch": "2.13.0", "triton": "3.6.0", "transformers": "5.23.0", "git": "abc"}
    return {
        "date": "2026-01-02T03:04:05Z",
        "versions": versions,
        "device": DEVICE,
        "ceilings": CEILINGS,
        **changes,
    }


def ledger_of(*rows: Mapping[str, Any], **runs: Any) -> dict[str, Any]:
    return {"schema": 2, "runs": runs or {"first": run_entry()}, "rows": [dict(r) for r in rows]}


def fake_prepare(
    call: Callable[[Any], Any], inputs: Sequence[Any], capturable: bool = True
) -> gpu_timing.Timed:
    call(inputs[0])
    return gpu_timing.Timed(lambda: None, 1, "graph" if capturable else "eager")


def fake_interleave(contenders: Mapping[str, gpu_timing.Timed], budget_s: float) -> dict[str, list[float]]:
    return {name: [1.0 + i, 2.0 + i, 3.0 + i] for i, name in enumerate(contenders)}


def fake_host_times(call: Callable[[Any], Any], inputs: Sequence[Any]) -> list[float]:
    call(inputs[0])
    return [9.0] * 3


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_bench, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_bench.ledger, "GPU_BACKENDS", ("triton",))
    monkeypatch.setattr(gpu_timing, "prepare", fake_prepare)
    monkeypatch.setattr(gpu_timing, "interleave", fake_interleave)
    monkeypatch.setattr(gpu_timing, "ceilings", lambda: dict(CEILINGS))
    monkeypatch.setattr(gpu_timing, "host_times", fake_host_times)
    monkeypatch.setattr(machine, "l2_bytes", lambda: 1024)
    monkeypatch.setattr(machine, "device", lambda: dict(DEVICE))
    monkeypatch.setattr(machine, "no_gpu", lambda: None)
