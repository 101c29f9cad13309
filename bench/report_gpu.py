"""The GPU part of docs/performance.md, from the ledgers: every case of the table, measured, stale or missing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import ledger
from bench.gpu_cases import CASES, Goal, GpuCase, reaches, value_of
from bench.ledger import Ledger

HEAD = """## GPU

`make gpu-check OUT=dir` measures these on a machine with a GPU, within ten minutes, and `python -m bench report --merge
dir/gpu.json` brings the rows here; `python -m bench e2e --out dir` does the same for whole models. Random bfloat16 data in
as many sets as four times the L2 holds; calls are timed in a CUDA graph, peers in turns with them; bytes count the experts
that the ids name. "At least" and "aim" are what a row has to reach on an H100. A row is stale when a source of its kernel
has changed since.
"""

NOTHING = """**Unmeasured: no GPU has run these cases yet.** The GPU kernels are checked in Triton's interpreter and compiled ahead of time
for every architecture; nothing is claimed of their speed.
"""


def _goal(goal: Goal | None) -> str:
    return "" if goal is None else value_of(goal)


def _row_of(case: GpuCase, backend: str, found: Ledger) -> Mapping[str, Any] | None:
    key = (case.op, case.name, backend)
    return next((row for row in found["rows"] if ledger.key_of(row) == key), None)


def unmeasured() -> str:
    lines = [HEAD, NOTHING, "| op | case | at least | aim | state |", "|---|---|---:|---:|---|"]
    lines += [f"| {c.op} | {c.name} | {_goal(c.at_least)} | {_goal(c.aim)} | not measured |" for c in CASES]
    return "\n".join(lines) + "\n"


def best_peer(row: Mapping[str, Any]) -> tuple[str, float] | None:
    """The fastest of the peers timed beside a row: its name and how many times as long it took."""
    times = {name: p["median_us"] for name, p in row["peers"].items() if "median_us" in p}
    if not times:
        return None
    name = min(times, key=times.__getitem__)
    return name, times[name] / row["median_us"]


def cells(case: GpuCase, backend: str, state: str, found: Ledger) -> list[str]:
    """One line of a GPU's table."""
    head = [case.op, case.name, backend]
    row = _row_of(case, backend, found)
    if row is None:
        return [*head, "", "", "", _goal(case.at_least), _goal(case.aim), "", state]
    reached = []
    for goal in (case.at_least, case.aim):
        value = None if goal is None else ledger.value_of(goal[0], row, found, case.reference)
        if goal is None or value is None:
            reached.append(_goal(goal))
        else:
            mark = "reached" if reaches(goal, value) else "not reached"
            reached.append(f"{value_of(goal)} ({mark}: {value_of((goal[0], value))})")
    peer = best_peer(row)
    share = f"{row['percent_of_ceiling']:.0f}% of {row['ceiling']}" if "ceiling" in row else ""
    empty = f", empty node {row['empty_node_us']:.2f}" if "empty_node_us" in row else ""
    return [
        *head, f"{row['median_us']:.4g}{empty}", f"{row['p10_us']:.4g} to {row['p90_us']:.4g}", share, *reached,
        "" if peer is None else f"{peer[1]:.2f}x {peer[0]}", state,
    ]  # fmt: skip


def section(name: str, found: Ledger) -> str:
    """A GPU's table: every wanted row, whatever its state."""
    newest = max(found["runs"].values(), key=lambda run: run["date"])
    device, versions, ceilings = newest["device"], newest["versions"], newest["ceilings"]
    states = ledger.states(ledger.wanted(CASES), found)
    counts = {s: sum(v == s for v in states.values()) for s in ("measured", "stale", "missing")}
    lines = [
        f"### {name}",
        "",
        f"{device['name']}, {device['sms']} SMs, torch {versions['torch']}, Triton {versions['triton']}, "
        f"{newest['date'][:10]}. Ceilings of the last run: bf16 GEMM {ceilings['gemm_tflops']:.0f} TFLOP/s, read "
        f"{ceilings['read_gbytes_per_s'] / 1e3:.2f} TB/s, copy {ceilings['copy_gbytes_per_s'] / 1e3:.2f} TB/s, empty graph "
        f"node {ceilings['empty_node_us']:.2f} us. {counts['measured']} rows measured, {counts['stale']} stale, "
        f"{counts['missing']} missing.",
        "",
        f"![{name}: share of the ceiling]({plot_name(name)})",
        "",
        "| op | case | backend | us, median | p10 to p90 | share | at least | aim | best peer's time | state |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for case in CASES:
        for backend in ledger.backends_of(case.op):
            state = states[(case.op, case.name, backend)]
            lines.append("| " + " | ".join(cells(case, backend, state, found)) + " |")
    return "\n".join(lines) + "\n"


def render(found: Mapping[str, Ledger]) -> str:
    if not found:
        return unmeasured()
    return "\n".join([HEAD, *(section(name, one) for name, one in found.items())])


def plot_name(gpu: str) -> str:
    """Beside the page."""
    return f"plots/{gpu}.svg"


def plot(found: Mapping[str, Ledger], folder: Path) -> list[Path]:
    """One figure a GPU: how near every row comes to its ceiling, ours and the best peer's. Only from rows."""
    if not found:
        return []
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (pip install moekern[bench])", file=sys.stderr)
        return []
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "moekern"  # the same rows give the same file
    from matplotlib import pyplot

    written = []
    for name, one in found.items():
        rows = [row for row in one["rows"] if "percent_of_ceiling" in row]
        if not rows:
            continue
        labels = [f"{r['op']}: {r['case']} ({r['backend']})" for r in rows]
        ours = [r["percent_of_ceiling"] for r in rows]
        peers = [best_peer(r) for r in rows]
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(rows)))
        places = range(len(rows))
        axes.barh(places, ours, label="moekern", color="#4477aa")
        shown = [(i, ours[i] / p[1]) for i, p in enumerate(peers) if p is not None]
        axes.plot([v for _, v in shown], [i for i, _ in shown], "o", color="#cc6677", label="best peer")
        axes.set_yticks(list(places), labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("% of the measured ceiling (GEMM, read or copy)")
        axes.set_xlim(0, 105)
        axes.legend()
        path = folder / plot_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
        written.append(path)
    return written
