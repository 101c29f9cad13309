"""`python -m bench gpu`: measures the GPU cases within a budget, missing and stale rows first, and writes OUT/gpu.json after
each. Every row's result is checked before it is timed. Run again after a crash it goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import gpu_inputs, gpu_timing, ledger, machine, peers
from bench.gpu_cases import CASES, GpuCase
from moekern import _op, ops
from moekern._op import OpSpec

DEVICE = "cuda"
ROW_S = 2.0  # of timing, per case; checks, compilation and data come on top
# A case is not begun with less than this left, nor with less than the longest one took; torch.compile takes longer.
RESERVE_S, COMPILE_S = 15.0, 40.0
EMPTY_BELOW_US = 10.0  # rows below it carry the time of an empty graph node
# Largest error of a result against the op's definition in fp32, relative to the RMS: 8 bits of mantissa, or fp32 sums of
# a few thousand terms. The exact yardstick is the tests'; this keeps a wrong kernel's time out of the ledger.
LIMITS = {"model": 2e-2, "fp32": 1e-3, "exact": 0.0}


class WrongResult(Exception):
    """A backend computed something else."""


@dataclass
class Options:
    out: Path
    budget_s: float
    only: str | None = None
    results: Path = ledger.RESULTS
    clock: Callable[[], float] = time.monotonic


def written_by(spec: OpSpec) -> list[str]:
    """Names of the arguments that an op writes in place."""
    parsed = torch._C.parse_schema(f"moekern::{spec.name}{spec.schema}")
    return [a.name for a in parsed.arguments if a.alias_info is not None and a.alias_info.is_write]


def results_of(
    spec: OpSpec, call: Callable[..., Any], arguments: Mapping[str, Any]
) -> list[tuple[str, Tensor]]:
    """(kind, value) of every output, and of every argument written in place."""
    written = written_by(spec)
    bound = {n: v.clone() if n in written else v for n, v in arguments.items()}
    found = call(**bound)
    outputs = () if found is None else found if isinstance(found, tuple) else (found,)
    values = list(zip(spec.outputs, outputs, strict=True))
    return values + [("model", bound[n]) for n in written]


def op_results(spec: OpSpec, backend: str, arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """What the op returns in full: its public function may leave outputs out."""
    return results_of(spec, lambda **a: _op.call(spec, backend, **spec.bind((), a)), arguments)


def error_of(kind: str, got: Tensor, expected: Tensor) -> float:
    """RMS error relative to the RMS of what is expected; 0 or 1 for integers."""
    if kind == "exact":
        return float(not torch.equal(got, expected))
    got, expected = got.float(), expected.float()
    difference = (got - expected).square().mean().sqrt()
    return float(difference / expected.square().mean().sqrt().clamp_min(1e-30))


def check(
    spec: OpSpec, backend: str, arguments: Mapping[str, Any], expected: Sequence[tuple[str, Tensor]]
) -> float:
    """The largest error of a backend. Raises WrongResult where it is too large."""
    got = op_results(spec, backend, arguments)
    worst = 0.0
    for i, ((kind, value), (_, wanted)) in enumerate(zip(got, expected, strict=True)):
        if kind == "ids":  # what hangs on rounding shows in the weights
            continue
        error = error_of(kind, value, wanted)
        if not error <= LIMITS[kind]:
            raise WrongResult(
                f"{spec.name}, {backend}: output {i} errs by {error:.2g}; limit {LIMITS[kind]:.2g}"
            )
        worst = max(worst, error)
    return worst


def expected_of(spec: OpSpec, arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    return results_of(spec, lambda **a: spec.ref(**spec.bind((), a)), arguments)


def mean_work(spec: OpSpec, sets: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """FLOPs and bytes of a call, averaged over the sets: bytes count the experts that the ids name."""
    some = sets[:16]
    bound = [spec.bind((), arguments) for arguments in some]
    return sum(spec.flops(**b) for b in bound) / len(some), sum(spec.bytes(**b) for b in bound) / len(some)


def _call(public: Callable[..., Any], backend: str, arguments: Mapping[str, Any]) -> Any:
    return public(**arguments, backend=backend)


def our_calls(spec: OpSpec) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
    """The public op on each of its GPU backends.

    Raises RuntimeError when one is not available: on a machine with a GPU, built, all are.
    """
    calls: dict[str, Callable[[Mapping[str, Any]], Any]] = {}
    public = getattr(ops, spec.name)
    for name in ledger.backends_of(spec.name):
        reason = _op.unavailable(spec.backends[name])
        if reason is not None:
            raise RuntimeError(
                f"{spec.name}: backend {name} is not available on a machine with a GPU: {reason}"
            )
        calls[name] = functools.partial(_call, public, name)
    return calls


def host_calls(spec: OpSpec, ours: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """As users call it: the default backend is found by the dispatch, which is part of the time."""
    default = next((name for name in _op.default_order("cuda") if name in ours), None)
    public = getattr(ops, spec.name)
    return {
        n: (lambda a: public(**a)) if n == default and spec.choose is None else call
        for n, call in ours.items()
    }


def measure_case(case: GpuCase, run: str, ceilings: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """The rows of a case, one for each backend, all contenders timed in turns on the same data."""
    spec = ops.SPECS[case.op]
    source = gpu_inputs.Source(
        torch.Generator(DEVICE).manual_seed(0), torch.device(DEVICE), machine.l2_bytes()
    )
    sets = gpu_inputs.make(case.op, case.shape, source)
    ours = our_calls(spec)
    expected = expected_of(spec, sets[0])
    errors = {name: check(spec, name, sets[0], expected) for name in ours}
    del expected
    flops, moved = mean_work(spec, sets)
    timed: dict[str, Any] = {}
    others: dict[str, Any] = {}
    if case.method == "host":
        times = {name: gpu_timing.host_times(call, sets) for name, call in host_calls(spec, ours).items()}
        methods = dict.fromkeys(ours, "host")
    else:
        timed = {name: gpu_timing.prepare(call, sets) for name, call in ours.items()}
        for name, call, capturable in peers.of(case.op, sets[0], case.compiled_peers):
            others[name] = call if isinstance(call, str) else prepared(call, sets, capturable)
        contenders = timed | {n: t for n, t in others.items() if not isinstance(t, str)}
        times = gpu_timing.interleave(contenders, ROW_S)
        methods = {name: contender.method for name, contender in contenders.items()}
    beside = {
        name: {"missing": found} if isinstance(found, str)
        else {**ledger.statistics_of(times[name]), "method": methods[name]}
        for name, found in others.items()
    }  # fmt: skip
    for name in ours:
        statistics = ledger.statistics_of(times[name])
        row = {
            "op": case.op, "case": case.name, "backend": name, "run": run, "method": methods[name], **statistics,
            "input_sets": len(sets), "bytes": moved, "flops": flops, "error": errors[name],
            "source_hash": ledger.hash_for(case.op, name), "peers": beside,
        }  # fmt: skip
        if case.method == "graph":
            row |= ledger.rates_of(statistics["median_us"], flops, moved, case.ceiling, ceilings)
            if statistics["median_us"] < EMPTY_BELOW_US:
                row["empty_node_us"] = ceilings["empty_node_us"]
        yield row


def prepared(call: Callable[[Mapping[str, Any]], Any], sets: Sequence[Any], capturable: bool) -> Any:
    """A peer ready to be timed, or why it is not: another project's failure is no failure of this run."""
    try:
        return gpu_timing.prepare(call, sets, capturable)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        if "CUDA error" in str(error):  # the context may be broken, and every later row with it
            raise
        return f"{type(error).__name__}: {error}"[:300]


