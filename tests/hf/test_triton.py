"""Patched models on the Triton kernels alone, in the interpreter: the same fp32 tokens as unpatched.

MOEKERN_BACKEND=triton forces every op; one that Triton cannot take is an error, so nothing falls back unseen. What only a
GPU can show is in tests/gpu/test_hf.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hf.families import build, generate, outputs, prompt
from support import available, device_of
from torch import nn

import moekern
from moekern import _op, ops
from moekern.hf import mla, router

EXPERTS = ("gate_topk", "fused_experts")
LATENT = (*EXPERTS, "mla_decode", "mla_decompress")


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if not available(ops.SPECS[name], "triton")]
    return pytest.mark.skipif(bool(missing), reason=f"no Triton backend for {', '.join(missing)}")


pytestmark = [
    pytest.mark.skipif(device_of("triton").type == "cuda", reason="Triton compiles on this machine"),
    needs(*EXPERTS),
]


@pytest.fixture(autouse=True)
def calls(_some_backend: None, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Forces Triton; counts (op, backend) of what is dispatched."""
    monkeypatch.setenv("MOEKERN_BACKEND", "triton")
    if not available(ops.SPECS["gate"], "triton"):
        monkeypatch.setattr(router, "MAX_GATE_TOKENS", 0)  # a linear layer and gate_topk
    counts: Counter[tuple[str, str]] = Counter()
    original = _op.select

    def select(spec: Any, arguments: Any, forced: Any) -> Any:
        backend = original(spec, arguments, forced)
        counts[spec.name, next(n for n, b in spec.backends.items() if b is backend)] += 1
        return backend

    monkeypatch.setattr(_op, "select", select)
    return counts


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("deepseek_v2", marks=needs(*LATENT)),
        pytest.param("deepseek_v3", marks=needs(*LATENT)),
        "mixtral",
        "qwen3_moe",
        "gpt_oss",
    ],
)
def test_same_tokens(name: str, calls: Counter[tuple[str, str]]) -> None:
    latent = name.startswith("deepseek")
    model = build(name)
    # The interpreter takes a second for an expert layer; only latent attention has another path for a longer prompt.
    ids = prompt(1, mla.MAX_DECODE_QUERIES + 1 if latent else 4)
    before = generate(model, ids, 3)
    report = moekern.patch(model)
    assert not report.skipped, report
    calls.clear()
    assert torch.equal(generate(model, ids, 3), before)
    assert {backend for _, backend in calls} == {"triton"}
    assert {"fused_experts", *(LATENT if latent else ())} - {"gate_topk"} <= {op for op, _ in calls}
    assert {"gate", "gate_topk"} & {op for op, _ in calls}
    # Without this the tokens could be equal because they do not depend on the experts.
    moekern.unpatch(model)
    for module in model.modules():
        if getattr(getattr(module, "down_proj", None), "ndim", 0) == 3:
            nn.init.zeros_(module.down_proj)
    assert not torch.equal(generate(model, ids, 3), before)


@needs(*LATENT)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padding_and_a_static_cache(implementation: str) -> None:
    model, ids = build("deepseek_v3"), prompt(2, 9)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    extra = {"attention_mask": mask, "cache_implementation": "static", "disable_compile": True}
    before = generate(model, ids * mask, 3, **extra)
    moekern.patch(model, experts=False, router=False)
    assert torch.equal(generate(model, ids * mask, 3, **extra), before)


@needs(*LATENT)
def test_chunks_on_a_prefix() -> None:
    """Several queries on a longer cache, in one mla_decode call and through mla_decompress."""
    from transformers import DynamicCache

    chunks = (3, 9, 2)
    model, ids = build("deepseek_v2"), prompt(2, sum(chunks))
    whole = outputs(model, ids)
    moekern.patch(model, experts=False, router=False)
    cache = DynamicCache(config=model.config)
    parts = [outputs(model, part, past_key_values=cache, use_cache=True) for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
