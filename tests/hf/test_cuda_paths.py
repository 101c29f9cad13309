"""What a patched model does off the CPU, without a GPU: meta tensors have shapes and a device, and no values to wait for.

Whatever would copy a value to the host (`.item()`, `bool(tensor)`, a data-dependent shape) raises on them. The patch layer
asks whether a tensor is on the CPU, never whether it is on CUDA, so these are the paths that CUDA takes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hf.families import build
from torch import nn

import moekern
from moekern.hf import _common, mla

NAMES = ("deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe", "gpt_oss", "minicpm3", "deepseek_v4",
         "granitemoe", "minimax_m3_vl", "hy_v3")  # fmt: skip


@pytest.fixture(autouse=True)
def _every_op_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_common, "_has_kernel", lambda op, device_type, forced: True)
    monkeypatch.delenv("MOEKERN_BACKEND", raising=False)
    enabled = torch.is_autocast_enabled  # which knows no meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device != "meta" and enabled(device))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name in ("gate", "gate_topk", "fused_experts", "mla_decode", "mla_decompress"):
        original = getattr(moekern.ops, name)

        def call(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            counts[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(moekern.ops, name, call)
    return counts


def decode(model: Any, batch: int = 2, prompt: int = 12) -> torch.Tensor:
    """A prompt and a step on a static cache; the model is on meta."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=20)
    ids = torch.zeros(batch, prompt, dtype=torch.int64, device="meta")
    with torch.no_grad():
        for tokens in (ids, ids[:, :1]):
            out = model(tokens, past_key_values=cache, use_cache=True).logits
    return out


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_looked_at(name: str, calls: Counter[str]) -> None:
    model = build(name)
    report = moekern.patch(model)
    model.to("meta")
    kinds = Counter(entry.kind for entry in report.patched)
    calls.clear()
    assert decode(model).device.type == "meta"
    assert calls["mla_decompress"] == calls["mla_decode"] == kinds["mla"]
    assert calls["fused_experts"] == 2 * kinds["experts"]
    assert calls["gate"] + calls["gate_topk"] == 2 * kinds["router"]


def test_a_mask_of_numbers_is_not_looked_at_either(
    calls: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    mla._warn_once.cache_clear()
    model = build("deepseek_v3")
    model.set_attn_implementation("eager")
    moekern.patch(model)
    model.to("meta")
    with caplog.at_level("WARNING", "moekern"):
        decode(model)
    assert calls["mla_decode"] == 0
    assert calls["mla_decompress"] == 4
    assert caplog.text.count("attn_implementation='sdpa' has boolean ones") == 1


def test_where_there_is_no_kernel_the_model_runs_its_own(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_common, "_has_kernel", lambda op, device_type, forced: False)
    model = build("deepseek_v3")
    model.set_experts_implementation("batched_mm")
    moekern.patch(model)
    model.to("meta")
    calls.clear()
    decode(model)
    assert set(calls) == {"gate_topk"}  # routers have no other way, and the reference is right anywhere


def test_large_linear_layers_stay_with_torch_on_cuda() -> None:
    """The linear kind is for the CPU, in models that were patched there and moved afterwards too."""
    model = build("mixtral")
    model.lm_head = nn.Linear(32, 1 << 15, bias=False, dtype=torch.bfloat16)
    report = moekern.patch(model)
    assert "lm_head" in {entry.name for entry in report.patched}
    model.to("meta")
    assert model.lm_head(torch.empty(1, 32, device="meta", dtype=torch.bfloat16)).shape == (1, 1 << 15)
    moekern.unpatch(model)
    with pytest.raises(ValueError, match="nothing to patch; looked for: linear"):
        moekern.patch(model, experts=False, router=False, mla=False)


def test_meta_tensors_do_raise() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.zeros(2, device="meta").all())
