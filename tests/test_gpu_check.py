"""`make gpu-check` as far as a machine without a GPU can try it: every step but the GPU's own work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_check, gpu_timing, ledger

ROOT = Path(__file__).resolve().parents[1]


def test_statistics() -> None:
    found = ledger.statistics_of([float(v) for v in range(101)][::-1])
    assert found == {"median_us": 50.0, "p10_us": 10.0, "p90_us": 90.0, "samples": 101}
    assert ledger.statistics_of([1.0, 2.0])["median_us"] == 1.5
    assert ledger.statistics_of([3.0]) == {"median_us": 3.0, "p10_us": 3.0, "p90_us": 3.0, "samples": 1}
    with pytest.raises(ValueError, match="no samples"):
        ledger.statistics_of([])


def test_source_hash_follows_the_kernels(tmp_path: Path) -> None:
    names = [str(p.relative_to(ROOT)) for p in ledger.sources_of("gate_topk")]
    for expected in ("moekern/ops/gate_topk/triton.py", "moekern/_triton_lib.py", "csrc/ops/gate_topk/cuda.cu",
                     "csrc/ops/gate_topk/select.cuh", "csrc/common/warp.cuh", "csrc/common/scalar.h"):  # fmt: skip
        assert expected in names
    assert not [n for n in names if n.endswith(("cpu.cpp", "ref.py"))]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    before = ledger.source_hash("gate_topk", tmp_path)
    assert before == ledger.source_hash("gate_topk")
    for name in names:
        text = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(text + b" ")
        assert ledger.source_hash("gate_topk", tmp_path) != before, name
        (tmp_path / name).write_bytes(text)


def test_json_is_whole_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    ledger.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        ledger.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    ledger.write_json(path, {"a": 2})
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert json.loads(path.read_text()) == {"a": 2}


def test_inputs_rotate_over_four_times_the_cache() -> None:
    l2 = 50 << 20
    for size in (1, 128, 1 << 20, 4 << 20, 1 << 30):
        sets = gpu_timing.set_count(size, l2)
        assert sets * size >= 4 * l2 or sets == gpu_timing.MAX_SETS
        launches = gpu_timing.launch_count(sets)
        assert launches % sets == 0
        assert gpu_timing.MIN_LAUNCHES <= launches <= gpu_timing.MAX_LAUNCHES
    assert gpu_timing.set_count(1 << 40, l2) == 2


def test_pytest_report_is_read(tmp_path: Path) -> None:
    suite = tmp_path / "test_it.py"
    suite.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no')\n"
        "def test_error(broken): pass\n"
        "@pytest.mark.skip(reason='why not')\n"
        "def test_skipped(): pass\n"
    )
    report = tmp_path / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--junitxml={report}", str(suite)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    found = gpu_check.outcome_of(report)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert any("test_skipped" in line and "why not" in line for line in found["not_passed"])


GOOD: dict[str, Any] = {
    "build": {"status": 0},
    "tests": {"status": 0, "passed": 5, "failed": 0, "skipped": 0},
    "sanitizer": {"ran": False, "reason": "absent"},
    "measured": {"rows": []},
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"build": {"status": 1}}, "build failed"),
        ({"tests": {"status": 1, "passed": 4, "failed": 1, "skipped": 0}}, "1 GPU tests failed"),
        ({"tests": {"status": 0, "passed": 4, "failed": 0, "skipped": 1}}, "skipped"),
        ({"tests": {"status": 0, "passed": 0, "failed": 0, "skipped": 0}}, "no GPU test passed"),
        ({"tests": {"status": 124, "passed": 5, "failed": 0, "skipped": 0}}, "status 124"),
        ({"tests": None}, "no test ran"),
        ({"sanitizer": {"ran": True, "status": 86}}, "compute-sanitizer"),
        ({"measured": {"error": "OOM", "rows": []}}, "measuring failed"),
    ],
)
def test_what_counts_as_a_failure(changes: dict[str, Any], expected: str | None) -> None:
    found = gpu_check.problems_of({**GOOD, **changes})
    assert found == [] if expected is None else any(expected in line for line in found)


def test_a_command_out_of_time_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-uc", "import time; print('before'); time.sleep(60)"]
    status, tail = gpu_check.run_logged(command, tmp_path / "log", 2.0, gpu_check.environment())
    assert status == 124
    assert "before" in tail


def test_environment_drops_what_would_change_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_INTERPRET", "MOEKERN_BACKEND", "MOEKERN_CPU_ISA", "MOEKERN_DISABLE"):
        monkeypatch.setenv(name, "1")
        assert name not in gpu_check.environment()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is the CPU: kernels interpreted, times made up, everything else as it runs on a GPU."""
    pytest.importorskip("triton")

    def once(call: Any, inputs: Any, replays: int = 50) -> list[float]:
        call(inputs[0])
        return [1.0, 2.0, 3.0]

    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "BACKENDS", ("triton",))
    monkeypatch.setattr(gpu_check, "TOKENS", (1, 3))
    monkeypatch.setattr(gpu_check, "EXPERTS", (64,))
    monkeypatch.setattr(gpu_timing, "time_in_graph", once)
    monkeypatch.setattr(gpu_timing, "empty_node_times", lambda: [1.0])
    monkeypatch.setattr(gpu_timing, "copy_bandwidth", lambda: 4000.0)
    monkeypatch.setattr(ledger, "l2_bytes", lambda: 1024)
    monkeypatch.setattr(ledger, "device", lambda: {"name": "none"})
    monkeypatch.setattr(gpu_check, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "build", lambda options, timeout_s: {"status": 0})
    monkeypatch.setattr(gpu_check, "sanitize", lambda options, timeout_s: {"ran": False, "reason": "absent"})


needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a GPU: gpu-check itself runs here"
)


@needs_no_gpu
@pytest.mark.usefixtures("machine")
def test_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = {"status": 0, "passed": 3, "failed": 0, "skipped": 0, "not_passed": []}
    monkeypatch.setattr(gpu_check, "run_tests", lambda options, timeout_s: tests)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert written["problems"] == []
    assert written["versions"]["torch"] == torch.__version__
    rows = written["measured"]["rows"]
    assert [(r["case"].split()[0], r["backend"]) for r in rows] == [
        ("T1", "torch"), ("T1", "triton"), ("T3", "torch"), ("T3", "triton"),
    ]  # fmt: skip
    for row in rows:
        assert row["median_us"] == 2.0
        assert row["gbytes_per_s"] == pytest.approx(row["bytes"] / 2e-6 / 1e9)
        assert row["source_hash"] == (None if row["backend"] == "torch" else ledger.source_hash("gate_topk"))
    assert "T3 E64" in capsys.readouterr().out


@needs_no_gpu
@pytest.mark.usefixtures("machine")
def test_a_skip_and_a_broken_kernel_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = {"status": 0, "passed": 3, "failed": 0, "skipped": 1, "not_passed": ["skipped: a::b: c"]}
    monkeypatch.setattr(gpu_check, "run_tests", lambda options, timeout_s: tests)
    monkeypatch.setattr(gpu_check, "torch_gate", lambda logits: 1 / 0)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert len(written["problems"]) == 2
    assert "ZeroDivisionError" in written["measured"]["error"]


@needs_no_gpu
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu_check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no usable GPU" in done.stderr
    assert not (tmp_path / "out").exists()


@needs_no_gpu
def test_the_peer_computes_the_same() -> None:
    from moekern.ops import gate_topk

    logits = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * 3
    weights, ids = gpu_check.torch_gate(logits)
    ours, our_ids = gate_topk(logits, gpu_check.TOP_K, renormalize=True)
    assert torch.equal(ids, our_ids)
    torch.testing.assert_close(weights, ours, rtol=1e-5, atol=1e-7)
