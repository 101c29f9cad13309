"""Metadata lives in pyproject.toml; this file only hands the native build to CMake.

Environment: MOEKERN_CUDA=AUTO|ON|OFF, TORCH_CUDA_ARCH_LIST, MAX_JOBS, MOEKERN_REQUIRE_NATIVE=1 (a missing compiler is an
error instead of a Python-only install).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_dir() -> Path | None:
    """The torch package of the environment we install into, without importing it.

    Under pip's build isolation `import torch` fails, but pip leaves sysconfig's platlib pointing at the real
    environment. Other front ends (uv, build) do not.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places.append(Path(sysconfig.get_path("platlib")) / "torch")
    return next((p for p in places if (p / "include/torch/csrc/stable/library.h").exists()), None)


def pybind11_include(torch: Path) -> Path:
    """pybind11's headers; torch ships a copy, which serves where the package is not installed."""
    spec = importlib.util.find_spec("pybind11")
    return Path(spec.origin).parent / "include" if spec and spec.origin else torch / "include"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


class BuildNative(build_ext):
    def run(self) -> None:
        required = os.environ.get("MOEKERN_REQUIRE_NATIVE") == "1"
        found, cxx = torch_dir(), compiler()
        if cxx is None:
            if required:
                raise SystemExit("moekern: no C++ compiler found (install g++, or set CXX)")
            return self._record(None, "no C++ compiler was found when moekern was installed")
        if found is None:
            raise SystemExit(
                "moekern: torch >= 2.10 and its headers were not found. Install torch first, then build against it:\n"
                "    pip install --no-build-isolation ."
            )
        out = ROOT / "moekern" if self.inplace else Path(self.build_lib) / "moekern"
        self._cmake(found, out.resolve())
        self._record(found, None)
        return None

    def _cmake(self, torch: Path, out: Path) -> None:
        build = (ROOT / "build" / f"cmake-{sys.implementation.cache_tag}").resolve()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DMOEKERN_TORCH_DIR={torch}", f"-DMOEKERN_OUTPUT_DIR={out}",
            f"-DMOEKERN_CUDA={os.environ.get('MOEKERN_CUDA', 'AUTO')}",
            f"-DMOEKERN_CUDA_ARCHS={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DMOEKERN_PYBIND11_INCLUDE={pybind11_include(torch)}",
        ]  # fmt: skip
        ninja = shutil.which("ninja")
        if ninja:  # named each time: an isolated build's ninja is gone by the next build
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        out.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)

    def _record(self, torch: Path | None, reason: str | None) -> None:
        """Leaves a note of what was built for `moekern info`."""
        out = ROOT / "moekern" if self.inplace else Path(self.build_lib) / "moekern"
        out.mkdir(parents=True, exist_ok=True)
        note = {"built": torch is not None, "reason": reason}
        cache = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "moekern_build.json"
        if torch is not None and cache.exists():
            note |= json.loads(cache.read_text())
        (out / "_build.json").write_text(json.dumps(note, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        return []


if __name__ == "__main__":
    setup(ext_modules=[Extension("moekern._C", sources=[])], cmdclass={"build_ext": BuildNative})
