"""Experts and routers one by one: names, layouts, sentinels, gradients, compile, what a router returns."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any

import pytest
import torch
from hf.families import FAMILIES, build, cast, generate, outputs, prompt
from torch import nn

import moekern
from moekern.hf import experts as hf_experts, router


def _modules(model: nn.Module, kind: str) -> list[Any]:
    return [
        module
        for module in model.modules()
        if getattr(getattr(module, "_moekern", None), "kind", None) == kind
    ]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "aria"])
def test_by_name(name: str) -> None:
    model, ids = build(name), prompt()
    before = outputs(model, ids)
    model.set_experts_implementation("moekern")
    torch.testing.assert_close(outputs(model, ids), before, rtol=1e-4, atol=1e-4)


def test_by_name_compiles_and_checks_a_module_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("mixtral"), prompt()
    model.set_experts_implementation("moekern")
    checks = []
    original = hf_experts._mismatch
    monkeypatch.setattr(hf_experts, "_mismatch", lambda *a: checks.append(a[0]) or original(*a))
    expected = [outputs(model, ids) for _ in range(2)]
    assert checks == [layer.mlp.experts for layer in model.model.layers]
    torch.compiler.reset()
    torch.testing.assert_close(
        outputs(torch.compile(model, backend="eager", fullgraph=True), ids), expected[0]
    )


def test_by_name_falls_back_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    hf_experts._warn_once.cache_clear()
    model, ids = build("inkling2"), prompt()
    before = outputs(model, ids)
    model.set_experts_implementation("moekern")
    with caplog.at_level(logging.WARNING, "moekern"):
        for _ in range(2):
            torch.testing.assert_close(outputs(model, ids), before, rtol=1e-4, atol=1e-4)
    assert caplog.text.count("Inkling2Experts._apply_gate is not one the op computes") == 1


def test_fp8_name_runs_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8ExpertsInterface

    monkeypatch.setitem(
        FP8ExpertsInterface._global_mapping, "grouped_mm", lambda module, x, ids, weights: (module, x)
    )
    function = ALL_FP8_EXPERTS_FUNCTIONS.get_interface("moekern", None)
    assert function("module", "x", "ids", "weights") == ("module", "x")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "openai_privacy_filter", "deepseek_v4"])
def test_sentinel_ids_contribute_nothing(name: str) -> None:
    """Expert parallelism marks pairs of other ranks with id == num_experts and weight 0."""
    model = build(name)
    moekern.patch(model)
    module = _modules(model, "experts")[0]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 32, generator=generator)
    ids = torch.randint(0, 8, (5, 3), generator=generator)
    weights = torch.rand(5, 3, generator=generator)
    marked = torch.rand(5, 3, generator=generator) > 0.6
    marked[2] = True
    with torch.no_grad():
        expected = module(x, ids, weights.masked_fill(marked, 0.0))
        out = module(x, ids.masked_fill(marked, module.num_experts), weights)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(out[2], torch.zeros(32))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_activations_wider_than_the_weights(name: str) -> None:
    """Under autocast a bf16 model hands its experts the fp32 output of a norm; the class casts it to the weights."""
    model = build(name).bfloat16()
    moekern.patch(model)
    module = _modules(model, "experts")[0]
    generator = torch.Generator().manual_seed(2)
    x, weights = torch.randn(5, 32, generator=generator), torch.rand(5, 3, generator=generator)
    ids = torch.randint(0, 8, (5, 3), generator=generator)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine = module(x, ids, weights)
        moekern.unpatch(model)
        theirs = module(x, ids, weights)
    assert mine.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0.02 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "aria", "deepseek_v2", "gemma4"])
def test_gradients(name: str) -> None:
    model, ids = build(name).train(), prompt()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model(ids)
        (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().mean().backward()
        return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}

    expected = gradients()
    moekern.patch(model)
    found = gradients()
    assert found.keys() == expected.keys()
    assert sum("experts" in key for key in found)
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=2e-3, atol=1e-3 * value.abs().max().item(), msg=key
        )


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.router])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_router_returns_what_its_class_returns(
    name: str, dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes and dtypes; the logits, bitwise unless one op computes them too; weights per expert, for classes leave the order open."""
    if not fused:
        monkeypatch.setattr(router, "MAX_GATE_TOKENS", 0)
    model = cast(build(name), dtype)
    given: dict[int, tuple[Any, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, kwargs: given.update({id(module): (args, kwargs)}), with_kwargs=True)
        for module in model.modules()
    ]  # fmt: skip
    outputs(model, prompt())
    for hook in hooks:
        hook.remove()
    moekern.patch(model)
    checked = 0
    for module in _modules(model, "router"):
        if id(module) not in given:
            continue
        args, kwargs = given[id(module)]
        with torch.no_grad():
            mine, theirs = module(*args, **kwargs), type(module).forward(module, *args, **kwargs)
        assert [(value.shape, value.dtype) for value in mine] == [
            (value.shape, value.dtype) for value in theirs
        ]
        if not fused:
            assert torch.equal(mine[0], theirs[0])
        tolerance = 4 * torch.finfo(theirs[0].dtype).eps * theirs[0].abs().max().item()
        torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=tolerance)
        dense = [
            torch.zeros(ids.shape[0], 1024).scatter(1, ids, weights.float())
            for _, weights, ids in (mine, theirs)
        ]
        eps = torch.finfo(theirs[1].dtype).eps
        equal = torch.isclose(*dense, rtol=8 * eps, atol=8 * eps).all(-1).float().mean()  # type: ignore[misc]
        assert equal >= (1.0 if dtype == torch.float32 else 0.7)
        checked += 1
    assert checked


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "ernie4_5_moe"])
def test_recorded_router_logits(name: str) -> None:
    model, ids = build(name), prompt()
    with torch.no_grad():
        before = model(ids, output_router_logits=True)
        moekern.patch(model)
        after = model(ids, output_router_logits=True)
    assert len(after.router_logits) == len(before.router_logits) > 0
    for mine, theirs in zip(after.router_logits, before.router_logits, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    if before.get("aux_loss") is not None:
        torch.testing.assert_close(after.aux_loss, before.aux_loss)


def test_training_mode_noise_of_a_router_is_kept() -> None:
    """Phi-MoE jitters its router in training: it stays the model's own."""
    model = build("phimoe").train()
    report = moekern.patch(model)
    assert {entry.class_name for entry in report.skipped} == {"PhimoeTopKRouter"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_compiled_decode_step(name: str, backend: str) -> None:
    """One decode step on a static cache, as one graph without a break."""
    from transformers import StaticCache

    model, ids = build(name), prompt(2, 6)
    moekern.patch(model)

    def step(function: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
            out = [function(ids[:, :1] + i, past_key_values=cache, use_cache=True).logits for i in (0, 1)]
        return out[0], out[1]

    expected = step(model)
    torch.compiler.reset()
    found = step(torch.compile(model, backend=backend, fullgraph=True))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_generate_with_a_compiled_static_cache() -> None:
    from transformers import CompileConfig

    model, ids = build("deepseek_v2"), prompt()
    tokens = generate(model, ids, 4)
    moekern.patch(model)
    torch.compiler.reset()
    config = CompileConfig(backend="eager", fullgraph=True)
    assert torch.equal(generate(model, ids, 4, cache_implementation="static", compile_config=config), tokens)


def test_weights_that_moved_to_fp64_run_the_models_own() -> None:
    model, ids = build("mixtral"), prompt()
    model.set_experts_implementation("eager")
    moekern.patch(model)
    model.double()
    exact = outputs(copy.deepcopy(model), ids)
    moekern.unpatch(model)
    torch.testing.assert_close(outputs(model, ids), exact, rtol=1e-6, atol=1e-6)
    assert Counter(entry.reason for entry in moekern.patch(model).skipped) == {
        "gate_up_proj is float64": 2,
        "weight is float64": 2,
    }
