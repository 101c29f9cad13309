"""gate_topk: router logits -> weights and ids of the selected experts.

T tokens, E experts, K selected experts per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekern import _native, _op, _triton
from moekern._check import expect_dtype, expect_shape
from moekern._op import Backend, Backward, Case, OpSpec
from moekern.ops.gate_topk import ref

MAX_TOP_K = 64  # selected ids and weights are held in registers or on the stack by every kernel
MAX_EXPERTS = 4096
MAX_CUDA_EXPERTS = 1024  # of the CUDA C++ kernel: one warp holds a row in registers

SCHEMA = (
    "(Tensor logits, int top_k, *, str scoring='softmax', Tensor? bias=None, int num_groups=1, int topk_groups=1, "
    "str group_score='max', bool renormalize=False, float norm_eps=0.0, float norm_min=0.0, float scale=1.0, "
    "Tensor? expert_scale=None, Tensor? preselected=None, ScalarType? ids_dtype=None) -> (Tensor, Tensor)"
)


def gate_topk(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    renormalize: bool = False,
    norm_eps: float = 0.0,
    norm_min: float = 0.0,
    scale: float = 1.0,
    expert_scale: Tensor | None = None,
    preselected: Tensor | None = None,
    ids_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Selects the top-k experts of each token and computes their weights.

    Args:
        logits: [T, E] float; the math is fp32 (fp64 for fp64 logits).
        top_k: K, 1 <= K <= min(E, 64).
        scoring: "softmax", "sigmoid" or "sqrtsoftplus" of all logits; "softmax_topk" or "sigmoid_topk" of the
            selected logits only.
        bias: [E], added to the scores for the selection only (`e_score_correction_bias`).
        num_groups: experts form this many equal runs; only the experts of the best `topk_groups` stay eligible.
        topk_groups: groups that stay eligible.
        group_score: "max" (DeepSeek-V2) or "top2", the sum of the two best (DeepSeek-V3).
        renormalize: divide the weights by max(their sum + norm_eps, norm_min).
        norm_eps: added to that sum.
        norm_min: lower bound of that sum.
        scale: multiplies the weights (`routed_scaling_factor`).
        expert_scale: [E], multiplies the weight of each selected expert (Gemma 4).
        preselected: [T, K] ids chosen elsewhere (hash routing); only their weights are computed. An id outside
            [0, E) gets weight 0.
        ids_dtype: torch.int64 (default) or torch.int32.
        backend: forces one backend.

    Returns:
        weights [T, K] fp32 and ids [T, K], in descending order of the selection score; ties go to the lower id.

    Raises:
        ValueError, TypeError: for arguments that do not fit together.

    Notes:
        NaN logits rank last; ids always are distinct and in range. Differentiable in logits and expert_scale.
        Deterministic; no host sync. Traffic: T*E logits in, T*K weights and ids out.

    Source: DeepSeek-V2 (arXiv 2405.04434) section 2.2, DeepSeek-V3 (arXiv 2412.19437) section 2.1.2.
    """
    return _op.call(
        SPEC,
        backend,
        logits=logits,
        top_k=top_k,
        scoring=scoring,
        bias=bias,
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_score=group_score,
        renormalize=renormalize,
        norm_eps=norm_eps,
        norm_min=norm_min,
        scale=scale,
        expert_scale=expert_scale,
        preselected=preselected,
        ids_dtype=ids_dtype,
    )


