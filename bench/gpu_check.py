"""`make gpu-check OUT=dir`: build, test and measure on a machine with a GPU, offline, in an existing environment.

Writes into OUT: build.log, tests.log, tests.xml, sanitizer.log and gpu_check.json, which holds everything else. The exit
status is 0 only when all went well: 1 for a failure, 2 when this machine has no usable GPU. A skipped GPU test is a
failure: here nothing is a reason to skip one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import ledger

ROOT = ledger.ROOT
SCHEMA = 1
DEVICE = "cuda"
BACKENDS = ("triton", "cuda")
TOKENS, EXPERTS, TOP_K = (1, 64, 4096), (64, 128, 256, 512), 8


@dataclass
class Options:
    out: Path
    budget_s: float
    workers: int
    skip_build: bool
    tests: str | None


def no_gpu() -> str | None:
    """Why nothing can be checked here, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; name the interpreter that has with PY=..."
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU (driver, CUDA_VISIBLE_DEVICES)"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability {major}.{minor}; moekern needs 8.0 (Ampere) or newer"
    return None


def environment() -> dict[str, str]:
    """Of the subprocesses: no interpreter, no forced backend, the checkout importable."""
    dropped = ("TRITON_INTERPRET", "MOEKERN_BACKEND", "MOEKERN_CPU_ISA", "MOEKERN_DISABLE")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    kept["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), kept.get("PYTHONPATH")) if p)
    return kept


def run_logged(command: Sequence[str], log: Path, timeout_s: float, env: dict[str, str]) -> tuple[int, str]:
    """Exit status and the end of the output, all of which goes to `log`. 124: it ran out of time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        try:
            status = subprocess.run(command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT,
                                    timeout=max(timeout_s, 1.0)).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
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


def run_tests(options: Options, timeout_s: float) -> dict[str, Any]:
    report = options.out / "tests.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
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
    result |= (
        outcome_of(report) if report.exists() else {"passed": 0, "failed": 0, "skipped": 0, "not_passed": []}
    )
    result["tail"] = tail if status else ""
    return result


def sanitize(options: Options, timeout_s: float) -> dict[str, Any]:
    """compute-sanitizer's memcheck over the short cases of the CUDA kernels; a machine may not have or allow it."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        return {"ran": False, "reason": "compute-sanitizer is not on PATH"}
    env = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    command = [found, "--tool", "memcheck", "--error-exitcode", "86", sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu",
               "-p", "no:cacheprovider", "tests/ops/test_gate_topk_gpu.py", "-k", "cuda and (shapes or hostile)"]  # fmt: skip
    status, tail = run_logged(command, options.out / "sanitizer.log", timeout_s, env)
    if "Device not supported" in tail or "device is not supported" in tail:
        return {"ran": False, "reason": "compute-sanitizer does not support this device or virtual machine"}
    if status == 124:
        return {"ran": False, "reason": f"not done after {timeout_s:.0f} s"}
    return {"ran": True, "status": status, "tail": tail if status else ""}


def torch_gate(logits: Any) -> Any:
    """The router of Qwen3-MoE as transformers writes it, after its linear layer."""
    import torch

    weights = torch.nn.functional.softmax(logits, dtype=torch.float, dim=-1)
    weights, ids = torch.topk(weights, TOP_K, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), ids


def measure_gate_topk(deadline: float) -> list[dict[str, Any]]:
    """One row per (tokens, experts, contender); the contenders of a shape are timed one after the other on the same data."""
    import torch

    from bench import gpu_timing
    from moekern import _op
    from moekern.ops import SPECS, gate_topk

    spec, rows = SPECS["gate_topk"], []
    contenders: dict[str, Any] = {"torch": torch_gate}
    for name in BACKENDS:
        reason = _op.unavailable(spec.backends[name])
        if reason is not None:
            raise RuntimeError(
                f"gate_topk: backend {name} is not available on a machine with a GPU: {reason}"
            )
        contenders[name] = lambda x, name=name: gate_topk(x, TOP_K, renormalize=True, backend=name)
    for num_tokens in TOKENS:
        for num_experts in EXPERTS:
            size = num_tokens * num_experts * 2
            sets = gpu_timing.set_count(size, ledger.l2_bytes())
            generator = torch.Generator(DEVICE).manual_seed(0)
            whole = torch.randn(
                sets, num_tokens, num_experts, device=DEVICE, dtype=torch.bfloat16, generator=generator
            )
            inputs = list(whole.unbind())
            moved = spec.bytes(**spec.bind((), {"logits": inputs[0], "top_k": TOP_K}))
            for name, call in contenders.items():
                row: dict[str, Any] = {
                    "op": "gate_topk", "case": f"T{num_tokens} E{num_experts} K{TOP_K} softmax renormalize bf16",
                    "backend": name, "bytes": moved, "input_sets": sets, "method": "cuda_graph",
                    "source_hash": ledger.source_hash("gate_topk") if name != "torch" else None,
                }  # fmt: skip
                if time.monotonic() > deadline:
                    rows.append(row | {"missing": "out of time"})
                    continue
                row |= ledger.statistics_of(gpu_timing.time_in_graph(call, inputs))
                row["gbytes_per_s"] = moved / row["median_us"] / 1e3
                rows.append(row)
    return rows


def measure(deadline: float) -> dict[str, Any]:
    import torch

    from bench import gpu_timing

    with torch.no_grad():
        return {
            "copy_gbytes_per_s": gpu_timing.copy_bandwidth(),
            "empty_graph_node": ledger.statistics_of(gpu_timing.empty_node_times()),
            "rows": measure_gate_topk(deadline),
        }


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
    if "error" in result.get("measured", {}):
        found.append(f"measuring failed: {result['measured']['error']}")
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'case':44} {'backend':8} {'median us':>10} {'p10':>8} {'p90':>8} {'GB/s':>8}"]
    for row in rows:
        numbers = [row.get(key) for key in ("median_us", "p10_us", "p90_us", "gbytes_per_s")]
        text = row.get("missing") or " ".join(
            f"{n:{w}.2f}" for n, w in zip(numbers, (10, 8, 8, 8), strict=True)
        )
        lines.append(f"{row['case']:44} {row['backend']:8} {text}")
    return "\n".join(lines)


