"""The benchmarks' own code: interleaving, and a smoke test of every row."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("bench", reason="the benchmarks are in a checkout")

from bench import cpu
from bench.__main__ import main
from bench.timing import Contender, interleave


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """What --threads sets is the process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_contenders_take_turns_on_data_of_their_own() -> None:
    calls: list[tuple[str, int]] = []
    placed: list[int] = []

    def contender(name: str) -> Contender:
        return Contender(lambda i: calls.append((name, i)), placed.append, group=name)

    found = interleave({name: contender(name) for name in "abc"}, budget_s=0.0, min_rounds=4)
    assert [name for name, _ in calls] == list("abc" + "abc" + "bca" + "cab" + "abc")
    assert [index for _, index in calls] == placed == list(range(15))
    assert all(len(timing.seconds) == 4 for timing in found.values())


def test_a_hopeless_contender_is_not_measured_again() -> None:
    def contender(seconds: float, group: str) -> Contender:
        return Contender(lambda _: time.sleep(seconds), group=group)

    contenders = {
        "hopeless": contender(0.1, "x"), "slow": contender(0.04, "x"), "fast": contender(0.02, "x"),
        "other": contender(0.1, "y"),
    }  # fmt: skip
    found = interleave(contenders, budget_s=0.0, min_rounds=4, warm_up=False)
    calls = {name: len(timing.seconds) for name, timing in found.items()}
    assert calls == {"hopeless": 1, "slow": 2, "fast": 4, "other": 4}
    summary = found["fast"].summary()
    assert 20 <= summary["min_ms"] <= summary["p10_ms"] <= summary["median_ms"] <= summary["p90_ms"]


def test_every_row_of_the_cpu_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out" / "cpu.json"
    assert main(["cpu", "--quick", "--threads", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [row["case"] for row in found["rows"]] == [
        "decode, 3-layer model, 32 cached", "decode, 3-layer model, 16 cached", "decode, 3-layer model, 8 cached",
        "prefill of 48, 3-layer model", "fused_experts, 1 token", "fused_experts, 4 tokens",
        "fused_experts, 16 tokens", "mla_decode, 4 heads, 32 cached",
    ]  # fmt: skip
    for row in found["rows"]:
        theirs = {name: times["median_ms"] for name, times in row["contenders"].items() if name != "moekern"}
        assert row["best"] == min(theirs, key=theirs.__getitem__)
        assert row["ratio"] == pytest.approx(theirs[row["best"]] / row["contenders"]["moekern"]["median_ms"])
        ours = row["contenders"]["moekern"]["median_ms"]
        assert row["ratio_to_default"] == pytest.approx(theirs[row["default"]] / ours)
        assert row["default"] in ("sdpa + grouped_mm", "grouped_mm", "sdpa")
    assert "features" in found["environment"]["machine"]
    shown = capsys.readouterr().out
    assert all(row["case"] in shown for row in found["rows"])
    assert "features: " in shown


def test_rows_compare_the_same_work() -> None:
    """Every contender of a row returns the same numbers. The 3 layers amplify bf16 rounding to some percent; other data
    would differ by more than 100."""
    lab = cpu.Lab(cpu.QUICK)
    for row in lab.rows():
        contenders = row.contenders()
        outputs = {}
        for name, contender in contenders.items():
            contender.before(3)
            outputs[name] = contender.run(3).float().flatten()
        reference = outputs["moekern"]
        for name, output in outputs.items():
            error = (output - reference).norm() / reference.norm()
            assert error < 0.2, f"{row.name}: {name} differs from moekern by {error:.3f}"


def test_only_that_names_no_row_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", "--quick", "--only", "nonsense"]) == 1
    assert "no row's name contains 'nonsense'" in capsys.readouterr().err


def test_report_shows_every_row_and_refuses_smoke_tests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"median_ms": 50.0, "p10_ms": 49.0, "p90_ms": 51.0, "min_ms": 48.0, "calls": 7}
    row = {
        "case": "decode, 4096 cached", "ratio": 5.0, "at_least": 5.0, "aim": 7.0, "best": "eager + grouped_mm",
        "default": "sdpa + grouped_mm", "ratio_to_default": 6.0,
        "contenders": {
            "sdpa + grouped_mm": {**times, "median_ms": 300.0}, "eager + grouped_mm": {**times, "median_ms": 250.0},
            "moekern": times,
        },
    }  # fmt: skip
    machine = {"processor": "A Processor", "isa": "amx", "features": {"avx2": True, "amx_bf16": False}}
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    result = {
        "quick": False, "threads": 2, "rows": [row],
        "environment": {"moekern": "0.1.0", "machine": machine, "versions": versions},
    }  # fmt: skip
    saved, page = tmp_path / "a-machine" / "cpu.json", tmp_path / "performance.md"
    saved.parent.mkdir()
    saved.write_text(json.dumps(result))
    arguments = ["report", "--results", str(tmp_path), "--out", str(page)]
    assert main([*arguments, "--check"]) == 1
    assert main(arguments) == 0
    text = page.read_text()
    assert "## a-machine" in text
    assert "A Processor, 2 threads, kernels run with amx (avx2)" in text
    assert "| decode, 4096 cached | 50 ms | 250 ms | 5.00x | 5x | 7x | 6.00x | eager + grouped_mm |" in text
    assert main([*arguments, "--check"]) == 0
    saved.write_text(json.dumps({**result, "quick": True}))
    assert main(arguments) == 1
    assert "is of a --quick run" in capsys.readouterr().err
