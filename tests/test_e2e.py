"""The end-to-end benchmark, on 2 tiny layers and a CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("bench", reason="the benchmarks are in a checkout")
pytest.importorskip("transformers")

from bench_support import CEILINGS, needs_no_gpu

from bench import e2e, gpu_bench, ledger
from bench.__main__ import main


@pytest.fixture(scope="module")
def lab() -> e2e.Lab:
    return e2e.Lab(dataclasses.replace(e2e.TINY, lengths=(8,)))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_contenders_take_the_same_step(lab: e2e.Lab, mode: str) -> None:
    """On the same weights and cache, again and again: every step sees `length` cached tokens, whoever went before."""
    assert set(lab.models) == {"transformers grouped_mm", "transformers batched_mm", "moekern"}
    assert lab.report.patched
    weights = [dict(model.named_parameters()) for model in lab.models.values()]
    assert all(p.data_ptr() == weights[0][n].data_ptr() for w in weights[1:] for n, p in w.items())
    names = [
        n for n in lab.models if mode == "eager" or "batched" not in n
    ]  # compiling takes seconds a contender
    with torch.no_grad():
        step = e2e.Step(lab, 3, 8, mode == "compiled")
        calls = {name: step.function(lab.models[name]) for name in names}
        logits = {name: step.logits(call) for name, call in calls.items()}
        again = {name: step.logits(call) for name, call in reversed(calls.items())}
    torch.compiler.reset()
    for name, value in logits.items():
        assert torch.equal(value, again[name]), f"{name} depends on the steps before it"
        assert gpu_bench.error_of("model", value, logits["transformers grouped_mm"]) < 0.05
    if mode == "eager":
        with torch.no_grad():
            other = e2e.Step(lab, 3, 8, False)  # other cached tokens
            found = other.logits(other.function(lab.models["moekern"]))
        assert gpu_bench.error_of("model", found, logits["moekern"]) > 0.2


def test_a_row(lab: e2e.Lab) -> None:
    case = next(c for c in lab.cases() if c.shape["mode"] == "eager")
    with torch.no_grad():
        row = e2e.measure(lab, case, "first", CEILINGS, 0.0, lambda text: None)
    assert ledger.key_of(row) == ("model", case.name, "moekern")
    assert row["source_hash"] == ledger.hash_for("model", "moekern")
    assert set(row["peers"]) == {"transformers grouped_mm", "transformers batched_mm"}
    best = min(p["median_us"] for p in row["peers"].values())
    assert ledger.value_of("speedup", row, {}) == pytest.approx(best / row["median_us"])
    assert 0 < row["bytes"] < 2 * sum(p.numel() for p in lab.models["moekern"].parameters()) + 2**20


def test_what_a_step_reads(lab: e2e.Lab) -> None:
    c = lab.config
    small, large, long = (lab.work(*shape)[1] for shape in ((1, 8), (10**6, 8), (1, 108)))
    assert long - small == 2 * 100 * c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
    latents = 2 * 10**6 * 8 * c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
    everything = 2 * sum(
        p.numel() for n, p in lab.models["moekern"].named_parameters() if "embed_tokens" not in n
    )
    assert large - latents == pytest.approx(everything, rel=1e-6)


def test_a_broken_patch_gets_no_row(lab: e2e.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = lab.models["moekern"]
    monkeypatch.setitem(lab.models, "moekern", lambda **inputs: _shuffled(ours(**inputs)))
    state: dict[str, Any] = {"runs": {"first": {"ceilings": CEILINGS}}, "failed": {}}
    cases = [c for c in lab.cases() if c.shape["mode"] == "eager"][:1]
    with torch.no_grad():
        assert list(e2e.rows(lab, cases, state, "first", 0.0, lambda text: None)) == []
    (why,) = state["failed"].values()
    assert "WrongResult: the patched model's logits differ by 1." in why


def test_the_case_with_a_goal_comes_first_and_none_after_the_deadline(
    lab: e2e.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(e2e, "measure", lambda lab, case, *rest: {"case": case.name})
    state: dict[str, Any] = {"runs": {"first": {"ceilings": CEILINGS}}, "failed": {}}
    cases = lab.cases()
    cases[1] = dataclasses.replace(cases[1], at_least=("speedup", 2.0))
    found = [row["case"] for row in e2e.rows(lab, cases, state, "first", 0.0, lambda text: None)]
    assert found == [cases[i].name for i in (1, 0, *range(2, len(cases)))]
    assert list(e2e.rows(lab, cases, state, "first", 0.0, lambda text: None, deadline=0.0)) == []


def _shuffled(output: Any) -> Any:
    output.logits = output.logits.roll(1, -1)
    return output


def test_the_smoke_mode(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2e, "TINY", dataclasses.replace(e2e.TINY, lengths=(8,)))
    assert main(["e2e", "--tiny", "--only", "batch 1, 8 cached, eager"]) == 0
    assert main(["e2e", "--tiny", "--only", "nonsense"]) == 1
    assert "no case's name contains 'nonsense'" in capsys.readouterr().err


@needs_no_gpu
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["e2e", "--out", str(tmp_path / "out")]) == 2
    assert "no usable GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["e2e", "--tiny", "--out", str(tmp_path)]) == 1
