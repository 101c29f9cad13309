"""The GPU rows as far as a machine without a GPU can try them: inputs, peers, timing's arithmetic, budget, resumption."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("bench", reason="the benchmarks are in a checkout")

from bench_support import case, fake_gpu, fake_prepare, ledger_of, needs_no_gpu, row, shrunk, source

from bench import gpu_bench, gpu_inputs, gpu_timing, ledger, peers, sanitized
from bench.__main__ import main
from bench.gpu_bench import Options
from bench.gpu_cases import CASES, GpuCase
from moekern import ops
from moekern.ops import SPECS

__all__ = ["fake_gpu"]

KERNEL_CASES = [c for c in CASES if c.method != "model"]
SHRUNK = {(c.op, str(sorted(shrunk(c).shape.items()))): shrunk(c) for c in KERNEL_CASES}


@pytest.mark.parametrize("one", [pytest.param(c, id=gpu_bench.label(c)) for c in SHRUNK.values()])
def test_inputs_of_every_case_fit_the_op(one: GpuCase) -> None:
    """A shrunk case is taken by the op, is different in every set, and every peer that can run computes the same."""
    spec = SPECS[one.op]
    sets = gpu_inputs.make(one.op, one.shape, source(dtype=torch.float32))
    assert len(sets) >= 2
    for arguments in sets[:2]:
        spec.check(**spec.bind((), arguments))
    first, second = ([v for v in s.values() if isinstance(v, torch.Tensor)] for s in sets[:2])
    assert not all(a.data_ptr() == b.data_ptr() for a, b in zip(first, second, strict=True))
    flops, moved = gpu_bench.mean_work(spec, sets)
    assert flops > 0
    assert moved > 0


def test_sets_fill_four_times_the_cache() -> None:
    one = source(cache_bytes=50 << 20)
    for size in (100, 4096, 1 << 20, 300 << 20):
        count = one.sets(size)
        assert count == gpu_inputs.MAX_SETS or count * size >= 4 * (50 << 20)
        assert 2 <= count <= gpu_inputs.MAX_SETS
    assert one.sets(1 << 40) == 2
    # One token touches K experts: the sets together go through four times the cache's worth of them.
    shape = {"T": 1, "D": 64, "F": 32, "E": 32, "K": 2, "routing": "uniform"}
    expert = 3 * 64 * 32 * 2
    sets = gpu_inputs.make("fused_experts", shape, source(cache_bytes=8 * expert))
    assert len(sets) * 2 * expert >= 4 * 8 * expert
    named = torch.cat([s["ids"].flatten() for s in sets[:16]])
    assert named.unique().numel() == 32, "an expert came again before all others had come"


def test_routing_is_what_it_says() -> None:
    T, E, K = 2000, 64, 6
    uniform, zipf, half = (
        gpu_inputs.draw_ids(kind, 1, T, E, K, source())[0] for kind in ("uniform", "zipf", "half")
    )
    for ids in (uniform, zipf):
        assert all(len(set(line)) == K for line in ids[:200].tolist())
    counts = [torch.bincount(ids.flatten(), minlength=E) for ids in (uniform, zipf, half)]
    assert all(int(c.sum()) == T * K and c.numel() == E for c in counts)
    assert counts[0].max() < 1.5 * counts[0].min()
    assert counts[1][0] > 4 * counts[1][E // 2]
    assert (counts[1].float().argsort(descending=True)[:4] < 8).all()
    assert counts[2][0] == pytest.approx(T * K / 2, rel=0.1)
    for ids in gpu_inputs.draw_ids("uniform", 40, 3, E, K, source()):
        assert all(len(set(line)) == K for line in ids.tolist())
    with pytest.raises(ValueError, match="kind must be"):
        gpu_inputs.draw_ids("other", 1, T, E, K, source())


def agreed(op: str, result: Any, expected: Any) -> None:
    for got, want in zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=False):
        torch.testing.assert_close(got.to(want.dtype), want, rtol=1e-3, atol=1e-4, msg=lambda m: f"{op}: {m}")


PEERS = [p for p in peers.PEERS if p.unavailable() is None]


@pytest.mark.parametrize("peer", [pytest.param(p, id=f"{p.op}-{p.name}") for p in PEERS])
def test_peers_compute_the_same(peer: peers.Peer) -> None:
    spec = SPECS[peer.op]
    sets = gpu_inputs.make(peer.op, case(peer.op).shape, source(dtype=torch.float32))
    call = peer.make(lambda function: function)
    for arguments in sets[:2]:
        assert peer.supports(arguments) is None
        bound = spec.bind((), arguments)
        if not spec.outputs:  # written in place
            copies = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
            call(copies)
            spec.ref(**bound)
            for name in gpu_bench.written_by(spec):
                torch.testing.assert_close(copies[name], arguments[name], rtol=1e-3, atol=1e-4)
            continue
        expected = spec.ref(**bound)
        if peer.op == "route":
            expected = expected[0], expected[1][1:]
        agreed(peer.op, call(arguments), expected)


def test_a_peer_refuses_what_it_does_not_compute() -> None:
    arguments = gpu_inputs.make("fused_experts", case("fused_experts").shape, source())[0]
    found = {
        p.name: p.supports({**arguments, "activation": "gelu"})
        for p in peers.PEERS
        if p.op == "fused_experts"
    }
    assert set(found) == {
        "transformers grouped_mm", "transformers batched_mm", "transformers eager", "torch grouped_mm", "liger-kernel",
    }  # fmt: skip
    assert set(found.values()) == {"not with activation"}
    big = {**arguments, "ids": torch.empty(4096, 6, device="meta", dtype=torch.long)}
    big |= {
        "w_gate_up": torch.empty(64, 2816, 2048, device="meta"),
        "w_down": torch.empty(64, 2048, 1408, device="meta"),
    }
    assert "would copy" in str(peers._few_pairs(big))
    decode = gpu_inputs.make("mla_decode", case("mla_decode").shape, source())[0]
    assert peers._one_query({**decode, "lengths": torch.tensor([1])}) == "not with lengths"


def test_absent_peers_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    arguments = gpu_inputs.make("fused_experts", case("fused_experts").shape, source())[0]
    found = {name: call for name, call, _ in peers.of("fused_experts", arguments, True)}
    assert found["liger-kernel"] == "liger-kernel is not installed"
    assert found["transformers eager"] == "transformers is not installed"
    assert callable(found["torch grouped_mm, compiled"])
    assert "transformers eager, compiled" not in found


def test_calls_of_a_replay() -> None:
    for sets in (1, 2, 45, 512):
        for us in (0.1, 3.0, 200.0, 9000.0):
            calls = gpu_timing.call_count(sets, us)
            assert calls % sets == 0
            assert sets <= calls <= max(sets, gpu_timing.MAX_CALLS)
    assert gpu_timing.call_count(2, 100.0) == 50
    assert gpu_timing.call_count(2, 20000.0) == 2


def test_contenders_take_turns_within_the_budget() -> None:
    order: list[str] = []
    now = 0.0

    def elapsed(replay: Any) -> float:
        nonlocal now
        now += 1.0
        replay()
        return 100.0

    contenders = {n: gpu_timing.Timed(lambda n=n: order.append(n), 10, "graph") for n in "abc"}  # type: ignore[misc]
    found = gpu_timing.interleave(contenders, 40.0, elapsed, lambda: now)
    assert "".join(order[:12]) == "abc" + "abc" + "bca" + "cab"
    rounds = len(found["a"])
    assert 40 / 3 <= rounds <= 40 / 3 + 2
    assert found["a"] == [10.0] * rounds
    assert len(gpu_timing.interleave(contenders, 0.0, elapsed, lambda: now)["b"]) == gpu_timing.MIN_ROUNDS


def test_host_time_is_per_call() -> None:
    calls: list[int] = []
    found = gpu_timing.host_times(calls.append, [1, 2, 3], samples=4, calls=5)
    assert len(found) == 4
    assert calls == [1, 2, 3] + [1, 2, 3, 1, 2] * 4


def test_the_reading_kernel_reads_everything() -> None:
    pytest.importorskip("triton")
    from bench import read_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.randint(
        -(2**31), 2**31 - 1, (2 * read_kernel.TILE_BYTES // 4,), dtype=torch.int32, device=device
    )
    expected = np.bitwise_xor.reduce(data.view(2, -1).cpu().numpy(), axis=1)
    assert read_kernel.read_all(data).tolist() == expected.tolist()


@needs_no_gpu
@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("op", sorted(op for op in SPECS if ledger.backends_of(op)))
def test_a_case_of_every_op_with_a_kernel(op: str) -> None:
    with torch.no_grad():
        rows = list(gpu_bench.measure_case(case(op), "first", {**ledger_of()["runs"]["first"]["ceilings"]}))
    assert [r["backend"] for r in rows] == ["triton"]
    (found,) = rows
    assert found["median_us"] == 2.0
    assert found["error"] <= 2e-2
    assert found["empty_node_us"] == 1.25
    assert found["source_hash"] == ledger.hash_for(op, "triton")
    assert found["gbytes_per_s"] == pytest.approx(found["bytes"] / 2e-6 / 1e9)
    named = {p.name for p in peers.PEERS if p.op == op}
    assert set(found["peers"]) == named
    json.dumps(found, allow_nan=False)


GATING = [
    *[shrunk(c) for c in CASES if c.op == "gate_topk"][:3],
    GpuCase("gate_topk", "eager host time", {"T": 1, "E": 8, "K": 2}, method="host"),
]


class Clock:
    """Time passes while a case is measured only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[GpuCase], float]) -> None:
        self.now = 0.0
        measure = gpu_bench.measure_case

        def measured(case: GpuCase, *rest: Any) -> Any:
            self.now += seconds(case)
            return measure(case, *rest)

        monkeypatch.setattr(gpu_bench, "measure_case", measured)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def gating(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_bench, "CASES", tuple(GATING))


