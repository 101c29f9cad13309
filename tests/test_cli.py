"""`python -m moekern`: info and the way to the benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moekern
from moekern import _info, _native
from moekern.__main__ import main

ROOT = Path(__file__).parent.parent


def test_info_as_json_is_what_info_returns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    shown, known = json.loads(capsys.readouterr().out), moekern.info()
    assert shown["moekern"] == moekern.__version__
    assert shown["versions"]["torch"] == torch.__version__
    assert shown["backends"] == known["backends"]
    for op, found in shown["backends"].items():
        assert found == moekern.backends(op)
        assert found["ref"] is None


def test_info_as_text_tells_features_memory_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for part in (
        moekern.__version__,
        f"torch {torch.__version__}",
        "gate_topk",
        "GPU",
        "not built or not usable",
    ):
        assert part in shown
    if _info.machine()["features"] is not None:
        assert "can be allocated" in shown
        assert "kernels run with" in shown


def test_info_says_why_native_code_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the native library is of another version"
    monkeypatch.setattr(_native, "load", lambda: (frozenset(), reason))
    assert reason in _info.missing()
    monkeypatch.setattr(_native, "load", lambda: (frozenset({"_gate_topk_cpu"}), None))
    monkeypatch.setattr(
        _native, "build_note", lambda: {"built": True, "reason": None, "cuda": "MOEKERN_CUDA=OFF"}
    )
    assert "CUDA kernels: not built (MOEKERN_CUDA=OFF)" in _info.missing()


def test_info_without_the_runtime_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moekern._runtime", None)
    found = _info.machine()
    assert found["features"] is None
    assert "the runtime module is not there" in found["reason"]
    assert "the runtime module is not there" in _info.text({**moekern.info(), "machine": found})


def test_info_reports_an_instruction_set_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("moekern._runtime")
    monkeypatch.setenv("MOEKERN_CPU_ISA", "sse9")
    assert "unknown instruction set 'sse9'" in _info.machine()["reason"]


def test_bench_runs_the_checkouts_benchmarks() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "moekern", "bench", "cpu", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--quick" in result.stdout


def test_unknown_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err
