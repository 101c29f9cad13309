"""`make gpu-check OUT=dir`: build, test and measure on a machine with a GPU, offline, in an existing environment.

Writes into OUT: build.log, tests.log, tests.xml, sanitizer.log, bench.log, gpu_check.json (what happened) and gpu.json (the
rows, written after each; `python -m bench report --merge OUT/gpu.json` puts them into bench/results). The exit status is 0
only when all went well: 1 for a failure, 2 when this machine has no usable GPU. A skipped GPU test is a failure: here
nothing is a reason to skip one. All of it ends within --limit seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import ledger, machine

ROOT = ledger.ROOT
SCHEMA = 2
TESTS_SHARE = 0.45  # of the time left after the build; the rows have the rest, less the sanitizer's
SANITIZER_S = 60.0
MAX_STARTS = 5  # of the measuring process
WRITING_S = 5.0  # kept for ending children and writing the result


@dataclass
class Options:
    out: Path
    budget: float
    limit: float
    workers: int
    skip_build: bool
    tests: str | None
    only: str | None


def no_gpu() -> str | None:
    """Why nothing can be checked here, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; name the interpreter that has with PY=..."
    return machine.no_gpu()


def environment() -> dict[str, str]:
    """Of the subprocesses: no interpreter, no forced backend, the checkout importable."""
    dropped = ("TRITON_INTERPRET", "MOEKERN_BACKEND", "MOEKERN_CPU_ISA", "MOEKERN_DISABLE")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    kept["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), kept.get("PYTHONPATH")) if p)
    return kept


def run_logged(
    command: Sequence[str], log: Path, timeout_s: float, env: dict[str, str], mode: str = "w"
) -> tuple[int, str]:
    """Exit status and the end of the output, all of which goes to `log`. 124: it ran out of time and was killed with every
    process it had started."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open(mode) as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=max(timeout_s, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = 124
    return status, log.read_text(errors="replace")[-3000:]


def build(options: Options, timeout_s: float) -> dict[str, Any]:
    """Builds in the checkout, for this GPU alone unless TORCH_CUDA_ARCH_LIST says otherwise."""
    import torch

    env = environment()
    major, minor = torch.cuda.get_device_capability()
    env.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    env.update(MOEKERN_CUDA="ON", MOEKERN_REQUIRE_NATIVE="1")
    # cmake and ninja may be there as Python packages only, beside this interpreter.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    start = time.monotonic()
    status, tail = run_logged(command, options.out / "build.log", timeout_s, env)
    return {"status": status, "seconds": time.monotonic() - start, "archs": env["TORCH_CUDA_ARCH_LIST"],
            "tail": tail if status else ""}  # fmt: skip


def outcome_of(report: Path) -> dict[str, Any]:
    """Counts and the names of what did not pass, from pytest's JUnit XML."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    bad: list[str] = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind != "passed":
            message = next(
                (str(c.get("message", "")) for c in case if c.tag in ("failure", "error", "skipped")), ""
            )
            bad.append(f"{kind}: {case.get('classname')}::{case.get('name')}: {message[:300]}")
    return {**counts, "not_passed": bad[:200]}


def outcome_so_far(log: Path) -> dict[str, Any]:
    """The same from the log of a run that was stopped before it wrote its XML."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    bad: list[str] = []
    kinds = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
    for line in log.read_text(errors="replace").splitlines():
        found = re.search(rf"\b({'|'.join(kinds)})\b", line)
        if found and "::" in line:
            kind = kinds[found.group(1)]
            counts[kind] += 1
            if kind != "passed":
                bad.append(f"{kind}: {line.strip()[:300]}")
    return {**counts, "not_passed": bad[:200]}


def run_tests(options: Options, timeout_s: float) -> dict[str, Any]:
    report = options.out / "tests.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-m",
        "gpu",
        f"--junitxml={report}",
        "-p",
        "no:cacheprovider",
    ]
    if options.workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(options.workers)]
    if options.tests:
        command += ["-k", options.tests]
    start = time.monotonic()
    status, tail = run_logged(command, options.out / "tests.log", timeout_s, environment())
    result: dict[str, Any] = {"status": status, "seconds": time.monotonic() - start}
    # One line a test (-v), so that a run out of time still says what it found.
    result |= outcome_of(report) if report.exists() else outcome_so_far(options.out / "tests.log")
    result["tail"] = tail if status else ""
    return result


def sanitize(options: Options, timeout_s: float) -> dict[str, Any]:
    """compute-sanitizer's memcheck over the short cases of every kernel; a machine may not have or allow it."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        return {"ran": False, "reason": "compute-sanitizer is not on PATH"}
    env = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    command = [found, "--tool", "memcheck", "--error-exitcode", "86", sys.executable, "-m", "bench.sanitized"]
    status, tail = run_logged(command, options.out / "sanitizer.log", timeout_s, env)
    if "device not supported" in tail.lower() or "device is not supported" in tail.lower():
        return {"ran": False, "reason": "compute-sanitizer does not support this device or virtual machine"}
    if status == 124:
        return {"ran": False, "reason": f"not done after {timeout_s:.0f} s"}
    return {"ran": True, "status": status, "tail": tail if status else ""}


def run_bench(options: Options, timeout_s: float) -> dict[str, Any]:
    """The rows, in a process of their own: one that hangs is killed with what it has written kept, and one that breaks the
    GPU context is started again behind the case that broke it."""
    path, log = options.out / "gpu.json", options.out / "bench.log"
    path.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    end = time.monotonic() + min(timeout_s, options.budget)
    starts = 0
    while True:
        left = end - time.monotonic()
        command = [sys.executable, "-m", "bench", "gpu", "--out", str(options.out), "--budget", f"{left:.0f}"]
        command += ["--only", options.only] if options.only else []
        # The budget is the child's own; the timeout is for one that hangs.
        status, tail = run_logged(command, log, left + WRITING_S, environment(), "a")
        starts += 1
        rows = json.loads(path.read_text()) if path.exists() else {}
        if rows.get("ended") or status in (2, 124) or starts == MAX_STARTS or end - time.monotonic() < 30:
            break
    failed = dict(rows.get("failed", {}))
    if rows.get("running"):
        failed[rows["running"]] = f"still measured when the time was over (status {status})"
    return {
        "status": 0 if rows.get("ended") else status or 1, "starts": starts, "rows": len(rows.get("rows", [])), "failed": failed,
        "left": rows.get("left", []), "tail": "" if rows.get("ended") else tail,
    }  # fmt: skip


def problems_of(result: dict[str, Any]) -> list[str]:
    """Why the check failed; nothing when it passed."""
    found = []
    if result["build"].get("status"):
        found.append(f"the build failed (status {result['build']['status']}): see build.log")
    tests = result.get("tests")
    if tests is None:
        found.append("no test ran")
    else:
        if tests["failed"] or tests["status"]:
            found.append(
                f"{tests['failed']} GPU tests failed (pytest's status {tests['status']}): see tests.log"
            )
        if tests["skipped"]:
            found.append(f"{tests['skipped']} GPU tests were skipped, which counts as a failure here")
        if not tests["passed"]:
            found.append("no GPU test passed")
    sanitizer = result.get("sanitizer", {})
    if sanitizer.get("status"):
        found.append(f"compute-sanitizer found errors (status {sanitizer['status']}): see sanitizer.log")
    measured = result.get("bench", {})
    if measured.get("status"):
        found.append(f"measuring failed (status {measured['status']}): see bench.log")
    found += [f"not measured: {name}: {reason}" for name, reason in measured.get("failed", {}).items()]
    return found


def check(options: Options) -> dict[str, Any]:
    """Everything, in order; each step is written down before the next starts, so that a killed run leaves its part."""
    start = time.monotonic()
    deadline = start + options.limit - WRITING_S
    path = options.out / "gpu_check.json"
    result: dict[str, Any] = {
        "schema": SCHEMA, "command": machine.command_line(), "versions": machine.versions(),
        "device": machine.device(), "build": {"skipped": True},
    }  # fmt: skip

    def left() -> float:
        return deadline - time.monotonic()

    def save() -> None:
        result["problems"] = problems_of(result)
        result["seconds"] = time.monotonic() - start
        ledger.write_json(path, result)

    def step(name: str, timeout_s: float) -> None:
        print(f"gpu-check: {name}, at most {timeout_s:.0f} s", flush=True)
        result[name] = STEPS[name](options, timeout_s)
        save()

    if not options.skip_build:
        step("build", left())
        if result["build"]["status"]:
            return result
    # Correctness first. Tests that take more than their share are a failure, but cost no row.
    step("tests", TESTS_SHARE * left())
    step("sanitizer", min(SANITIZER_S, 0.2 * left()))
    step("bench", left() - WRITING_S)
    return result


STEPS = {"build": build, "tests": run_tests, "sanitizer": sanitize, "bench": run_bench}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").splitlines()[0])
    found.add_argument("--out", type=Path, required=True, help="directory for the results")
    found.add_argument(
        "--budget", type=float, default=480.0, help="seconds for the rows at most (default 480)"
    )
    found.add_argument("--limit", type=float, default=595.0, help="seconds for everything (default 595)")
    found.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="pytest workers, where pytest-xdist is installed",
    )
    found.add_argument("--skip-build", action="store_true", help="use the libraries that are in the checkout")
    found.add_argument("--tests", metavar="TEXT", help="only GPU tests whose name contains TEXT")
    found.add_argument("--only", metavar="TEXT", help="only the rows whose 'op: name' contains TEXT")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = Options(**vars(parser().parse_args(arguments)))
    options.out = options.out.resolve()
    reason = no_gpu()
    if reason is not None:
        print(f"gpu-check: no usable GPU: {reason}", file=sys.stderr)
        return 2
    result = check(options)
    log = options.out / "bench.log"
    if log.exists():
        print(log.read_text(errors="replace"), end="")
    for problem in result["problems"]:
        print(f"gpu-check: {problem}", file=sys.stderr)
    for line in result.get("tests", {}).get("not_passed", [])[:20]:
        print(f"  {line}", file=sys.stderr)
    print(f"gpu-check: {'FAILED' if result['problems'] else 'passed'}; {options.out / 'gpu_check.json'}")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
