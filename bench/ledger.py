"""The ledger: bench/results/<gpu>/gpu.json, one row per (op, case, backend), each with the hash of the sources it was
measured on and the run (machine, versions, ceilings) it comes from. A row whose hash is no longer the source's is stale.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import sources
from bench.gpu_cases import GpuCase

ROOT = sources.ROOT
RESULTS = ROOT / "bench" / "results"
SCHEMA = 2
GPU_BACKENDS = ("triton", "cuda")
Key = tuple[str, str, str]  # op, case, backend
Ledger = dict[str, Any]


def empty() -> Ledger:
    return {"schema": SCHEMA, "runs": {}, "rows": []}


def read_json(path: Path, schema: int) -> dict[str, Any]:
    """Raises ValueError for a file of another schema."""
    found = json.loads(path.read_text())
    if found.get("schema") != schema:
        raise ValueError(f"{path}: schema {found.get('schema')!r}; expected {schema}")
    return found


def load(path: Path) -> Ledger:
    """An absent file is an empty ledger."""
    return read_json(path, SCHEMA) if path.exists() else empty()


def key_of(row: Mapping[str, Any]) -> Key:
    return row["op"], row["case"], row["backend"]


def slug(device: str) -> str:
    """The folder of a GPU: "NVIDIA GeForce RTX 4090" -> "rtx-4090"."""
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return re.sub(r"^(nvidia-)?(geforce-|tesla-)?", "", words) or "gpu"


def hash_for(op: str, backend: str) -> str | None:
    """Of the sources as they are now."""
    return sources.model_hash() if op == "model" else sources.source_hash(op, backend)


def backends_of(op: str) -> tuple[str, ...]:
    """The GPU backends that an op has rows for; an end-to-end case has the patched model."""
    if op == "model":
        return ("moekern",)
    from moekern.ops import SPECS

    return tuple(b for b in GPU_BACKENDS if b in SPECS[op].backends)


def wanted(cases: Iterable[GpuCase]) -> list[Key]:
    return [(c.op, c.name, backend) for c in cases for backend in backends_of(c.op)]


def states(
    keys: Iterable[Key], ledger: Ledger, hash_for: Callable[[str, str], str | None] = hash_for
) -> dict[Key, str]:
    """measured, stale or missing, for each key."""
    rows = {key_of(row): row for row in ledger["rows"]}

    def state(key: Key) -> str:
        row = rows.get(key)
        if row is None:
            return "missing"
        return "measured" if row["source_hash"] == hash_for(key[0], key[2]) else "stale"

    return {key: state(key) for key in keys}


def in_order(cases: Sequence[GpuCase], found: Mapping[Key, str], dates: Mapping[Key, str]) -> list[GpuCase]:
    """Cases with a missing row first, then those with a stale one, then the rest, the longest unmeasured first; within a
    kind in the table's order."""
    rank = {"missing": 0, "stale": 1, "measured": 2}

    def urgency(case: GpuCase) -> tuple[int, str]:
        keys = wanted([case])
        worst = min((rank[found[k]] for k in keys), default=2)
        return worst, min((dates.get(k, "") for k in keys), default="") if worst == 2 else ""

    return sorted((c for c in cases if wanted([c])), key=urgency)


def dates_of(ledger: Ledger) -> dict[Key, str]:
    return {key_of(row): ledger["runs"][row["run"]]["date"] for row in ledger["rows"]}


def merge(old: Ledger, new: Ledger) -> Ledger:
    """The rows of both; where both have one, the new one's. Runs that no row comes from any more go."""
    rows = {key_of(row): row for row in old["rows"]} | {key_of(row): row for row in new["rows"]}
    runs = {**old["runs"], **new["runs"]}
    used = {row["run"] for row in rows.values()}
    return {
        "schema": SCHEMA,
        "runs": {name: runs[name] for name in sorted(used)},
        "rows": [rows[key] for key in sorted(rows)],
    }


