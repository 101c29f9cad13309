"""Patched transformers models on a GPU: the same tokens, no wait for the GPU, compiled, and inside a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf.families import FAMILIES, build, cast, generate, outputs, prompt
from torch import Tensor, nn

import moekern
from moekern.hf import mla

pytestmark = pytest.mark.gpu

# Latent attention with and without experts, every kind of activation and of router; all of them generate.
NAMES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gpt_oss", "granitemoe", "minicpm3", "mixtral", "qwen3_moe")  # fmt: skip
STEPS = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe")
PROMPT = mla.MAX_DECODE_QUERIES + 4  # more than mla_decode takes in one call


@pytest.fixture
def as_deployed() -> None:
    """Without the suite's deterministic algorithms, which are other kernels of torch's; its own fixture puts them back."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever a test leaves behind, later tests may wait for the GPU again."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def tokens_of(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    return generate(model, ids.cuda(), **kwargs).cpu()


def assert_all_patched(name: str, report: moekern.hf.report.Report) -> None:
    """On a GPU nothing may be left out that is patched on a CPU, and everything has to be on a GPU kernel."""
    family = FAMILIES[name]
    kinds = [entry.kind for entry in report.patched]
    assert [kinds.count(kind) for kind in ("experts", "router", "mla")] == [
        family.experts,
        family.router,
        family.mla,
    ], report
    assert {entry.kind for entry in report.skipped} == set(family.skipped), report
    assert "linear" not in kinds


@pytest.mark.parametrize("name", NAMES)
def test_same_tokens(name: str) -> None:
    model, ids = build(name).cuda(), prompt(2, PROMPT)
    before, logits = tokens_of(model, ids), outputs(model, ids.cuda())
    assert_all_patched(name, moekern.patch(model))
    torch.testing.assert_close(outputs(model, ids.cuda()), logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens_of(model, ids), before)
    moekern.unpatch(model)
    assert torch.equal(outputs(model, ids.cuda()), logits)


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_patched_before_it_moves(name: str) -> None:
    model, ids = build(name), prompt(2, PROMPT)
    before = tokens_of(copy.deepcopy(model).cuda(), ids)
    moekern.patch(model)
    assert torch.equal(tokens_of(model.cuda(), ids), before)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_left_padding(name: str, implementation: str) -> None:
    model, ids = build(name).cuda(), prompt(2, PROMPT)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    before = tokens_of(model, ids * mask, attention_mask=mask.cuda())
    moekern.patch(model)
    assert torch.equal(tokens_of(model, ids * mask, attention_mask=mask.cuda()), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_error_of_the_logits(name: str, dtype: torch.dtype) -> None:
    """At most 1.25 times the unpatched model's, over the nine tenths of the tokens whose routing does not hang on rounding."""
    model = cast(build(name), dtype).cuda()
    ids = prompt(16, 24).cuda()
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")
    truth = outputs(exact, ids)

    def error() -> float:
        squares = (outputs(model, ids).double() - truth).square().mean(-1).flatten().sort().values
        return squares[: squares.numel() * 9 // 10].mean().sqrt().item()

    unpatched = error()
    moekern.patch(model)
    assert error() <= 1.25 * unpatched


@pytest.mark.parametrize("masked", [False, True])
def test_padded_values_go_to_a_fused_kernel(masked: bool) -> None:
    """DeepSeek's widths, 192 and 128: values padded to the keys' width never end in the kernel that stores the scores."""
    latent, k_rope = (torch.randn(1, 64, n, device="cuda", dtype=torch.bfloat16) for n in (512, 64))
    weight = torch.randn(16 * 256, 512, device="cuda", dtype=torch.bfloat16)
    key, value = moekern.ops.mla_decompress(latent, k_rope, weight, 16, 128, v_width=192)
    mask = torch.ones(1, 1, 64, 64, device="cuda", dtype=torch.bool).tril() if masked else None
    choice = torch._fused_sdp_choice(key, key, value, attn_mask=mask, is_causal=not masked, scale=0.1)
    assert choice != 0  # the math kernel


def patched_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "_moekern" in module.__dict__]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", STEPS)
def test_patched_modules_do_not_wait(
    name: str, dtype: torch.dtype, as_deployed: None, no_waiting: None
) -> None:
    """Neither in the prompt nor in a step; what transformers does between them is its own business."""
    from transformers import DynamicCache

    model, ids = cast(build(name), dtype).cuda(), prompt(2, PROMPT).cuda()
    moekern.patch(model)
    entered = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(module)
        torch.cuda.set_sync_debug_mode("error")

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def run() -> None:
        cache = DynamicCache(config=model.config)
        for part in (ids, ids[:, :1], ids[:, :3]):
            outputs(model, part, past_key_values=cache, use_cache=True)

    run()  # compiles and loads
    torch.cuda.synchronize()
    patched = patched_modules(model)
    for module in patched:
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    run()
    assert len(entered) == 3 * len(patched)


def static_steps(model: Any, function: Any, ids: Tensor, steps: int) -> list[Tensor]:
    """Logits of decode steps on a static cache, by `function`; the prompt runs eagerly, as in `generate`."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=32)
    outputs(model, ids, past_key_values=cache, use_cache=True)
    found = []
    for i in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        token = (ids[:, :1] + i).contiguous()
        found.append(outputs(function, token, past_key_values=cache, use_cache=True).clone())
    return found


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", STEPS)
def test_compiled_step_on_a_static_cache(name: str, mode: str, as_deployed: None) -> None:
    model, ids = build(name).cuda(), prompt(2, PROMPT).cuda()
    moekern.patch(model)
    expected = static_steps(model, model, ids, 4)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, mode=None if mode == "default" else mode)
    for mine, theirs in zip(static_steps(model, compiled, ids, 4), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deepseek_v2", "qwen3_moe"])
def test_generate_with_a_static_cache(name: str, as_deployed: None) -> None:
    """transformers compiles the steps by itself on a GPU."""
    model, ids = build(name).cuda(), prompt(2, PROMPT)
    before = tokens_of(model, ids)
    moekern.patch(model)
    torch.compiler.reset()
    assert torch.equal(tokens_of(model, ids, cache_implementation="static"), before)


@pytest.mark.parametrize("name", STEPS)
def test_step_in_a_cuda_graph(name: str, as_deployed: None) -> None:
    """Captured once and replayed for new tokens at later positions: no address, length or launch depends on a value."""
    from transformers import StaticCache

    model, ids = build(name).cuda(), prompt(2, PROMPT).cuda()
    moekern.patch(model)
    cache = StaticCache(config=model.config, max_cache_len=32)
    outputs(model, ids, past_key_values=cache, use_cache=True)
    token = ids[:, :1].clone()

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    def step() -> Tensor:
        return outputs(model, token, past_key_values=cache, use_cache=True)

    expected = []
    for i in range(3):
        token.copy_(ids[:, :1] + i)
        expected.append(step().clone())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    rewind()
    for i in range(3):
        token.copy_(ids[:, :1] + i)
        graph.replay()
        torch.testing.assert_close(found, expected[i], rtol=1e-5, atol=1e-5)
