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


def test_a_hopeless_contender_is_measured_once() -> None:
    def contender(seconds: float, group: str) -> Contender:
        return Contender(lambda _: time.sleep(seconds), group=group)

    contenders = {"slow": contender(0.03, "x"), "fast": contender(0.01, "x"), "other": contender(0.03, "y")}
    found = interleave(contenders, budget_s=0.0, min_rounds=3, warm_up=False)
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"slow": 1, "fast": 3, "other": 3}
    assert found["fast"].summary()["median_ms"] == pytest.approx(10, abs=6)


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
    assert "features" in found["environment"]["machine"]
    shown = capsys.readouterr().out
    assert all(row["case"] in shown for row in found["rows"])
    assert "features: " in shown


def test_rows_compare_the_same_work() -> None:
    """Every contender of a row returns the same numbers, up to bf16 rounding."""
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
            assert error < 0.03, f"{row.name}: {name} differs from moekern by {error:.3f}"


def test_only_that_names_no_row_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cpu", "--quick", "--only", "nonsense"]) == 1
    assert "no row's name contains 'nonsense'" in capsys.readouterr().err
