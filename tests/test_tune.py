"""The tuner, on a machine without a GPU: what it intercepts, tries, rejects and reports; and every op's `candidates`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bench", reason="the benchmarks are in a checkout")
pytest.importorskip("triton")

from bench_support import case, fake_gpu, needs_no_gpu, source

from bench import gpu_bench, gpu_inputs, gpu_timing, ledger, tune
from bench.__main__ import main
from moekern.ops import SPECS
from moekern.ops.gate_topk import config as gating

__all__ = ["fake_gpu"]

CHOOSERS = [pytest.param(c, id=str(c)) for c in tune.choosers()]
GATING = tune.Chooser("moekern.ops.gate_topk.config", "choose")


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_every_choice_has_candidates_of_the_same_arguments(chooser: tune.Chooser) -> None:
    assert chooser.candidates is not None, (
        f"{chooser} has no {chooser.name.replace('choose', 'candidates', 1)} beside it"
    )
    assert list(inspect.signature(chooser.candidates).parameters) == list(
        inspect.signature(chooser.choose).parameters
    )


@needs_no_gpu
@pytest.mark.parametrize("op", sorted(op for op, spec in SPECS.items() if "triton" in spec.backends))
def test_a_call_shows_its_choices_and_candidates_are_right(op: str) -> None:
    """The first and the last candidate of every choice of a small call give what the pick gives."""
    spec, one = SPECS[op], case(op)
    arguments = gpu_inputs.make(op, one.shape, source())[0]
    with torch.no_grad():
        asked = tune.recorded(one, "triton", arguments)
        assert asked, "no choose* function of a config*.py was asked"
        expected = gpu_bench.op_results(spec, "triton", arguments)
        for key, picked in asked.items():
            found = tune.to_try(*key, picked)
            assert 1 <= len(found) <= tune.MAX_CANDIDATES
            assert found[0] == picked
            assert all(dataclasses.is_dataclass(c) and type(c).__dataclass_params__.frozen for c in found)
            for config in dict.fromkeys((found[1 % len(found)], found[-1])):
                with tune.intercepted() as overrides, overrides.force(key, config):
                    gpu_bench.check(spec, "triton", arguments, expected)
                    assert overrides.asked[key] == config, "the call did not ask again"


def test_answers_are_replaced_everywhere_and_put_back() -> None:
    from moekern.ops.gate_topk import triton

    original = triton.choose
    assert original is gating.choose
    asked = (5, 64, 1, 132)
    picked = original(*asked)
    other = dataclasses.replace(picked, num_warps=8)
    with tune.intercepted() as overrides:
        with overrides.force((GATING, asked), other):
            assert triton.choose(*asked) == gating.choose(*asked) == other
            assert triton.choose(6, 64, 1, 132) == original(6, 64, 1, 132)
        assert triton.choose(*asked) == picked
        assert overrides.asked[(GATING, asked)] == other
    assert triton.choose is gating.choose is original


@pytest.fixture
def timed(fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Seconds by block_tokens: prepare() sees the configuration that is in force."""
    seconds = {1: 2.0, 2: 1.0, 4: 3.0, 8: 9.0, 16: 9.0}

    def prepare(call: Any, inputs: Any, capturable: bool = True) -> gpu_timing.Timed:
        call(inputs[0])
        from moekern.ops.gate_topk import triton

        tokens, experts = inputs[0]["logits"].shape
        config = triton.choose(tokens, experts, 1, 132)
        return gpu_timing.Timed(lambda: seconds[config.block_tokens] + 0.01 * config.num_warps, 1, "graph")

    def interleave(contenders: dict[str, gpu_timing.Timed], budget_s: float) -> dict[str, list[float]]:
        return {name: [timed.replay()] for name, timed in contenders.items()}

    monkeypatch.setattr(gpu_timing, "prepare", prepare)
    monkeypatch.setattr(gpu_timing, "interleave", interleave)
    return seconds


@needs_no_gpu
def test_the_table(tmp_path: Path, timed: dict[int, float]) -> None:
    path, said = tmp_path / "tune.json", []
    one = case("gate_topk")
    with torch.no_grad():
        table = tune.tune([one], path, 1e9, said.append)
    assert json.loads(path.read_text()) == table
    (row,) = table["rows"]
    assert row["choose"] == "gate_topk.config.choose"
    assert row["arguments"] == [one.shape["T"], one.shape["E"], 1, 132]
    assert row["picked"]["block_tokens"] == 1
    assert row["best"]["block_tokens"] == 2
    assert row["picked_us"] == pytest.approx(2.01)
    assert row["best_us"] == pytest.approx(1.01)
    assert row["source_hash"] == ledger.hash_for("gate_topk", "triton")
    assert len(row["tried"]) == len(list(gating.candidates(one.shape["T"], one.shape["E"], 1, 132)))
    assert table["runs"][row["run"]]["device"]["name"] == "NVIDIA Test 1"
    assert said == [tune.verdict(row)]
    assert "1.99x the best, which has {'block_tokens': 2}" in said[0]
    # A second run replaces the row, and the run that no row comes from any more goes.
    timed[1] = 0.5
    with torch.no_grad():
        table = tune.tune([one], path, 1e9, said.append)
    assert len(table["rows"]) == len(table["runs"]) == 1
    assert said[1].endswith("the pick is within 3% of the best")
    with torch.no_grad():
        assert tune.tune([one], tmp_path / "other.json", -1.0, said.append)["rows"] == []


@needs_no_gpu
@pytest.mark.usefixtures("timed")
def test_a_wrong_candidate_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gating.candidates

    def candidates(*arguments: Any) -> Iterator[gating.GateTopkConfig]:
        yield from right(*arguments)
        yield gating.GateTopkConfig(block_experts=4, block_tokens=2, num_warps=1)  # half of the experts

    monkeypatch.setattr(gating, "candidates", candidates)
    with torch.no_grad():
        (row,) = tune.tune([case("gate_topk")], tmp_path / "tune.json", 1e9, lambda text: None)["rows"]
    wrong = [t for t in row["tried"] if t["config"]["block_experts"] == 4]
    assert [list(t) for t in wrong] == [["config", "failed"]]
    assert row["best"]["block_experts"] != 4


def test_cases_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert {c.op for c in tune.chosen_cases("gate_topk", None)} == {"gate_topk"}
    assert all(c.method == "graph" for c in tune.chosen_cases(None, None))
    assert main(["tune", "--op", "nonsense"]) == 1
    assert "unknown op 'nonsense'" in capsys.readouterr().err


@needs_no_gpu
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert "no usable GPU" in capsys.readouterr().err
