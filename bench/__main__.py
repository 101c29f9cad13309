"""`python -m bench cpu|ops|gpu|e2e|tune|report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def run_ops(options: argparse.Namespace) -> int:
    import pytest

    selection = ["-k", options.only] if options.only else []
    saved = ["--benchmark-json", str(options.json)] if options.json else []
    return int(pytest.main([str(Path(__file__).with_name("bench_ops.py")), "-q", *selection, *saved]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark; returns its exit status."""
    from bench import cpu, e2e, gpu_bench, report, tune

    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of moekern.")
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("cpu", help="moekern against transformers' own backends on this CPU")
    cpu.add_arguments(whole)
    whole.set_defaults(run=cpu.run)
    single = commands.add_parser("ops", help="every op and backend by itself (pytest-benchmark)")
    single.add_argument(
        "--json", type=Path, metavar="FILE", help="also write pytest-benchmark's JSON to FILE"
    )
    single.add_argument("--only", metavar="TEXT", help="only the cases whose id contains TEXT")
    single.set_defaults(run=run_ops)
    rows = commands.add_parser("gpu", help="every GPU case within a budget, missing and stale rows first")
    gpu_bench.add_arguments(rows)
    rows.set_defaults(run=gpu_bench.run)
    model = commands.add_parser(
        "e2e", help="a whole model's decode step on a GPU, patched against transformers"
    )
    e2e.add_arguments(model)
    model.set_defaults(run=e2e.run)
    tuned = commands.add_parser("tune", help="times launch configurations around those that are chosen")
    tune.add_arguments(tuned)
    tuned.set_defaults(run=tune.run)
    written = commands.add_parser("report", help="docs/performance.md from bench/results")
    report.add_arguments(written)
    written.set_defaults(run=report.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
