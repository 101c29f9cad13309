"""Every family: the same greedy tokens patched and unpatched, and tokens that depend on what was patched."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import FAMILIES, build, generate, prompt
from torch import nn

import moekern


@pytest.mark.parametrize("name", FAMILIES)
def test_same_tokens_and_exact_unpatch(name: str) -> None:
    family, model, ids = FAMILIES[name], build(name), prompt()
    with torch.no_grad():
        before = model(ids).logits
    tokens = generate(model, ids)
    state = {path: dict(module.__dict__) for path, module in model.named_modules()}

    report = moekern.patch(model)

    counts = Counter(entry.kind for entry in report.patched)
    assert (counts["experts"], counts["router"], counts["mla"]) == (
        family.experts,
        family.router,
        family.mla,
    ), report
    with torch.no_grad():
        after = model(ids).logits
    assert torch.equal(generate(model, ids), tokens)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)

    moekern.unpatch(model)

    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == state
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.experts])
def test_tokens_depend_on_the_experts(name: str) -> None:
    """The negative control: without it, the test above could pass on a model whose experts do not matter."""
    model, ids = build(name), prompt()
    moekern.patch(model)
    tokens = generate(model, ids)
    patched = [module for module in model.modules() if hasattr(type(module), "_apply_gate")]
    assert patched
    for module in patched:
        nn.init.zeros_(module.down_proj)
    assert not torch.equal(generate(model, ids), tokens)
