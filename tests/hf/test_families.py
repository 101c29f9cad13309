"""Every family: the same greedy tokens patched and unpatched, and tokens that depend on what was patched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.families import FAMILIES, build, generate, outputs, prompt
from torch import nn

import moekern

# What one forward of a patched module calls, once; the prompt is longer than mla_decode takes.
OPS = {"experts": ("fused_experts",), "router": ("gate", "gate_topk"), "mla": ("mla_decompress",)}


def _state(model: nn.Module) -> dict[str, Any]:
    return {path: dict(module.__dict__) for path, module in model.named_modules()}


def _answer(name: str, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Greedy tokens, or for a model without a head the sign pattern of its hidden states."""
    return generate(model, ids, 6) if FAMILIES[name].generates else outputs(model, ids) > 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of ops that patched modules make, by kind."""
    counts: Counter[str] = Counter()

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[kind] += 1
            return function(*args, **kwargs)

        return call

    for kind, names in OPS.items():
        for name in names:
            monkeypatch.setattr(moekern.ops, name, counted(kind, getattr(moekern.ops, name)))
    return counts


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, calls: Counter[str]) -> None:
    family, model, ids = FAMILIES[name], build(name), prompt()
    before = outputs(model, ids)
    answer = _answer(name, model, ids)
    state = _state(model)

    report = moekern.patch(model)

    counts = Counter(entry.kind for entry in report.patched)
    assert (counts["experts"], counts["router"], counts["mla"]) == (
        family.experts,
        family.router,
        family.mla,
    ), report
    assert {entry.kind for entry in report.skipped} == set(family.skipped)
    assert all(family.skipped[entry.kind] in (entry.reason or "") for entry in report.skipped), report
    calls.clear()
    torch.testing.assert_close(outputs(model, ids), before, rtol=1e-4, atol=1e-4)
    idle = {"experts": family.idle, "router": family.idle}
    assert calls == Counter({kind: count - idle.get(kind, 0) for kind, count in counts.items()})
    assert torch.equal(_answer(name, model, ids), answer)

    if family.experts:  # without this, the line above could hold on a model whose experts do not matter
        patched = {entry.name for entry in report.patched if entry.kind == "experts"}
        weights = [module.down_proj for path, module in model.named_modules() if path in patched]
        kept = [weight.detach().clone() for weight in weights]
        for weight in weights:
            nn.init.zeros_(weight)
        assert not torch.equal(_answer(name, model, ids), answer)
        for weight, value in zip(weights, kept, strict=True):
            weight.data.copy_(value)

    moekern.unpatch(model)

    assert _state(model) == state
    assert torch.equal(outputs(model, ids), before)


def _model_types(cell: str) -> set[str]:
    return set(re.findall(r"[a-z0-9_]+", re.sub(r"\(.*?\)", "", cell)))


def test_readme_names_every_family() -> None:
    """The table of supported models is what is tested here."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = readme.split("## Supported models")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("|")][2:]
    families = {(family.directory or name, family.mla > 0) for name, family in FAMILIES.items()}
    assert {
        (kind, "latent attention" in what) for what, cell in rows for kind in _model_types(cell)
    } == families