def merge_file(path: Path, results: Path = RESULTS) -> Path:
    """Merges a run's file into the committed one of its GPU; returns that one's path.

    Raises ValueError for a file without rows, or of several GPUs.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    new = load(path)
    if not new["rows"]:
        raise ValueError(f"{path} has no rows")
    names = {run["device"]["name"] for run in new["runs"].values()}
    if len(names) != 1:
        raise ValueError(f"{path} must be of one GPU; got {', '.join(sorted(names))}")
    target = results / slug(names.pop()) / "gpu.json"
    write_json(target, merge(load(target), new))
    return target


def ledgers(results: Path = RESULTS) -> dict[str, Ledger]:
    """By GPU."""
    return {path.parent.name: load(path) for path in sorted(results.glob("*/gpu.json"))}


def statistics_of(microseconds: Sequence[float]) -> dict[str, float | int]:
    """Median, 10th and 90th percentile (nearest rank), and the number of samples."""
    if not microseconds:
        raise ValueError("no samples")
    ordered = sorted(microseconds)
    last = len(ordered) - 1
    middle = (ordered[last // 2] + ordered[(last + 1) // 2]) / 2
    return {
        "median_us": middle,
        "p10_us": ordered[round(0.1 * last)],
        "p90_us": ordered[round(0.9 * last)],
        "samples": len(ordered),
    }


CEILINGS = {"gemm": "gemm_tflops", "read": "read_gbytes_per_s", "copy": "copy_gbytes_per_s"}


def rates_of(
    median_us: float, flops: float, moved: float, ceiling: str, ceilings: Mapping[str, float]
) -> dict[str, Any]:
    """What a time amounts to, and its share of the ceiling named."""
    rates = {"tflops": flops / median_us / 1e6, "gbytes_per_s": moved / median_us / 1e3}
    rate = rates["tflops"] if ceiling == "gemm" else rates["gbytes_per_s"]
    return {**rates, "ceiling": ceiling, "percent_of_ceiling": 100 * rate / ceilings[CEILINGS[ceiling]]}


def value_of(
    quantity: str, row: Mapping[str, Any], ledger: Ledger, reference: str | None = None
) -> float | None:
    """A row in the quantity of a goal; None where it cannot be told (a ratio without the row it refers to)."""
    seconds = row["median_us"] / 1e6
    if quantity in ("us", "host_us"):
        return row["median_us"]
    if quantity == "tflops":
        return row["flops"] / seconds / 1e12
    if quantity == "read_tbps":
        return row["bytes"] / seconds / 1e12
    if quantity in ("read_share", "copy_share"):
        ceilings = ledger["runs"][row["run"]]["ceilings"]
        ceiling = ceilings[CEILINGS[quantity.removesuffix("_share")]]
        return row["bytes"] / seconds / 1e9 / ceiling
    if quantity == "ratio":
        others = (r for r in ledger["rows"] if key_of(r) == (row["op"], reference, row["backend"]))
        return next((row["median_us"] / other["median_us"] for other in others), None)
    if quantity == "speedup":
        times = [p["median_us"] for p in row["peers"].values() if "median_us" in p]
        return min(times) / row["median_us"] if times else None
    raise ValueError(f"value_of: unknown quantity {quantity!r}")


def unproven_defaults(found: Mapping[str, Ledger]) -> list[str]:
    """Default choices on a GPU that rest on no current row. Triton is the default without one; a CUDA C++ kernel becomes it
    only through rows that show it right and fastest, and stays it only as long as they are current."""
    from moekern import _op
    from moekern.ops import SPECS

    problems = []
    for op, spec in SPECS.items():
        if "cuda" not in spec.backends or not _cuda_first(spec, _op.default_order("cuda")):
            continue
        keys = [key for key in wanted(_cases_of(op)) if key[2] == "cuda"]
        for gpu, ledger in found.items():
            problems += [
                f"{op}: the default on a GPU is the CUDA kernel, but {gpu} has its row {key[1]!r} {state}"
                for key, state in states(keys, ledger).items()
                if state != "measured"
            ]
        if not found:
            problems.append(f"{op}: the default on a GPU is the CUDA kernel, but no GPU has a row")
    return problems


def _cases_of(op: str) -> list[GpuCase]:
    from bench.gpu_cases import CASES

    return [case for case in CASES if case.op == op]


def _cuda_first(spec: Any, order: Sequence[str]) -> bool:
    """Whether the CUDA kernel may come before Triton; a `choose` of the op's own may put it there for some arguments."""
    if spec.choose is not None:
        return True
    return "cuda" in order and ("triton" not in order or order.index("cuda") < order.index("triton"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all: a run that is killed leaves no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)
