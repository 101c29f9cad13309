"""`moekern demo` on tiny widths: what it prints, writes and returns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moekern
from moekern import demo, random_models
from moekern.__main__ import main

TINY = ["demo", "--tiny", "--quiet", "--prompt-tokens", "70", "--new-tokens", "6", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """What --threads sets is the process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model_type", sorted(random_models.PRESETS))
def test_demo_shows_the_same_fp32_tokens(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "demo.json"
    assert main([*TINY, "--model-type", model_type, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["float32"]["identical"]
    assert found["float32"]["transformers"] == found["float32"]["moekern"]
    assert len(found["float32"]["moekern"]) == 6
    if moekern.backends("fused_experts")["cpu"] is None:
        assert any(name.endswith("experts") for name in found["patched"])
    assert found["model"]["type"] == model_type
    assert found["prompt"]["tokens"] == 70
    assert found["agreement"]["generated_of"] == 6
    assert found["agreement"]["prompt_of"] == 70
    before, after = found["transformers"], found["moekern"]
    assert found["speedup"]["first_token"] == pytest.approx(before["first_token_s"] / after["first_token_s"])
    assert found["speedup"]["decode"] == pytest.approx(after["tokens_per_s"] / before["tokens_per_s"])
    shown = capsys.readouterr().out
    for part in ("time to first token", "tokens/s", "peak memory", "identical, 6/6", "70 tokens of "):
        assert part in shown


def test_demo_fails_when_the_fp32_tokens_differ(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patch = moekern.patch

    def spoil(model: Any) -> Any:
        report = patch(model)
        for name, value in model.named_parameters():
            if "experts.down_proj" in name:
                value.zero_()
        return report

    monkeypatch.setattr(moekern, "patch", spoil)
    assert main(TINY) == 1
    captured = capsys.readouterr()
    assert "DIFFERENT" in captured.out
    assert "the float32 tokens differ" in captured.err


def test_demo_fails_when_nothing_is_patched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOEKERN_DISABLE", "1")
    assert main(TINY) == 1
    assert "nothing was patched" in capsys.readouterr().err


def test_forced_agreement_counts_the_models_own_choices() -> None:
    config = random_models.make_config("deepseek_v2", 2, 64, tiny=True)
    model = random_models.build_model(config, torch.float32)
    prompt = torch.arange(20)[None]
    run = demo.generate(model, prompt, 6, "", True)
    assert demo.forced_agreement(model, run, 20, run.tokens) == 6
    wrong = [(token + 1) % 320 for token in run.tokens]
    assert demo.forced_agreement(model, run, 20, wrong) < 6


def test_text_is_real_and_never_repeated() -> None:
    text, names = demo.read_text(4096)
    assert len(text) == 4096
    assert names
    assert b"moekern" in text
    # A text that was repeated to fill the prompt would compress to nothing the second time.
    assert text.count(text[:200]) == 1


def test_text_that_is_too_short_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--tiny", "--prompt-tokens", "900000000"]) == 1
    assert "--prompt-tokens must be at most" in capsys.readouterr().err


def test_text_without_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "moekern"
    package.mkdir()
    (package / "module.py").write_text(
        "x" * 500_000
    )  # more than the description that comes first, if there is one
    monkeypatch.setattr(demo, "PACKAGE", package)
    text, names = demo.read_text(500_000)
    assert len(text) == 500_000
    assert names[-1] == str(Path("moekern/module.py"))


def test_peak_memory_is_of_the_phase_since_the_reset() -> None:
    if not demo.reset_peak_memory():
        pytest.skip("the kernel does not let this process reset its peak")
    start = demo.peak_memory()
    block = torch.ones(96 << 20, dtype=torch.uint8)
    assert demo.peak_memory() - start > 80 << 20
    del block
    demo.reset_peak_memory()
    assert demo.peak_memory() - start < 60 << 20


def test_demo_ends_cleanly_when_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "measure", interrupt)
    assert main(TINY) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


@pytest.mark.parametrize("model_type", sorted(random_models.PRESETS))
def test_random_models_depend_on_the_seed_only(model_type: str) -> None:
    config = random_models.make_config(model_type, 2, 64, tiny=True)
    first, second = (random_models.build_model(config, torch.bfloat16, seed=1) for _ in range(2))
    other = random_models.build_model(config, torch.bfloat16, seed=2)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert value.dim() == 1 or not torch.equal(value, other.state_dict()[name])
        if value.dim() > 1:
            assert value.float().std() == pytest.approx(1.5 / value.shape[-1] ** 0.5, rel=0.1)


def test_twins_share_weights_and_nothing_else() -> None:
    model = random_models.build_model(
        random_models.make_config("deepseek_v3", 2, 64, tiny=True), torch.float32
    )
    twin = random_models.share_weights(model)
    prompt = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, twin(prompt).logits)
    twin.set_experts_implementation("eager")
    assert model.config._experts_implementation != "eager"
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours is theirs
