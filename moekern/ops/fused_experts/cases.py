"""Inputs of fused_experts: the experts of real models in small, the edges, and real layers for the benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from moekern._op import Case
from moekern.ops.grouped_gemm import make_weight

GPT_OSS: dict[str, Any] = {
    "interleaved": True,
    "transposed": True,
    "limit": 7.0,
    "alpha": 1.702,
    "up_shift": 1.0,
}


def make_case(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    d: int,
    f: int,
    *,
    bias: bool = False,
    strided: bool = False,
    only: int | None = None,
    outside: bool = False,
    distinct: bool = True,
    strided_x: bool = False,
    model_dtype_weights: bool = False,
    ids_dtype: torch.dtype = torch.int64,
    scale: float = 1.0,
    **kwargs: Any,
) -> Any:
    """A Case.make.

    only: every pair goes to this expert. outside: some ids are -1, E, or the largest integer. distinct: the K experts of
    a token differ, as a router chooses them. strided: weights are slices of a larger tensor. scale: of x.
    """
    gated, transposed = kwargs.get("gated", True), kwargs.get("transposed", False)
    n = 2 * f if gated else f

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        x = (
            torch.randn(num_tokens, d * (3 if strided_x else 1), generator=generator)[
                :, :: 3 if strided_x else 1
            ]
            * scale
        )
        if distinct and only is None:
            ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=-1)[:, :top_k]
        else:
            ids = torch.randint(0, num_experts, (num_tokens, top_k), generator=generator)
        ids = ids.to(ids_dtype).contiguous()
        if only is not None:
            ids.fill_(only)
        if outside:
            bad = torch.tensor([-1, num_experts, torch.iinfo(torch.int32).max], dtype=ids_dtype)
            flat = ids.view(-1)
            flat[::3] = bad[torch.randint(0, 3, (flat[::3].numel(),), generator=generator)]
        weights = torch.rand(num_tokens, top_k, generator=generator).to(device)
        arguments: dict[str, Any] = {
            "x": x.to(dtype).to(device),
            "w_gate_up": make_weight(generator, num_experts, n, d, transposed, strided, dtype, device),
            "w_down": make_weight(generator, num_experts, d, f, transposed, strided, dtype, device),
            "weights": weights.to(dtype) if model_dtype_weights else weights,
            "ids": ids.to(device),
            **kwargs,
        }
        if bias:
            arguments["b_gate_up"] = torch.randn(num_experts, n, generator=generator).to(device, dtype)
            arguments["b_down"] = torch.randn(num_experts, d, generator=generator).to(device, dtype)
        return arguments

    return make


CASES = (
    Case("silu", make_case(5, 8, 2, 64, 32)),
    Case("silu_many_rows", make_case(70, 3, 2, 64, 48)),
    Case("ragged", make_case(19, 5, 3, 50, 37)),
    Case("narrower_than_a_tile", make_case(5, 4, 2, 24, 16)),
    Case("ragged_many_rows", make_case(67, 2, 2, 71, 45)),
    Case("gpt_oss_small", make_case(9, 6, 3, 64, 32, bias=True, scale=4.0, **GPT_OSS)),
    Case("gpt_oss_ragged", make_case(41, 3, 2, 46, 26, bias=True, scale=4.0, **GPT_OSS)),
    Case("concatenated_transposed_bias", make_case(9, 6, 3, 48, 40, bias=True, transposed=True, limit=7.0, alpha=1.702,
                                                   up_shift=1.0)),
    Case("transposed_odd", make_case(13, 4, 2, 33, 19, transposed=True)),
    Case("clamped_silu", make_case(11, 6, 2, 64, 32, limit=0.7)),
    Case("interleaved", make_case(11, 6, 2, 64, 32, interleaved=True)),
    Case("gelu_gated", make_case(7, 4, 2, 48, 32, activation="gelu")),
    Case("gelu_tanh_gated", make_case(7, 4, 2, 48, 32, activation="gelu_tanh")),
    Case("relu_gated", make_case(7, 4, 2, 48, 32, activation="relu")),
    Case("phi_not_gated_gelu_bias", make_case(7, 4, 2, 48, 64, gated=False, bias=True, activation="gelu_tanh")),
    Case("nemotron_not_gated_relu2", make_case(21, 4, 2, 48, 40, gated=False, activation="relu2")),
    Case("not_gated_none_limit", make_case(7, 4, 2, 32, 32, gated=False, activation="none", limit=1.0)),
    Case("not_gated_transposed", make_case(23, 4, 2, 32, 48, gated=False, transposed=True, activation="gelu")),
    Case("ids_outside", make_case(17, 6, 4, 32, 32, outside=True)),
    Case("ids_outside_int32", make_case(17, 6, 4, 32, 32, outside=True, ids_dtype=torch.int32)),
    Case("ids_repeated", make_case(17, 6, 4, 32, 32, distinct=False)),
    Case("pairs_unreduced", make_case(17, 6, 4, 32, 32, outside=True, reduce=False)),
    Case("all_tokens_to_one_expert", make_case(40, 8, 1, 64, 32, only=3)),
    Case("experts_not_a_power_of_two", make_case(6, 11, 3, 32, 32)),
    Case("k1", make_case(6, 4, 1, 32, 32)),
    Case("k_equals_e", make_case(6, 4, 4, 32, 32)),
    Case("one_expert", make_case(6, 1, 1, 32, 32)),
    Case("no_tokens", make_case(0, 4, 2, 32, 32)),
    Case("one_token", make_case(1, 16, 6, 128, 64)),
    Case("strided_x", make_case(6, 4, 2, 32, 32, strided_x=True)),
    Case("strided_weights", make_case(6, 4, 2, 32, 40, strided=True)),
    Case("strided_weights_transposed", make_case(6, 4, 2, 32, 40, strided=True, transposed=True)),
    Case("routing_weights_in_model_dtype", make_case(6, 4, 2, 32, 32, model_dtype_weights=True)),
    *(
        Case(f"{name}_{tokens}", make_case(tokens, e, k, d, f, **kwargs), small=False, bench=f"{title}, {tokens} tokens")
        for name, title, e, k, d, f, kwargs, sizes in (
            ("v2_lite", "DeepSeek-V2-Lite", 64, 6, 2048, 1408, {}, (1, 4, 16, 64, 512, 4096)),
            ("qwen3_30b", "Qwen3-30B-A3B", 128, 8, 2048, 768, {}, (1, 64, 512)),
            ("mixtral", "Mixtral-8x7B", 8, 2, 4096, 14336, {}, (1, 16)),
            ("gpt_oss_20b", "gpt-oss-20b", 32, 4, 2880, 2880, {"bias": True, **GPT_OSS}, (1, 64)),
        )
        for tokens in sizes
    ),
)  # fmt: skip
