"""The native library: a foreign, broken or other version is refused with a reason; instruction sets can be chosen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ISAS, cpu_isa, variants

from moekern import _native

EXPECTED = {"_a_cpu": "Tensor,int", "_b_cpu": "Tensor?,float"}


def test_the_same_leaves_match() -> None:
    assert _native.mismatch(EXPECTED, EXPECTED) is None


def test_a_leaf_that_is_not_built_is_no_mismatch() -> None:
    assert _native.mismatch({"_a_cpu": "Tensor,int"}, EXPECTED) is None


def test_other_argument_types_are_a_mismatch() -> None:
    reason = _native.mismatch({"_a_cpu": "Tensor,float"}, EXPECTED)
    assert reason == "its _a_cpu takes (Tensor,float) where this version of moekern passes (Tensor,int)"


def test_an_unknown_leaf_is_a_mismatch() -> None:
    reason = _native.mismatch({"_c_cpu": "Tensor"}, EXPECTED)
    assert reason == "it exports _c_cpu, which this version of moekern does not know"


def build(path: Path, source: str) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    code = path.with_suffix(".cpp")
    code.write_text(source)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(path), str(code)], check=True)
    return path


def exporting(leaves: str) -> str:
    return f'extern "C" const char* moekern_leaf_signatures() {{ return "{leaves}"; }}'


def reason_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.setattr(_native, "LIBRARY_PATH", path)
    leaves, reason = _native.load.__wrapped__()
    assert leaves == frozenset()
    return reason


def test_a_library_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = build(tmp_path / "other.so", exporting("_gate_topk_cpu|Tensor,int\\n"))
    reason = reason_for(other, monkeypatch)
    assert reason is not None
    assert reason.startswith(
        "the native library is of another version: its _gate_topk_cpu takes (Tensor,int) where this version of "
        "moekern passes (Tensor,Tensor?,"
    )
    assert "rebuild it with" in reason


def test_a_library_with_a_leaf_of_the_future_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = reason_for(build(tmp_path / "future.so", exporting("_warp_drive_cpu|Tensor\\n")), monkeypatch)
    assert reason is not None
    assert "it exports _warp_drive_cpu, which this version of moekern does not know" in reason


def test_a_library_that_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = reason_for(build(tmp_path / "foreign.so", "int nothing;"), monkeypatch)
    assert reason is not None
    assert "the native library does not load (foreign.so is not a moekern library)" in reason


def test_a_file_that_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF but not really")
    reason = reason_for(broken, monkeypatch)
    assert reason is not None
    assert "the native library does not load" in reason


def test_no_library_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = reason_for(tmp_path / "absent.so", monkeypatch)
    assert reason is not None
    assert reason.startswith("the native library was not built; rebuild it with")


def test_a_library_that_was_built_loads() -> None:
    """Every other test would fall back to ref in silence."""
    if not _native.LIBRARY_PATH.exists():
        if os.environ.get("MOEKERN_REQUIRE_NATIVE") == "1":
            pytest.fail("MOEKERN_REQUIRE_NATIVE=1 and the native library was not built")
        pytest.skip("the native library was not built")
    leaves, reason = _native.load()
    assert reason is None
    assert "_gate_topk_cpu" in leaves
    assert "cpu-portable" in variants()


def test_without_a_library_ops_run_and_say_why(tmp_path: Path) -> None:
    code = (
        "import pathlib, torch, moekern; from moekern import _native;"
        f"_native.LIBRARY_PATH = pathlib.Path({str(tmp_path / 'absent.so')!r});"
        "print(moekern.backends('gate_topk')['cpu']);"
        "print(moekern.ops.gate_topk(torch.tensor([[1., 3., 2.]]), 2)[1].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    reason, ids = done.stdout.splitlines()
    assert "the native library was not built" in reason
    assert ids == "[[1, 2]]"


def test_instruction_sets_are_switched() -> None:
    with cpu_isa(None) as best:
        if best is None:
            pytest.skip("no native library")
    assert best in ISAS
    for variant in variants():
        if variant.startswith("cpu-"):
            with cpu_isa(variant.removeprefix("cpu-")) as used:
                assert used == variant.removeprefix("cpu-")
    with cpu_isa("z80") as used:
        assert used is None
    with cpu_isa(None) as again:
        assert again == best


def test_an_unknown_instruction_set_is_an_error_at_the_call() -> None:
    if "cpu-portable" not in variants():
        pytest.skip("no native library")
    code = "import torch, moekern; moekern.ops.gate_topk(torch.randn(2, 4), 1, backend='cpu')"
    environment = {**os.environ, "MOEKERN_CPU_ISA": "z80"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 1, done.stderr  # raised, not aborted
