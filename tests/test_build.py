"""The build's promises: what happens without a compiler, without torch's headers, and what a source archive holds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what an install reads, without build products."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for name in ("moekern", "csrc", "cmake"):
        if (ROOT / name).exists():
            ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


def setup_py(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("moekern_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_compiler_the_install_is_python_only_and_says_why(tree: Path, tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    done = setup_py(tree, "build", "--build-lib", str(tmp_path / "lib"), PATH=str(empty), CXX="")
    assert done.returncode == 0, done.stderr
    note = json.loads((tmp_path / "lib/moekern/_build.json").read_text())
    assert note["built"] is False
    assert "no C++ compiler" in note["reason"]
    assert not list((tmp_path / "lib/moekern").glob("*.so"))

    # That install works: the ops run on PyTorch and say why the CPU backend is missing.
    code = (
        "import torch, moekern\n"
        "weights, ids = moekern.ops.gate_topk(torch.randn(3, 8), 2)\n"
        "assert ids.shape == (3, 2)\n"
        "print(moekern.backends('gate_topk')['cpu'])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "lib")}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "no C++ compiler" in ran.stdout


def test_require_native_makes_a_missing_compiler_an_error(tree: Path, tmp_path: Path) -> None:
    done = setup_py(tree, "build_ext", PATH=str(tmp_path), CXX="", MOEKERN_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "install g++" in done.stderr


def test_a_compiler_without_torch_headers_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from setuptools import Distribution

    module = load_setup()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(module, "compiler", lambda: "g++")
    with pytest.raises(SystemExit, match="--no-build-isolation"):
        module.BuildNative(Distribution()).run()


def test_source_archive_holds_the_native_sources(tree: Path, tmp_path: Path) -> None:
    done = setup_py(tree, "-q", "sdist", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    tracked = {str(p.relative_to(tree)) for p in (tree / "csrc").rglob("*") if p.is_file()}
    assert tracked | {"CMakeLists.txt", "setup.py", "LICENSE"} <= names