def check_gating(
    op: str,
    logits: Tensor,
    num_tokens: int,
    num_experts: int,
    *,
    top_k: int,
    scoring: str,
    bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    norm_eps: float,
    norm_min: float,
    expert_scale: Tensor | None,
    preselected: Tensor | None,
    ids_dtype: torch.dtype | None,
    **_: Any,
) -> None:
    """The checks that gate_topk and gate share; `logits` gives the device."""
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{op}: E must be in 1..{MAX_EXPERTS}; got {num_experts}")
    if not 1 <= top_k <= min(num_experts, MAX_TOP_K):
        raise ValueError(
            f"{op}: top_k must be in 1..min(E, {MAX_TOP_K}) = {min(num_experts, MAX_TOP_K)}; got {top_k}"
        )
    if scoring not in ref.SCORINGS:
        raise ValueError(f"{op}: scoring must be one of {', '.join(ref.SCORINGS)}; got {scoring!r}")
    if group_score not in ref.GROUP_SCORES:
        raise ValueError(
            f"{op}: group_score must be one of {', '.join(ref.GROUP_SCORES)}; got {group_score!r}"
        )
    if not (num_groups >= 1 and num_experts % num_groups == 0):
        raise ValueError(f"{op}: num_groups must divide E = {num_experts}; got {num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"{op}: topk_groups must be in 1..num_groups = {num_groups}; got {topk_groups}")
    eligible = num_experts // num_groups * topk_groups
    if top_k > eligible and preselected is None:
        raise ValueError(
            f"{op}: top_k must not exceed the {eligible} experts of topk_groups groups; got {top_k}"
        )
    if not (norm_eps >= 0 and norm_min >= 0):
        raise ValueError(f"{op}: norm_eps and norm_min must be >= 0; got {norm_eps}, {norm_min}")
    for name, value in (("bias", bias), ("expert_scale", expert_scale)):
        if value is not None:
            expect_shape(op, name, value, "[E]", (num_experts,), like=logits)
            expect_dtype(op, name, value, "floating", value.dtype.is_floating_point)
    if preselected is not None:
        expect_shape(op, "preselected", preselected, "[T, K]", (num_tokens, top_k), like=logits)
        expect_dtype(
            op, "preselected", preselected, "int32 or int64", preselected.dtype in (torch.int32, torch.int64)
        )
    if ids_dtype not in (None, torch.int32, torch.int64):
        raise TypeError(f"{op}: ids_dtype must be torch.int32 or torch.int64; got {ids_dtype}")


def _check(logits: Tensor, **gating: Any) -> None:
    expect_shape("gate_topk", "logits", logits, "[T, E]", (None, None))
    expect_dtype("gate_topk", "logits", logits, "floating", logits.dtype.is_floating_point)
    check_gating("gate_topk", logits, *logits.shape, **gating)


def _fake(logits: Tensor, top_k: int, ids_dtype: torch.dtype | None, **_: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(shape, dtype=compute), logits.new_empty(shape, dtype=ids_dtype or torch.int64)


_ARGUMENTS = (
    "(Tensor logits, Tensor? bias, Tensor? expert_scale, Tensor? preselected, int scoring, int num_groups, "
    "int topk_groups, bool top2, bool renormalize, float norm_eps, float norm_min, float scale, Tensor(a!) weights, "
    "Tensor(b!) ids) -> ()"
)
_cpu_leaf = _native.leaf(f"_gate_topk_cpu{_ARGUMENTS}")
_cuda_leaf = _native.leaf(f"_gate_topk_cuda{_ARGUMENTS}")


def _fp32(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().to(torch.float32).contiguous()


def _run_native(leaf: Callable[..., None], logits: Tensor, top_k: int, scoring: str, bias: Tensor | None,
                num_groups: int, topk_groups: int, group_score: str, renormalize: bool, norm_eps: float,
                norm_min: float, scale: float, expert_scale: Tensor | None, preselected: Tensor | None,
                ids_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    weights, ids = _fake(logits, top_k, ids_dtype)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if preselected is not None:
        preselected = preselected.to(ids.dtype).contiguous()
    leaf(logits, _fp32(bias), _fp32(expert_scale), preselected, ref.SCORINGS.index(scoring), num_groups, topk_groups,
         group_score == "top2", renormalize, norm_eps, norm_min, scale, weights, ids)  # fmt: skip
    return weights, ids


_run_cpu = functools.partial(_run_native, _cpu_leaf)
_run_cuda = functools.partial(_run_native, _cuda_leaf)


def _supports_cuda(logits: Tensor, **_: Any) -> str | None:
    if logits.device.type != "cuda":
        return f"logits are on {logits.device}"
    if logits.shape[1] > MAX_CUDA_EXPERTS:
        return f"E = {logits.shape[1]} exceeds {MAX_CUDA_EXPERTS}"
    return None if logits.dtype in SPEC.dtypes else f"dtype {logits.dtype}"


def _run_triton(logits: Tensor, top_k: int, ids_dtype: torch.dtype | None, bias: Tensor | None,
                expert_scale: Tensor | None, preselected: Tensor | None,
                **gating: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    from moekern.ops.gate_topk import triton  # importing Triton takes 0.1 s, so it waits for the first call

    weights, ids = _fake(logits, top_k, ids_dtype)
    if logits.shape[0] > 0:
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        bias, expert_scale, preselected = (
            None if v is None else v.detach().contiguous() for v in (bias, expert_scale, preselected)
        )
        triton.run(
            weights, ids, logits, bias=bias, expert_scale=expert_scale, preselected=preselected, **gating
        )
    return weights, ids


def _supports_triton(logits: Tensor, **_: Any) -> str | None:
    return _triton.refuses(logits) or (None if logits.dtype in SPEC.dtypes else f"dtype {logits.dtype}")


def _supports_cpu(logits: Tensor, **_: Any) -> str | None:
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}"
    return None if logits.dtype in SPEC.dtypes else f"dtype {logits.dtype}"


def _backward(saved: Any, grads: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    if grads[0] is None:
        return {}
    names = [n for n in ("logits", "expert_scale") if n in saved["needs"]]
    with torch.enable_grad():
        leaves = {n: saved[n].detach().requires_grad_() for n in names}
        inputs = {**saved, **leaves}
        logits = inputs["logits"]
        compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weights = ref.weights_of(
            logits.to(compute), saved["outputs"][1], *(inputs[n] for n in (
                "scoring", "renormalize", "norm_eps", "norm_min", "scale", "expert_scale")))  # fmt: skip
        found = torch.autograd.grad(weights, list(leaves.values()), grads[0])
    return dict(zip(names, found, strict=True))


def _case(num_tokens: int, num_experts: int, top_k: int, *, bias: bool = False, expert_scale: bool = False,
          preselected: bool = False, ties: bool = False, **gating: Any) -> Any:  # fmt: skip
    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        logits = torch.randn(num_tokens, num_experts, generator=generator)
        if ties:
            logits = (logits * 2).round()
        arguments: dict[str, Any] = {"logits": logits.to(device, dtype), "top_k": top_k, **gating}
        if bias:
            arguments["bias"] = torch.rand(num_experts, generator=generator).to(device)
        if expert_scale:
            arguments["expert_scale"] = (torch.rand(num_experts, generator=generator) + 0.5).to(device)
        if preselected:
            ids = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=generator)
            arguments["preselected"] = ids.to(device)
        return arguments

    return make


# fmt: off
CASES = (
    Case("softmax_v2_lite", _case(37, 64, 6), bench="DeepSeek-V2-Lite decode"),
    Case("softmax_groups_max_v2", _case(19, 160, 6, num_groups=8, topk_groups=3, scale=16.0)),
    Case("softmax_renorm_qwen3", _case(23, 128, 8, renormalize=True)),
    Case("sigmoid_groups_top2_v3", _case(17, 256, 8, scoring="sigmoid", bias=True, num_groups=8, topk_groups=4,
                                         group_score="top2", renormalize=True, norm_eps=1e-20, scale=2.5),
         bench="DeepSeek-V3 decode"),
    Case("sigmoid_bias_vl2", _case(29, 72, 6, scoring="sigmoid", bias=True, renormalize=True, norm_eps=1e-20, scale=2.0)),
    Case("softmax_topk_gpt_oss", _case(31, 32, 4, scoring="softmax_topk")),
    Case("softmax_topk_bias", _case(31, 40, 4, scoring="softmax_topk", bias=True)),
    Case("sigmoid_topk_cohere2", _case(11, 48, 8, scoring="sigmoid_topk")),
    Case("softmax_bias_clamp_ernie", _case(13, 64, 6, bias=True, renormalize=True, norm_min=1e-12)),
    Case("softmax_expert_scale_gemma4", _case(9, 128, 8, renormalize=True, expert_scale=True)),
    Case("sqrtsoftplus_v4", _case(15, 96, 6, scoring="sqrtsoftplus", bias=True, renormalize=True, norm_eps=1e-20, scale=1.5)),
    Case("preselected_hash_v4", _case(15, 96, 6, scoring="sqrtsoftplus", preselected=True, renormalize=True, norm_eps=1e-20)),
    Case("preselected_softmax_topk", _case(15, 33, 3, scoring="softmax_topk", preselected=True)),
    Case("ties", _case(41, 67, 7, ties=True)),
    Case("ties_groups_top2", _case(41, 60, 5, ties=True, scoring="sigmoid", num_groups=12, topk_groups=4, group_score="top2")),
    Case("k1_mixture", _case(7, 8, 1)),
    Case("k_equals_e", _case(7, 13, 13)),
    Case("one_expert", _case(5, 1, 1)),
    Case("no_tokens", _case(0, 64, 6)),
    Case("one_token", _case(1, 64, 6)),
    Case("wide_1024", _case(3, 1024, 32)),
    Case("prefill_4096", _case(4096, 64, 6), small=False, bench="DeepSeek-V2-Lite prefill"),
)
# fmt: on

SPEC = OpSpec(
    name="gate_topk",
    schema=SCHEMA,
    check=_check,
    ref=ref.gate_topk,
    fake=_fake,
    backends={
        "ref": Backend(ref.gate_topk),
        "cpu": Backend(_run_cpu, lambda: _native.reason_without("_gate_topk_cpu"), _supports_cpu),
        "cuda": Backend(_run_cuda, lambda: _native.reason_without("_gate_topk_cuda"), _supports_cuda),
        "triton": Backend(_run_triton, _triton.unavailable, _supports_triton),
    },
    cases=CASES,
    outputs=("fp32", "ids"),
    backward=Backward(("logits", "expert_scale"), _backward),
    flops=lambda logits, **_: 10 * logits.numel(),
    bytes=lambda logits, top_k, **_: logits.numel() * logits.element_size() + logits.shape[0] * top_k * 12,
)
