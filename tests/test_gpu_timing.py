"""The timing code line by line, on a stand-in for torch.cuda: what is warmed up, captured, replayed and waited for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("bench", reason="the benchmarks are in a checkout")

from bench_support import needs_no_gpu

from bench import e2e, gpu_timing

pytestmark = needs_no_gpu


class Cuda:
    """Streams do nothing, events read a clock, a graph replays nothing and says how often; a sync is an error when asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.mode = "default"
        cuda = self

        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = time.perf_counter()

            def synchronize(self) -> None:
                cuda.sync()

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            def replay(self) -> None:
                cuda.log.append("replay")

        @contextlib.contextmanager
        def graph(_: Any) -> Iterator[None]:
            assert cuda.mode == "default"
            cuda.log.append("capture")
            yield
            cuda.log.append("captured")

        for name, value in {
            "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "synchronize": self.sync,
            "current_stream": Stream, "stream": lambda s: contextlib.nullcontext(), "set_sync_debug_mode": self.set_mode,
            "mem_get_info": lambda: (1 << 30, 1 << 30),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def sync(self) -> None:
        pass

    def call(self, value: Any) -> None:
        self.log.append(f"call {value}")

    def call_that_waits(self, value: Any) -> None:
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.log.append(f"call {value}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    monkeypatch.setattr(gpu_timing, "REPLAY_US", 5.0)
    return Cuda(monkeypatch)


def test_a_capture_goes_round_the_sets_after_a_warm_up(cuda: Cuda) -> None:
    timed = gpu_timing.prepare(cuda.call, [0, 1, 2])
    assert timed.method == "graph"
    assert timed.calls % 3 == 0
    begin, end = cuda.log.index("capture"), cuda.log.index("captured")
    assert cuda.log[:3] == ["call 0", "call 1", "call 2"]
    assert cuda.log[begin + 1 : end] == [f"call {i % 3}" for i in range(timed.calls)]
    cuda.log.clear()
    found = gpu_timing.interleave({"a": timed}, 0.0)
    assert cuda.log == ["replay"] * (gpu_timing.MIN_ROUNDS + 1)
    assert all(us >= 0 for us in found["a"])


@pytest.mark.parametrize("known", [False, True])
def test_what_waits_for_the_gpu_is_timed_eagerly(cuda: Cuda, known: bool) -> None:
    timed = gpu_timing.prepare(cuda.call_that_waits, [0, 1], capturable=not known)
    assert timed.method == "eager"
    assert "capture" not in cuda.log
    assert cuda.mode == "default"
    cuda.log.clear()
    timed.replay()
    assert cuda.log == [f"call {i % 2}" for i in range(timed.calls)]


def test_another_error_is_none_of_waiting(cuda: Cuda) -> None:
    def fails(_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        gpu_timing.syncs(fails, None)
    assert cuda.mode == "default"


@pytest.mark.usefixtures("cuda")
def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(
        gpu_timing, "interleave", lambda contenders, budget_s: {n: [11.0, 10.0, 12.0] for n in contenders}
    )
    found = gpu_timing.ceilings(1 << 18, 64, "cpu")
    assert found["empty_node_us"] == 11.0
    assert found["gemm_tflops"] == pytest.approx(2 * 64**3 / 10.0 / 1e6)
    assert found["read_gbytes_per_s"] == pytest.approx((1 << 18) / 10.0 / 1e3)
    assert found["copy_gbytes_per_s"] == pytest.approx(2 * found["read_gbytes_per_s"])
    assert len(found) == 4


class FakeStep:
    """As much of e2e.Step as `prepare` uses."""

    def __init__(self, compiled: bool, log: list[str]) -> None:
        self.compiled, self.log = compiled, log
        self.lab = type("Lab", (), {"device": torch.device("cuda")})()

    def reset(self) -> None:
        self.log.append("reset")


def test_a_models_step_is_captured_when_compiled(cuda: Cuda) -> None:
    timed = e2e.prepare(FakeStep(True, cuda.log), lambda: cuda.call("step"))  # type: ignore[arg-type]
    assert timed.method == "compiled, CUDA graph"
    begin = cuda.log.index("capture")
    assert cuda.log[begin - 1 : begin + 3] == ["reset", "capture", "call step", "captured"]
    cuda.log.clear()
    e2e.elapsed_us(FakeStep(True, cuda.log))(timed.replay)  # type: ignore[arg-type]
    assert cuda.log == ["reset", "replay"]
    assert e2e.prepare(FakeStep(False, cuda.log), lambda: cuda.call("step")).method == "eager"  # type: ignore[arg-type]
