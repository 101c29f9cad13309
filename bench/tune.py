"""`python -m bench tune`: times configurations around the ones that `choose` picks, and says where a pick is not within 3% of
the best. Offline: nothing reads its table at run time; a finding goes into `choose`, with its reason.

It asks nothing of an op but what docs/adding-an-op.md says of config.py: `choose*` functions and, beside each, `candidates*`
of the same arguments. A call of the op shows which of them it asks, and with which arguments; their answers are replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import gpu_bench, gpu_inputs, gpu_timing, ledger, machine
from bench.gpu_cases import GpuCase
from moekern import ops

SCHEMA = 1
SLACK = 1.03  # a pick within this of the best is good: runs differ by 1 to 2%
LOOK_ROUNDS_S, FINAL_S = (
    0.0,
    1.5,
)  # budgets of the first look at every candidate, and of those that are near the best
NEAR = 1.15
MAX_CANDIDATES = 40
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Chooser:
    """A `choose` function: its module, its name, and the `candidates` beside it."""

    module: str
    name: str

    @property
    def choose(self) -> Callable[..., Any]:
        return getattr(sys.modules[self.module], self.name)

    @property
    def candidates(self) -> Callable[..., Iterator[Any]] | None:
        return getattr(sys.modules[self.module], self.name.replace("choose", "candidates", 1), None)

    def __str__(self) -> str:
        return f"{self.module.removeprefix('moekern.ops.')}.{self.name}"


def _import(pattern: str) -> list[ModuleType]:
    """Modules of every op."""
    folder = Path(ops.__file__).parent
    names = sorted(f"moekern.ops.{path.parent.name}.{path.stem}" for path in folder.glob(pattern))
    return [importlib.import_module(name) for name in names]


def choosers() -> list[Chooser]:
    found = []
    for module in _import("*/config*.py"):
        for name, value in vars(module).items():
            is_choice = name == "choose" or name.startswith("choose_")
            if is_choice and callable(value) and value.__module__ == module.__name__:
                found.append(Chooser(module.__name__, name))
    return found


@dataclass
class Overrides:
    """What `intercepted` records, and what it answers instead of a `choose`."""

    asked: dict[tuple[Chooser, Arguments], Any] = field(default_factory=dict)
    forced: dict[tuple[Chooser, Arguments], Any] = field(default_factory=dict)

    def proxy(self, chooser: Chooser, original: Callable[..., Any]) -> Callable[..., Any]:
        def choose(*arguments: Any, **named: Any) -> Any:
            key = (chooser, (*arguments, *sorted(named.items())))
            answer = self.forced[key] if key in self.forced else original(*arguments, **named)
            self.asked.setdefault(key, answer)
            return answer

        return choose

    @contextlib.contextmanager
    def force(self, key: tuple[Chooser, Arguments], config: Any) -> Iterator[None]:
        self.forced = {key: config}
        _forget()
        try:
            yield
        finally:
            self.forced = {}
            _forget()


def _modules() -> list[ModuleType]:
    return [m for name, m in list(sys.modules.items()) if name.startswith("moekern.") and m is not None]


def _forget() -> None:
    """Empties the caches that ops keep of what they chose before."""
    for module in _modules():
        for value in list(vars(module).values()):
            clear = getattr(value, "cache_clear", None)
            if callable(clear) and getattr(value, "__module__", "").startswith("moekern.ops."):
                clear()


@contextlib.contextmanager
def intercepted() -> Iterator[Overrides]:
    """Every `choose` of every op replaced, wherever a module has imported it, by one that records and can be told."""
    _import(
        "*/triton*.py"
    )  # ops import theirs at their first call, and one within would keep the replacement
    overrides = Overrides()
    originals = {id(c.choose): (c, c.choose) for c in choosers()}
    replaced: list[tuple[ModuleType, str, Any]] = []
    for module in _modules():
        for name, value in list(vars(module).items()):
            if id(value) in originals:
                chooser, original = originals[id(value)]
                replaced.append((module, name, value))
                setattr(module, name, overrides.proxy(chooser, original))
    _forget()
    try:
        yield overrides
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)
        _forget()


def as_json(value: Any) -> Any:
    """A configuration or an argument of `choose` as plain data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        values = {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **values}  # a `choose` may pick among several classes
    if isinstance(value, (tuple, list)):
        return [as_json(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def to_try(chooser: Chooser, arguments: Arguments, picked: Any) -> list[Any]:
    """The pick, then the candidates, each once."""
    if chooser.candidates is None:
        return [picked]
    return list(dict.fromkeys([picked, *chooser.candidates(*arguments)]))[:MAX_CANDIDATES]


def recorded(
    case: GpuCase, backend: str, arguments: Mapping[str, Any]
) -> dict[tuple[Chooser, Arguments], Any]:
    """What one call of the op chooses: {(function, arguments): pick}."""
    with intercepted() as overrides:
        getattr(ops, case.op)(**arguments, backend=backend)
        return dict(overrides.asked)


def tune_choice(
    case: GpuCase,
    key: tuple[Chooser, Arguments],
    picked: Any,
    sets: Sequence[Mapping[str, Any]],
    backend: str,
) -> dict[str, Any]:
    """Times every candidate of one choice of a case, all else as chosen; a row of the table."""
    spec, public = ops.SPECS[case.op], getattr(ops, case.op)
    chooser, arguments = key

    def call(values: Mapping[str, Any]) -> Any:
        return public(**values, backend=backend)

    expected = gpu_bench.op_results(spec, backend, sets[0])
    failed: dict[Any, str] = {}
    timed: dict[Any, gpu_timing.Timed] = {}
    with intercepted() as overrides:
        for config in to_try(chooser, arguments, picked):
            with overrides.force(key, config):
                try:
                    gpu_bench.check(spec, backend, sets[0], expected)
                    timed[config] = gpu_timing.prepare(call, sets)
                except Exception as error:
                    if "CUDA error" in str(error):
                        raise
                    failed[config] = f"{type(error).__name__}: {error}"[:200]
    names = {str(i): config for i, config in enumerate(timed)}
    look = gpu_timing.interleave({n: timed[c] for n, c in names.items()}, LOOK_ROUNDS_S)
    first = {n: ledger.statistics_of(times)["median_us"] for n, times in look.items()}
    near = [n for n, us in first.items() if us <= NEAR * min(first.values()) or names[n] == picked]
    final = gpu_timing.interleave({n: timed[names[n]] for n in near}, FINAL_S)
    medians = first | {n: ledger.statistics_of(times)["median_us"] for n, times in final.items()}
    best = min(near, key=medians.__getitem__)
    mine = next((medians[n] for n, c in names.items() if c == picked), None)
    tried = [{"config": as_json(c), "median_us": medians[n]} for n, c in names.items()]
    tried += [{"config": as_json(c), "failed": why} for c, why in failed.items()]
    return {
        "op": case.op, "case": case.name, "backend": backend, "choose": str(chooser), "arguments": as_json(arguments),
        "picked": as_json(picked), "picked_us": mine, "best": as_json(names[best]), "best_us": medians[best],
        "source_hash": ledger.hash_for(case.op, backend), "tried": tried,
    }  # fmt: skip


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["op"], row["case"], row["backend"], row["choose"], str(row["arguments"])


def verdict(row: Mapping[str, Any]) -> str | None:
    """What is to be said of a row: a pick that is not within SLACK of the best, or failed."""
    where = f"{row['op']}: {row['case']}: {row['choose']}{tuple(row['arguments'])}"
    if row["picked_us"] is None:
        return f"{where}: the pick {row['picked']} failed"
    ratio = row["picked_us"] / row["best_us"]
    if ratio <= SLACK:
        return None
    changes = {n: v for n, v in row["best"].items() if v != row["picked"].get(n)}
    return f"{where}: {row['picked_us']:.2f} us, {ratio:.2f}x the best, which has {changes}"


def chosen_cases(op: str | None, only: str | None) -> list[GpuCase]:
    """Raises ValueError for an unknown op."""
    if op is not None and op not in ops.SPECS:
        raise ValueError(f"tune: unknown op {op!r}; expected one of {', '.join(ops.SPECS)}")
    cases = [c for c in gpu_bench.chosen(only) if c.method == "graph"]
    return [c for c in cases if op in (None, c.op) and "triton" in ops.SPECS[c.op].backends]


def tune(
    cases: Sequence[GpuCase],
    path: Path,
    budget_s: float,
    progress: Callable[[str], Any] = print,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measures the cases' choices, writing the table after each; a choice that an earlier case measured with the same
    arguments is not repeated."""  # fmt: skip
    table: dict[str, Any] = {"schema": SCHEMA, "runs": {}, "rows": []}
    if path.exists():
        table = ledger.read_json(path, SCHEMA)
    rows = {key_of(row): row for row in table["rows"]}
    run, start, seen = machine.now(), clock(), set()
    table["runs"][run] = {
        "date": run,
        "command": machine.command_line(),
        "versions": machine.versions(),
        "device": machine.device(),
    }
    for case in cases:
        if clock() - start > budget_s:
            break
        source = gpu_inputs.Source(
            torch.Generator(gpu_bench.DEVICE).manual_seed(0),
            torch.device(gpu_bench.DEVICE),
            machine.l2_bytes(),
        )
        sets = gpu_inputs.make(case.op, case.shape, source)
        for key, picked in recorded(case, "triton", sets[0]).items():
            if (case.op, key) in seen or len(to_try(*key, picked)) < 2:
                continue
            seen.add((case.op, key))
            row = tune_choice(case, key, picked, sets, "triton") | {"run": run}
            rows[key_of(row)] = row
            used = {r["run"] for r in rows.values()}
            table["runs"] = {name: value for name, value in table["runs"].items() if name in used}
            table["rows"] = [rows[k] for k in sorted(rows)]
            ledger.write_json(path, table)
            progress(
                verdict(row) or f"{case.op}: {case.name}: {row['choose']}: the pick is within 3% of the best"
            )
        del sets
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", metavar="OP", help="only this op")
    parser.add_argument("--only", metavar="TEXT", help="only the cases whose 'op: name' contains TEXT")
    parser.add_argument(
        "--budget", type=float, default=1e9, metavar="S", help="begin no case after S seconds"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the table (default: bench/results/<gpu>/tune.json)"
    )


def run(options: argparse.Namespace) -> int:
    cases = chosen_cases(options.op, options.only)
    reason = machine.cannot_measure()
    if reason is not None:
        print(f"bench tune: no usable GPU: {reason}", file=sys.stderr)
        return 2
    from tqdm import tqdm

    path = options.out or ledger.RESULTS / ledger.slug(machine.device()["name"]) / "tune.json"
    with torch.no_grad(), tqdm(cases, leave=False, disable=None, unit="case") as bar:
        table = tune(bar, path, options.budget, bar.write)
    slow = [text for row in table["rows"] if (text := verdict(row))]
    print(f"{len(table['rows'])} choices in {path}; {len(slow)} picks not within 3% of the best")
    for text in slow:
        print(f"  {text}")
    return 0
