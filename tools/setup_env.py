"""Sets up .venv for a checkout: the interpreter's packages and the native build. Standard library only.

usage: python3 tools/setup_env.py [--torch REQUIREMENT] [--torch-index URL]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"

# Triton 3.6 is what torch 2.11 pins and what the static gate is calibrated on; its interpreter raises a TypeError in
# runtime-bounded range() with numpy >= 2.4 (triton issue 9171). Torch's CPU builds do not depend on Triton: its own
# dependencies stay out so that they cannot replace torch.
TRITON = "triton==3.6.0"
NUMPY = "numpy>=1.26,<2.4"
# The release whose model families the suite enumerates; moekern itself takes any from 5.17 on.
TRANSFORMERS = "transformers==5.23.0"


def missing() -> list[str]:
    """What this machine lacks, each with the command that installs it on Debian and Ubuntu."""
    found = []
    if sys.version_info < (3, 10):  # noqa: UP036  an older python3 may well run this file
        found.append(
            f"Python 3.10 or newer (this is {platform.python_version()}): make PYTHON=python3.12 ..."
        )
    for module in ("venv", "ensurepip"):
        try:
            __import__(module)
        except ImportError:
            found.append("the venv module: apt-get install python3-venv")
            break
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        found.append("Python.h: apt-get install python3-dev")
    if not shutil.which(os.environ.get("CXX") or "g++"):
        found.append("a C++ compiler: apt-get install g++")
    return found


def stamp_of(arguments: argparse.Namespace) -> str:
    inputs = [(ROOT / "pyproject.toml").read_text(), Path(__file__).read_text(), platform.python_version()]
    return hashlib.sha256("\0".join([*inputs, arguments.torch, arguments.torch_index]).encode()).hexdigest()


def pip(*arguments: str) -> None:
    command = [
        str(VENV / "bin/python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-q",
        *arguments,
    ]
    print("  pip install", *arguments, flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="torch==2.13.0")
    parser.add_argument("--torch-index", default="")
    arguments = parser.parse_args()

    lacking = missing()
    if lacking:
        raise SystemExit("moekern cannot be set up here; missing:\n  " + "\n  ".join(lacking))
    stamp, done = stamp_of(arguments), VENV / ".moekern-stamp"
    if done.exists() and done.read_text() == stamp:
        return
    print("Setting up .venv (once; about two minutes)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    index = ["--index-url", arguments.torch_index] if arguments.torch_index else []
    pip(*index, arguments.torch, NUMPY)
    if platform.machine() in ("x86_64", "aarch64"):
        pip("--no-deps", TRITON)
    pip("setuptools>=77", "wheel", "cmake>=3.22,<5", "ninja>=1.11", "pybind11>=2.13,<4")
    pip(NUMPY, TRANSFORMERS, "--no-build-isolation", "-e", ".[hf,dev]")
    done.write_text(stamp)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