def bench(tmp_path: Path, **options: Any) -> dict[str, Any]:
    with torch.no_grad():
        return gpu_bench.bench(
            Options(tmp_path, 480.0, results=tmp_path / "results", **options), lambda text: None
        )


@needs_no_gpu
@pytest.mark.usefixtures("gating")
def test_rows_are_written_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each case the file holds all rows so far and names the one under way."""
    seen: list[tuple[int, str | None]] = []
    measure = gpu_bench.measure_case

    def watched(*arguments: Any) -> Any:
        state = json.loads((tmp_path / "gpu.json").read_text())
        seen.append((len(state["rows"]), state["running"]))
        return measure(*arguments)

    monkeypatch.setattr(gpu_bench, "measure_case", watched)
    state = bench(tmp_path)
    assert seen == [(i, gpu_bench.label(c)) for i, c in enumerate(GATING)]
    assert state == json.loads((tmp_path / "gpu.json").read_text())
    assert (state["running"], state["left"], state["failed"], state["ended"]) == (None, [], {}, True)
    (run,) = state["runs"].values()
    assert run["ceilings"]["gemm_tflops"] == 800
    assert "ceiling" not in state["rows"][3]
    assert state["rows"][3]["method"] == "host"


@needs_no_gpu
@pytest.mark.usefixtures("gating")
def test_the_budget_ends_it_and_stale_rows_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current = ledger.hash_for("gate_topk", "triton")
    rows = [row(case=c.name, source_hash=current if i != 2 else "0") for i, c in enumerate(GATING[:3])]
    ledger.write_json(tmp_path / "results" / "test-1" / "gpu.json", ledger_of(*rows))
    state = bench(tmp_path, clock=Clock(monkeypatch, lambda case: 200.0))
    # Missing, then stale; the third would not end within the 480 seconds, as the first two took 200 each.
    assert [r["case"] for r in state["rows"]] == [GATING[3].name, GATING[2].name]
    assert state["left"] == [gpu_bench.label(c) for c in GATING[:2]]


@needs_no_gpu
@pytest.mark.usefixtures("gating")
def test_a_case_that_compiles_peers_is_left_when_time_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = dataclasses.replace(GATING[1], compiled_peers=True)
    monkeypatch.setattr(gpu_bench, "CASES", (GATING[0], slow, GATING[2]))
    clock = Clock(monkeypatch, lambda case: 440.0 if case is GATING[0] else 1.0)
    assert bench(tmp_path, clock=clock)["left"] == [
        gpu_bench.label(c) for c in (slow, GATING[2])
    ]  # 440 s may come again
    clock = Clock(monkeypatch, lambda case: 10.0)
    (tmp_path / "gpu.json").unlink()
    options = Options(tmp_path, 60.0, results=tmp_path / "results", clock=clock)
    with torch.no_grad():
        state = gpu_bench.bench(options, lambda text: None)
    assert [r["case"] for r in state["rows"]] == [GATING[0].name, GATING[2].name]
    assert state["left"] == [gpu_bench.label(slow)]


@needs_no_gpu
@pytest.mark.usefixtures("gating")
def test_a_second_start_goes_on_behind_the_crash(tmp_path: Path) -> None:
    state = bench(tmp_path)
    state |= {"rows": state["rows"][:1], "running": gpu_bench.label(GATING[1]), "ended": False}
    ledger.write_json(tmp_path / "gpu.json", state)
    again = bench(tmp_path)
    assert again["failed"] == {gpu_bench.label(GATING[1]): "the process ended while this was measured"}
    assert [r["case"] for r in again["rows"]] == [GATING[i].name for i in (0, 2, 3)]
    assert again["runs"] == state["runs"]


@needs_no_gpu
@pytest.mark.usefixtures("gating")
def test_a_wrong_kernel_gets_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekern.ops.gate_topk import triton

    right = triton.run

    def wrong(weights: torch.Tensor, *arguments: Any, **named: Any) -> None:
        right(weights, *arguments, **named)
        weights.mul_(1.01)

    monkeypatch.setattr(triton, "run", wrong)
    state = bench(tmp_path)
    assert state["rows"] == []
    assert len(state["failed"]) == len(GATING)
    assert all(
        "WrongResult: gate_topk, triton: output 0 errs by 0.01" in why for why in state["failed"].values()
    )


@needs_no_gpu
@pytest.mark.usefixtures("gating")
def test_an_error_of_the_gpu_ends_the_process_with_the_case_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_bench, "measure_case", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        bench(tmp_path)
    state = json.loads((tmp_path / "gpu.json").read_text())
    assert list(state["failed"]) == [gpu_bench.label(GATING[0])]
    assert not state["ended"]


def test_a_peer_that_fails_is_no_failure_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_timing, "prepare", fake_prepare)

    def fails(error: Exception) -> Any:
        def call(_: Any) -> None:
            raise error

        return call

    assert gpu_bench.prepared(fails(TypeError("no")), [{}], True) == "TypeError: no"
    assert gpu_bench.prepared(fails(torch.OutOfMemoryError("full")), [{}], True) == "out of memory"
    with pytest.raises(RuntimeError):
        gpu_bench.prepared(fails(RuntimeError("CUDA error: bad")), [{}], True)


def test_an_unknown_case_is_an_error() -> None:
    with pytest.raises(ValueError, match="no GPU case's name contains 'nonsense'"):
        gpu_bench.chosen("nonsense")
    assert all(c.method != "model" for c in gpu_bench.chosen(None))


@needs_no_gpu
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert "no usable GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_no_gpu
def test_what_the_sanitizer_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(sanitized, "DEVICE", "cpu")
    monkeypatch.setattr(sanitized, "CASES_PER_OP", 1)
    some = {name: SPECS[name] for name in ("gate_topk", "combine")}
    monkeypatch.setattr(sanitized.ops, "SPECS", some)
    assert sanitized.main() == 0
    assert "2 calls" in capsys.readouterr().out
    for spec in some.values():
        found = sanitized.short_cases(spec)
        assert found
        assert all(c.small for c in found)
    assert ops.SPECS is not SPECS
