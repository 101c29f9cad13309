"""The `moekern` command: info, demo, bench."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def run_info(options: argparse.Namespace) -> int:
    from moekern import _info

    found = _info.collect()
    print(json.dumps(found, indent=2) if options.json else _info.text(found))
    return 0


def run_demo(options: argparse.Namespace) -> int:
    from moekern import demo

    return demo.run(options)


def run_bench(arguments: Sequence[str]) -> int:
    root = Path(__file__).parent.parent
    if not (root / "bench" / "__main__.py").exists():
        print(
            "moekern bench: the benchmarks are in a checkout of the repository, not in the package",
            file=sys.stderr,
        )
        return 1
    sys.path.insert(0, str(root))
    sys.argv = ["python -m bench", *arguments]
    runpy.run_module("bench", run_name="__main__", alter_sys=True)
    return 0


def make_parser() -> argparse.ArgumentParser:
    from moekern import __version__, demo

    parser = argparse.ArgumentParser(
        prog="moekern", description="Fast Mixture-of-Experts and latent attention."
    )
    parser.add_argument("--version", action="version", version=f"moekern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, backends and why one is missing, CPU, memory, GPU")
    info.add_argument("--json", action="store_true")
    info.set_defaults(run=run_info)
    shown = commands.add_parser("demo", help="one model before and after moekern.patch, in one table")
    demo.add_arguments(shown)
    shown.set_defaults(run=run_demo)
    commands.add_parser(
        "bench", help="the benchmarks (in a checkout); see python -m bench --help", add_help=False
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["bench"]:  # its options are its own
            return run_bench(given[1:])
        options = make_parser().parse_args(given)
        return int(options.run(options))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