def label(case: GpuCase) -> str:
    return f"{case.op}: {case.name}"


def chosen(only: str | None) -> list[GpuCase]:
    """Raises ValueError when `only` names nothing."""
    found = [c for c in CASES if c.method != "model" and (only is None or only in label(c))]
    if not found:
        raise ValueError(f"no GPU case's name contains {only!r}")
    return found


def start_run(options: Options) -> tuple[dict[str, Any], str]:
    """OUT/gpu.json as an earlier, crashed call left it, or a new one; and this run's name."""
    path = options.out / "gpu.json"
    state: dict[str, Any] = ledger.load(path)
    state.setdefault("failed", {})
    if state.get("running"):
        state["failed"][state["running"]] = "the process ended while this was measured"
    if not state["runs"]:
        versions = machine.versions()
        name = f"{machine.now()} {(versions['git'] or 'unknown')[:12]}"
        state["runs"][name] = {
            "date": machine.now(), "command": machine.command_line(), "versions": versions, "device": machine.device(),
            "ceilings": gpu_timing.ceilings(),
        }  # fmt: skip
    state["running"], state["ended"] = None, False
    return state, next(iter(state["runs"]))


def bench(options: Options, progress: Callable[[str], Any] = print) -> dict[str, Any]:
    """Measures what the budget allows; returns what OUT/gpu.json holds."""
    start = options.clock()
    path = options.out / "gpu.json"
    state, run = start_run(options)
    ceilings = state["runs"][run]["ceilings"]
    committed = ledger.load(options.results / ledger.slug(state["runs"][run]["device"]["name"]) / "gpu.json")
    cases = chosen(options.only)
    found = ledger.states(ledger.wanted(cases), committed)
    waiting = ledger.in_order(cases, found, ledger.dates_of(committed))
    done = {(row["op"], row["case"]) for row in state["rows"]}
    waiting = [c for c in waiting if (c.op, c.name) not in done and label(c) not in state["failed"]]
    longest = 0.0

    def fits(case: GpuCase) -> bool:
        needed = max(RESERVE_S, longest) + (COMPILE_S if case.compiled_peers else 0.0)
        return options.clock() - start <= options.budget_s - needed

    while (case := next(filter(fits, waiting), None)) is not None:
        waiting.remove(case)
        state["running"] = label(case)
        state["left"] = [label(c) for c in waiting]
        ledger.write_json(path, state)
        began = options.clock()
        try:
            for row in measure_case(case, run, ceilings):
                state["rows"].append(row)
                progress(line(row))
        except torch.OutOfMemoryError:
            state["failed"][label(case)] = "out of memory"
        except Exception as error:
            state["failed"][label(case)] = f"{type(error).__name__}: {error}"[:500]
            progress(f"{label(case)}: {state['failed'][label(case)]}")
            if "CUDA error" in str(error):  # nothing after it can be trusted in this process
                state["running"] = None
                ledger.write_json(path, state)
                raise
        finally:
            if not case.compiled_peers:
                longest = max(longest, options.clock() - began)
            torch.compiler.reset()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    state["running"], state["ended"] = None, True
    state["left"] = [label(c) for c in waiting]
    ledger.write_json(path, state)
    return state


