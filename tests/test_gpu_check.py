"""`make gpu-check` as far as a machine without a GPU can try it: every step but the GPU's own work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bench", reason="the benchmarks are in a checkout")

from bench_support import DEVICE, needs_no_gpu

from bench import gpu_check, machine

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.mark.parametrize("prefix", ["{name} {kind} [ 50%]", "[gw1] [ 50%] {kind} {name} "])
def test_a_log_without_a_report_is_read(tmp_path: Path, prefix: str) -> None:
    """As `pytest -v` writes it, alone and with workers."""
    lines = [
        prefix.format(name=f"tests/test_it.py::test_{k}", kind=k)
        for k in ("PASSED", "PASSED", "FAILED", "SKIPPED")
    ]
    (tmp_path / "tests.log").write_text(
        "\n".join([*lines, "tests/test_it.py::test_running", "FAILED to start"])
    )
    found = gpu_check.outcome_so_far(tmp_path / "tests.log")
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)
    assert [line.split(":")[0] for line in found["not_passed"]] == ["failed", "skipped"]


GOOD: dict[str, Any] = {
    "build": {"status": 0},
    "tests": {"status": 0, "passed": 5, "failed": 0, "skipped": 0},
    "sanitizer": {"ran": False, "reason": "absent"},
    "bench": {"status": 0, "failed": {}},
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
        ({"bench": {"status": 1, "failed": {}}}, "measuring failed"),
        (
            {"bench": {"status": 0, "failed": {"route: T 1": "out of memory"}}},
            "not measured: route: T 1: out of memory",
        ),
    ],
)
def test_what_counts_as_a_failure(changes: dict[str, Any], expected: str | None) -> None:
    found = gpu_check.problems_of({**GOOD, **changes})
    assert found == [] if expected is None else any(expected in line for line in found)


def test_a_command_out_of_time_is_stopped_with_its_children(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time; print('before');"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(child.pid); time.sleep(60)"
    )
    status, tail = gpu_check.run_logged(
        [sys.executable, "-uc", program], tmp_path / "log", 2.0, gpu_check.environment()
    )
    assert status == 124
    assert "before" in tail
    child = int(tail.split()[-1])
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("a child of the stopped command lives on")


def test_environment_drops_what_would_change_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_INTERPRET", "MOEKERN_BACKEND", "MOEKERN_CPU_ISA", "MOEKERN_DISABLE"):
        monkeypatch.setenv(name, "1")
        assert name not in gpu_check.environment()


def options(tmp_path: Path, **changes: Any) -> gpu_check.Options:
    found = gpu_check.Options(**vars(gpu_check.parser().parse_args(["--out", str(tmp_path)])))
    for name, value in changes.items():
        setattr(found, name, value)
    return found


class Child:
    """The measuring process: what it leaves in gpu.json and its exit status, one for each start."""

    def __init__(self, out: Path, *starts: tuple[int, dict[str, Any]]) -> None:
        self.out, self.starts, self.commands = out, list(starts), []  # type: ignore[var-annotated]

    def __call__(
        self, command: list[str], log: Path, timeout_s: float, env: Any, mode: str = "w"
    ) -> tuple[int, str]:
        self.commands.append(command)
        status, state = self.starts.pop(0)
        (self.out / "gpu.json").write_text(json.dumps(state))
        return status, "the end of the log"


DONE: dict[str, Any] = {"rows": [{}, {}], "running": None, "failed": {}, "left": ["x"], "ended": True}


def test_rows_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(tmp_path, (0, DONE))
    monkeypatch.setattr(gpu_check, "run_logged", child)
    found = gpu_check.run_bench(options(tmp_path, only="route"), 300.0)
    assert found == {"status": 0, "starts": 1, "rows": 2, "failed": {}, "left": ["x"], "tail": ""}
    (command,) = child.commands
    assert command[2:] == ["bench", "gpu", "--out", str(tmp_path), "--budget", "300", "--only", "route"]
    child.starts = [(1, {**DONE, "failed": {"a: b": "WrongResult"}})]
    found = gpu_check.run_bench(options(tmp_path, budget=100.0), 300.0)
    assert (found["status"], found["failed"]) == (0, {"a: b": "WrongResult"})
    assert child.commands[1][6:8] == ["--budget", "100"]


def test_a_crash_is_started_again_behind_the_case_that_caused_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed = {"rows": [{}], "running": "a: b", "failed": {}, "ended": False}
    child = Child(tmp_path, (-11, crashed), (0, {**DONE, "failed": {"a: b": "ended"}}))
    monkeypatch.setattr(gpu_check, "run_logged", child)
    found = gpu_check.run_bench(options(tmp_path), 300.0)
    assert (found["starts"], found["status"], found["failed"]) == (2, 0, {"a: b": "ended"})
    child.starts = [(-11, crashed)] * gpu_check.MAX_STARTS
    found = gpu_check.run_bench(options(tmp_path), 300.0)
    assert (found["starts"], found["status"], found["tail"]) == (
        gpu_check.MAX_STARTS,
        -11,
        "the end of the log",
    )
    child.starts = [(-11, crashed)]
    assert gpu_check.run_bench(options(tmp_path), 20.0)["starts"] == 1  # too late to start again


def test_a_hanging_case_is_named_and_its_rows_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(
        tmp_path, (124, {"rows": [{}], "running": "a: b", "failed": {}, "left": [], "ended": False})
    )
    monkeypatch.setattr(gpu_check, "run_logged", child)
    found = gpu_check.run_bench(options(tmp_path), 300.0)
    assert (found["status"], found["rows"], found["starts"]) == (124, 1, 1)
    assert found["failed"] == {"a: b": "still measured when the time was over (status 124)"}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, dict[str, Any]]]:
    """A machine with a GPU on which every step takes some seconds of a clock that stands still otherwise. Each step's
    seconds (of what it is given) and result can be changed."""
    now = 0.0
    given: dict[str, float] = {}
    found: dict[str, Any] = {name: (1.0, dict(result)) for name, result in GOOD.items()}

    def step(name: str) -> Any:
        def run(options: Any, timeout_s: float) -> dict[str, Any]:
            nonlocal now
            given[name] = timeout_s
            now += min(timeout_s, found[name][0])
            return found[name][1]

        return run

    monkeypatch.setattr(gpu_check, "STEPS", {name: step(name) for name in GOOD})
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now)
    monkeypatch.setattr(gpu_check, "no_gpu", lambda: None)
    monkeypatch.setattr(machine, "device", lambda: dict(DEVICE))
    found["given"] = given
    found["now"] = lambda: now
    return found


def test_a_whole_run(tmp_path: Path, steps: Any) -> None:
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert written["problems"] == []
    assert written["versions"]["torch"] == torch.__version__
    assert list(steps["given"]) == ["build", "tests", "sanitizer", "bench"]
    assert {name: written[name] for name in GOOD} == GOOD


@pytest.mark.parametrize("slow", ["build", "tests", "sanitizer", "bench"])
def test_it_never_takes_longer_than_its_limit(tmp_path: Path, steps: Any, slow: str) -> None:
    """A step that takes all it is given leaves time for those behind it (a build is the exception) and for writing."""
    steps[slow] = (1e9, steps[slow][1])
    gpu_check.main(["--out", str(tmp_path)])
    assert steps["now"]() <= 595
    if slow != "build":
        assert steps["given"]["bench"] > 0.3 * 595


def test_a_skip_fails_the_run(tmp_path: Path, steps: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tests = {"status": 0, "passed": 3, "failed": 0, "skipped": 1, "not_passed": ["skipped: a::b: c"]}
    steps["tests"] = (1.0, tests)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "gpu_check.json").read_text())["problems"] == [
        "1 GPU tests were skipped, which counts as a failure here"
    ]
    assert "skipped: a::b: c" in capsys.readouterr().err
    assert "bench" in steps["given"]  # the rows are measured all the same


def test_a_failed_build_ends_it(tmp_path: Path, steps: Any) -> None:
    steps["build"] = (1.0, {"status": 1, "tail": "error"})
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert list(steps["given"]) == ["build"]
    steps["given"].clear()
    assert gpu_check.main(["--out", str(tmp_path), "--skip-build"]) == 0
    assert "build" not in steps["given"]


@needs_no_gpu
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu_check", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no usable GPU" in done.stderr
    assert not (tmp_path / "out").exists()
