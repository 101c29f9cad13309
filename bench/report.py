"""docs/performance.md from the files in bench/results: CPU ratios, and the ledger of every GPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import ledger, report_gpu

ROOT = Path(__file__).parent.parent

HEAD = """# Performance

Written by `python -m bench report` from the files in bench/results; do not edit.

## CPU

Each ratio is the time of the fastest of transformers' own backends over moekern's, in the same run, in turns, on the
same weights; beside it stands the ratio to what transformers uses by default. DeepSeek-V2-Lite's layer shapes, random
bfloat16 data that is not in the cache. Three layers, one of them dense, with the real vocabulary. `python -m bench cpu`
measures it anew.
"""


def section(name: str, found: dict[str, Any]) -> str:
    """One machine's table, in Markdown."""
    machine, versions = found["environment"]["machine"], found["environment"]["versions"]
    usable = ", ".join(feature for feature, has in (machine["features"] or {}).items() if has)
    lines = [
        f"### {name}",
        "",
        f"{machine['processor']}, {found['threads']} threads, kernels run with {machine['isa']} ({usable}); "
        f"moekern {found['environment']['moekern']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}.",
        "",
        "| case | moekern | transformers' best | ratio | at least | aim | to its default | its best backend |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in found["rows"]:
        theirs, ours = row["contenders"][row["best"]], row["contenders"]["moekern"]
        lines.append(
            f"| {row['case']} | {ours['median_ms']:.4g} ms | {theirs['median_ms']:.4g} ms | {row['ratio']:.2f}x "
            f"| {row['at_least']:g}x | {row['aim']:g}x | {row['ratio_to_default']:.2f}x | {row['best']} |"
        )
    return "\n".join(lines) + "\n"


def render(results: Path) -> str:
    """The whole page.

    Raises ValueError when there is no result, or when one is a smoke test's.
    """
    sections = []
    for path in sorted(results.glob("*/cpu.json")):
        found = json.loads(path.read_text())
        if found["quick"]:
            raise ValueError(f"{path} is of a --quick run, whose numbers mean nothing")
        sections.append(section(path.parent.name, found))
    if not sections:
        raise ValueError(f"no */cpu.json in {results}; write one with python -m bench cpu --json")
    return "\n".join([HEAD, *sections, report_gpu.render(ledger.ledgers(results))])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=ledger.RESULTS, metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md", metavar="FILE")
    parser.add_argument(
        "--merge", type=Path, metavar="FILE", action="append", default=[],
        help="first merge a run's gpu.json into bench/results (may be given more than once)",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="write nothing; exit status 1 when FILE is not current, or a default choice on a GPU rests on a row that is "
        "missing or stale",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    if options.check and options.merge:
        raise ValueError("report: --check writes nothing; run --merge without it")
    for path in options.merge:
        print(f"merged into {ledger.merge_file(path, options.results)}")
    page = render(options.results)
    found = ledger.ledgers(options.results)
    if not options.check:
        options.out.write_text(page)
        report_gpu.plot(found, options.out.parent)
        return 0
    problems = ledger.unproven_defaults(found)
    if not options.out.exists() or options.out.read_text() != page:
        problems.append(f"{options.out} is not what bench/results says; run python -m bench report")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0