def check(options: Options) -> dict[str, Any]:
    """Everything, in order; each step is written down before the next starts, so that a killed run leaves its part."""
    start = time.monotonic()
    deadline = start + options.budget_s
    path = options.out / "gpu_check.json"
    result: dict[str, Any] = {
        "schema": SCHEMA, "command": ledger.command_line(), "versions": ledger.versions(), "device": ledger.device(),
        "build": {"skipped": True},
    }  # fmt: skip

    def save() -> None:
        result["problems"] = problems_of(result)
        result["seconds"] = time.monotonic() - start
        ledger.write_json(path, result)

    if not options.skip_build:
        print("gpu-check: building", flush=True)
        result["build"] = build(options, deadline - time.monotonic())
        save()
        if result["build"]["status"]:
            return result
    # Measuring in this process, before the tests: a test that breaks the context or eats the time costs no row.
    print("gpu-check: measuring", flush=True)
    try:
        result["measured"] = measure(time.monotonic() + (deadline - time.monotonic()) / 2)
    except Exception as error:  # whatever it is, the tests still run and it is reported
        result["measured"] = {"error": f"{type(error).__name__}: {error}"[:2000], "rows": []}
    save()
    print("gpu-check: testing", flush=True)
    result["tests"] = run_tests(options, deadline - time.monotonic())
    save()
    print("gpu-check: compute-sanitizer", flush=True)
    result["sanitizer"] = sanitize(options, min(180.0, deadline - time.monotonic()))
    save()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds for all of it (default 540)")
    parser.add_argument(
        "--workers", type=int, default=4, help="pytest workers, where pytest-xdist is installed"
    )
    parser.add_argument(
        "--skip-build", action="store_true", help="use the libraries that are in the checkout"
    )
    parser.add_argument("--tests", metavar="TEXT", help="only GPU tests whose name contains TEXT")
    options = Options(**vars(parser.parse_args(arguments)))
    options.out = options.out.resolve()
    reason = no_gpu()
    if reason is not None:
        print(f"gpu-check: no usable GPU: {reason}", file=sys.stderr)
        return 2
    result = check(options)
    print(table(result.get("measured", {}).get("rows", [])))
    for problem in result["problems"]:
        print(f"gpu-check: {problem}", file=sys.stderr)
    for line in result.get("tests", {}).get("not_passed", [])[:20]:
        print(f"  {line}", file=sys.stderr)
    print(f"gpu-check: {'FAILED' if result['problems'] else 'passed'}; {options.out / 'gpu_check.json'}")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # measuring happens in this process
    sys.exit(main())
