"""Latent attention inside models: caches, masks, chunks, fallbacks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hf.families import SIZES, build, generate, outputs, prompt

import moekern
from moekern.hf import mla

MLA_FAMILIES = ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash", "minicpm3",
                "mistral4", "youtu")  # fmt: skip


def _left_padded(ids: torch.Tensor, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The second row starts with `padding` pad tokens."""
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return ids * mask, mask


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name in ("mla_decode", "mla_decompress"):
        original = getattr(moekern.ops, name)

        def call(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            counts[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(moekern.ops, name, call)
    return counts


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_left_padding(name: str, implementation: str, cache: str, calls: Counter[str]) -> None:
    model = build(name)
    model.set_attn_implementation(implementation)
    ids, mask = _left_padded(prompt(2, 11), 5)
    extra = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    before = generate(model, ids, attention_mask=mask, **extra)
    moekern.patch(model)
    assert torch.equal(generate(model, ids, attention_mask=mask, **extra), before)
    assert calls["mla_decompress"] == 2  # the prompt, once a layer
    assert calls["mla_decode"] == 2 * 7  # every token but the first


# kimi_linear's linear layers have no static cache in transformers.
@pytest.mark.parametrize("name", [name for name in MLA_FAMILIES if name != "kimi_linear"])
def test_static_cache(name: str) -> None:
    model, ids = build(name), prompt(2, 5)
    extra = {"cache_implementation": "static", "disable_compile": True}
    before = generate(model, ids, **extra)
    moekern.patch(model)
    assert torch.equal(generate(model, ids, **extra), before)


@pytest.mark.parametrize("name", MLA_FAMILIES)
@pytest.mark.parametrize("chunks", [(12, 9, 1, 3), (3, 8, 8, 6), (1, 1, 23)])
def test_chunks_on_a_prefix(name: str, chunks: tuple[int, ...], calls: Counter[str]) -> None:
    from transformers import DynamicCache

    model, ids = build(name), prompt(2, sum(chunks))
    whole = outputs(model, ids)
    moekern.patch(model)
    cache, parts = DynamicCache(config=model.config), []
    for part in ids.split(chunks, dim=1):
        parts.append(outputs(model, part, past_key_values=cache, use_cache=True))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    per_chunk = 1 if name == "kimi_linear" else 2
    assert calls["mla_decompress"] == per_chunk * sum(chunk > mla.MAX_DECODE_QUERIES for chunk in chunks)
    assert calls["mla_decode"] == per_chunk * sum(chunk <= mla.MAX_DECODE_QUERIES for chunk in chunks)


@pytest.mark.parametrize("num_queries", [1, 4, 12])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_fully_masked_rows_are_zero(num_queries: int, mask_dtype: torch.dtype) -> None:
    model = build("deepseek_v3")
    moekern.patch(model)
    module = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, num_queries, 24, generator=generator)
    latent, k_rope = (
        torch.randn(2, 1, 15, 16, generator=generator),
        torch.randn(2, 1, 15, 8, generator=generator),
    )
    attends = torch.rand(2, 1, num_queries, 15, generator=generator) > 0.4
    attends[1, :, 0] = False
    mask = (
        attends
        if mask_dtype == torch.bool
        else torch.zeros(attends.shape).masked_fill(~attends, float("-inf"))
    )
    with torch.no_grad():
        out, weights = mla.mla_attention_forward(module, query, latent, k_rope, mask, scaling=0.2)
        key, value = type(module).expand_kv(module, latent, k_rope)
    expected = (
        torch.softmax((query @ key.mT * 0.2).masked_fill(~attends, float("-inf")), -1).nan_to_num() @ value
    )
    assert weights is None
    assert torch.equal(out[1, 0], torch.zeros(4, SIZES["v_head_dim"]))
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_additive_mask_with_other_values_is_honoured() -> None:
    """A float mask that is more than 0 and minus infinity cannot become a bool mask."""
    model, ids = build("deepseek_v3"), prompt(1, 6)
    bias = torch.randn(1, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    mask = bias.masked_fill(torch.ones(6, 6).triu(1).bool(), torch.finfo(torch.float32).min)
    before = outputs(model, ids, attention_mask=mask)
    moekern.patch(model)
    torch.testing.assert_close(outputs(model, ids, attention_mask=mask), before, rtol=1e-4, atol=1e-4)
    assert (outputs(model, ids) - before).abs().max() > 0.1


def test_no_mask_with_more_cache_than_queries_is_top_left_causal() -> None:
    """What a static cache gives at prefill: a longer latent, no mask, query i at position i."""
    model = build("deepseek_v3")
    moekern.patch(model)
    module = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(1)
    for num_queries in (5, 11):
        query = torch.randn(2, 4, num_queries, 24, generator=generator)
        latent, k_rope = (
            torch.randn(2, 1, 15, 16, generator=generator),
            torch.randn(2, 1, 15, 8, generator=generator),
        )
        with torch.no_grad():
            out, _ = mla.mla_attention_forward(module, query, latent, k_rope, None, scaling=0.2)
            key, value = type(module).expand_kv(
                module, latent[:, :, :num_queries], k_rope[:, :, :num_queries]
            )
        causal = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.2
        )
        torch.testing.assert_close(out, causal.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_padded_value_makes_sdpa_choose_its_fast_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("deepseek_v3")
    moekern.patch(model)
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.append(
            torch._fused_sdp_choice(query, key, value, is_causal=kwargs["is_causal"], scale=kwargs["scale"])
        )
        return original(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    outputs(model, prompt(1, 12))
    assert seen == [1, 1]  # flash; 0 would be the math kernel, which V narrower than K means


def test_gradients_take_the_models_own_path(calls: Counter[str]) -> None:
    model, ids = build("deepseek_v3").train(), prompt(2, 6)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    moekern.patch(model, experts=False, router=False)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, expected[name]), name
    assert not calls


def test_eager_attention_weights_are_still_returned() -> None:
    model, ids = build("deepseek_v3"), prompt(1, 6)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        before = model(ids, output_attentions=True).attentions
        moekern.patch(model)
        after = model(ids, output_attentions=True).attentions
    assert len(after) == len(before) == 2
    for mine, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_by_name_alone_runs_sdpa_and_warns_once(
    caplog: pytest.LogCaptureFixture, calls: Counter[str]
) -> None:
    mla._warn_once.cache_clear()
    model, ids = build("deepseek_v3"), prompt()
    tokens, before = generate(model, ids), outputs(model, ids)
    model.set_attn_implementation("moekern_mla")
    with caplog.at_level("WARNING", "moekern"):
        assert torch.equal(generate(model, ids), tokens)
    assert torch.equal(outputs(model, ids), before)
    assert caplog.text.count("call moekern.patch(model)") == 1
    assert not calls
    moekern.patch(model)
    assert torch.equal(generate(model, ids), tokens)
    assert calls["mla_decode"]


def test_sparse_indexer_by_name_is_an_error() -> None:
    model = build("deepseek_v32")
    model.set_attn_implementation("moekern_mla")
    with pytest.raises(ValueError, match=r"selects keys by index; use attn_implementation='sdpa'"):
        outputs(model, prompt())


def test_flash_attention_masks_are_not_understood() -> None:
    model = build("deepseek_v3")
    for layer in model.model.layers:
        layer.self_attn.config._attn_implementation_internal = "flash_attention_2"
    report = moekern.patch(model)
    reasons = {entry.reason for entry in report.skipped}
    assert reasons == {"the masks of attn_implementation='flash_attention_2' are not understood"}