def line(row: Mapping[str, Any]) -> str:
    times = [p["median_us"] for p in row["peers"].values() if "median_us" in p]
    best = f", best peer {min(times):.2f} us" if times else ""
    share = f" ({row['percent_of_ceiling']:.0f}% of {row['ceiling']})" if "ceiling" in row else ""
    return f"{row['op']}: {row['case']}, {row['backend']}: {row['median_us']:.2f} us{share}{best}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="writes DIR/gpu.json")
    parser.add_argument("--budget", type=float, default=480.0, metavar="S", help="seconds (default 480)")
    parser.add_argument("--only", metavar="TEXT", help="only the cases whose 'op: name' contains TEXT")


def run(options: argparse.Namespace) -> int:
    reason = machine.cannot_measure()
    if reason is not None:
        print(f"bench gpu: no usable GPU: {reason}", file=sys.stderr)
        return 2
    with torch.no_grad():
        state = bench(
            Options(options.out, options.budget, options.only), lambda text: print(text, flush=True)
        )
    for name, why in state["failed"].items():
        print(f"bench gpu: {name}: {why}", file=sys.stderr)
    print(f"{len(state['rows'])} rows in {options.out / 'gpu.json'}; {len(state['left'])} cases left")
    return 1 if state["failed"] else 0
