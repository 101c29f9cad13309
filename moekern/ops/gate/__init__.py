"""gate: router GEMM and gate_topk in one call.

T tokens, E experts, K selected experts per token, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekern import _native, _op
from moekern._check import expect_dtype, expect_shape
from moekern._op import Backend, Backward, Case, OpSpec
from moekern.ops.gate import ref
from moekern.ops.gate_topk import check_gating
from moekern.ops.gate_topk.ref import SCORINGS, gate_topk, weights_of

SCHEMA = (
    "(Tensor x, Tensor weight, int top_k, *, Tensor? linear_bias=None, ScalarType? logits_dtype=None, "
    "str scoring='softmax', Tensor? bias=None, int num_groups=1, int topk_groups=1, str group_score='max', "
    "bool renormalize=False, float norm_eps=0.0, float norm_min=0.0, float scale=1.0, Tensor? expert_scale=None, "
    "Tensor? preselected=None, ScalarType? ids_dtype=None) -> (Tensor, Tensor, Tensor)"
)


def gate(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    *,
    linear_bias: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes router logits, selects the top-k experts of each token and computes their weights.

    Args:
        x: [T, D] float.
        weight: [E, D] float, as nn.Linear stores it; its dtype may differ from that of x.
        top_k: K.
        linear_bias: [E], added to the logits.
        logits_dtype: the logits are rounded to this before anything is computed from them: torch.float32 (default; for
            routers that upcast) or x.dtype (for routers that do not). fp64 inputs compute, and default to, fp64.
        scoring, bias, num_groups, topk_groups, group_score, renormalize, norm_eps, norm_min, scale, expert_scale,
        preselected, ids_dtype: as in `gate_topk`.
        backend: forces one backend.

    Returns:
        weights [T, K] fp32, ids [T, K], and logits [T, E] in logits_dtype.

    Raises:
        ValueError, TypeError: for arguments that do not fit together.

    Notes:
        Logits accumulate in fp32. Differentiable in x, weight, linear_bias and expert_scale, through weights and logits.
        Deterministic; no host sync. Traffic: weight and x in, the outputs out.

    Source: as `gate_topk`.
    """
    return _op.call(
        SPEC, backend, x=x, weight=weight, top_k=top_k, linear_bias=linear_bias, logits_dtype=logits_dtype,
        scoring=scoring, bias=bias, num_groups=num_groups, topk_groups=topk_groups, group_score=group_score,
        renormalize=renormalize, norm_eps=norm_eps, norm_min=norm_min, scale=scale, expert_scale=expert_scale,
        preselected=preselected, ids_dtype=ids_dtype,
    )  # fmt: skip


def _logits_dtype(x: Tensor, logits_dtype: torch.dtype | None) -> torch.dtype:
    return logits_dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32)


def _check(x: Tensor, weight: Tensor, linear_bias: Tensor | None, logits_dtype: torch.dtype | None,
           **gating: Any) -> None:  # fmt: skip
    op = "gate"
    expect_shape(op, "x", x, "[T, D]", (None, None))
    expect_dtype(op, "x", x, "floating", x.dtype.is_floating_point)
    expect_shape(op, "weight", weight, "[E, D]", (None, x.shape[1]), like=x)
    expect_dtype(op, "weight", weight, "floating", weight.dtype.is_floating_point)
    if linear_bias is not None:
        expect_shape(op, "linear_bias", linear_bias, "[E]", (weight.shape[0],), like=x)
        expect_dtype(op, "linear_bias", linear_bias, "floating", linear_bias.dtype.is_floating_point)
    if logits_dtype not in (None, torch.float32, x.dtype):
        raise ValueError(f"{op}: logits_dtype must be torch.float32 or {x.dtype} like x; got {logits_dtype}")
    check_gating(op, x, x.shape[0], weight.shape[0], **gating)


def _fake(x: Tensor, weight: Tensor, top_k: int, logits_dtype: torch.dtype | None, ids_dtype: torch.dtype | None,
          **_: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    logits = x.new_empty((x.shape[0], weight.shape[0]), dtype=_logits_dtype(x, logits_dtype))
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=compute), x.new_empty(shape, dtype=ids_dtype or torch.int64), logits


_cpu_leaf = _native.leaf(
    "_gate_cpu(Tensor x, Tensor weight, Tensor? linear_bias, Tensor? bias, Tensor? expert_scale, Tensor? preselected, "
    "int scoring, int num_groups, int topk_groups, bool top2, bool renormalize, float norm_eps, float norm_min, "
    "float scale, Tensor(a!) weights, Tensor(b!) ids, Tensor(c!) logits) -> ()"
)


def _fp32(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().to(torch.float32).contiguous()


def _run_cpu(x: Tensor, weight: Tensor, top_k: int, linear_bias: Tensor | None, logits_dtype: torch.dtype | None,
             scoring: str, bias: Tensor | None, num_groups: int, topk_groups: int, group_score: str,
             renormalize: bool, norm_eps: float, norm_min: float, scale: float, expert_scale: Tensor | None,
             preselected: Tensor | None, ids_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights, ids, logits = _fake(x, weight, top_k, logits_dtype, ids_dtype)
    if preselected is not None:
        preselected = preselected.to(ids.dtype).contiguous()
    x, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, weight))
    _cpu_leaf(x, weight, _fp32(linear_bias), _fp32(bias), _fp32(expert_scale), preselected, SCORINGS.index(scoring),
              num_groups, topk_groups, group_score == "top2", renormalize, norm_eps, norm_min, scale, weights, ids,
              logits)  # fmt: skip
    return weights, ids, logits


def _supports_cpu(x: Tensor, weight: Tensor, **_: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    unsupported = [t.dtype for t in (x, weight) if t.dtype not in SPEC.dtypes]
    return f"dtype {unsupported[0]}" if unsupported else None


def _backward(saved: Any, grads: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    needs, x, weight = saved["needs"], saved["x"], saved["weight"]
    _, ids, logits = saved["outputs"]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    found: dict[str, Tensor | None] = {}
    d_logits = torch.zeros_like(logits, dtype=compute) if grads[2] is None else grads[2].to(compute)
    if grads[0] is not None:
        scale = saved["expert_scale"]
        with torch.enable_grad():
            leaves = [logits.detach().to(compute).requires_grad_()]
            if "expert_scale" in needs:
                scale = scale.detach().requires_grad_()
                leaves.append(scale)
            weights = weights_of(leaves[0], ids, saved["scoring"], saved["renormalize"], saved["norm_eps"],
                                 saved["norm_min"], saved["scale"], scale)  # fmt: skip
            through = torch.autograd.grad(weights, leaves, grads[0])
        d_logits = d_logits + through[0]
        if "expert_scale" in needs:
            found["expert_scale"] = through[1]
    if "x" in needs:
        found["x"] = (d_logits @ weight.to(compute)).to(x.dtype)
    if "weight" in needs:
        found["weight"] = (d_logits.t() @ x.to(compute)).to(weight.dtype)
    if "linear_bias" in needs:
        found["linear_bias"] = d_logits.sum(0).to(saved["linear_bias"].dtype)
    return found


def _model(x: Tensor, weight: Tensor, top_k: int, linear_bias: Tensor | None, logits_dtype: torch.dtype | None,
           **gating: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The linear layer of transformers' routers: in fp32 (DeepSeek), or in the model's dtype (Mixtral)."""
    dtype = _logits_dtype(x, logits_dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    logits = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias)
    return *gate_topk(logits, top_k, **gating), logits


def _case(num_tokens: int, num_experts: int, top_k: int, d: int, *, linear_bias: bool = False, bias: bool = False,
          expert_scale: bool = False, strided_x: bool = False, weight_dtype: torch.dtype | None = None,
          preselected: bool = False, **gating: Any) -> Any:  # fmt: skip
    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        x = torch.randn(num_tokens, d * (2 if strided_x else 1), generator=generator)[
            :, :: 2 if strided_x else 1
        ]
        weight = torch.randn(num_experts, d, generator=generator) * d**-0.5
        arguments: dict[str, Any] = {
            "x": x.to(device, dtype), "weight": weight.to(device, weight_dtype or dtype), "top_k": top_k, **gating
        }  # fmt: skip
        if linear_bias:
            arguments["linear_bias"] = torch.randn(num_experts, generator=generator).to(device, dtype)
        if bias:
            arguments["bias"] = torch.rand(num_experts, generator=generator).to(device)
        if expert_scale:
            arguments["expert_scale"] = (torch.rand(num_experts, generator=generator) + 0.5).to(device)
        if preselected:
            ids = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=generator)
            arguments["preselected"] = ids.to(device)
        return arguments

    return make


V3: dict[str, Any] = {"scoring": "sigmoid", "num_groups": 8, "topk_groups": 4, "group_score": "top2",
                      "renormalize": True, "norm_eps": 1e-20, "scale": 2.5}  # fmt: skip

CASES = (
    Case("softmax", _case(5, 16, 4, 64)),
    Case("v2_lite", _case(3, 64, 6, 2048), bench="DeepSeek-V2-Lite decode"),
    Case("qwen3", _case(3, 128, 8, 256, renormalize=True)),
    Case("v3_fp32_weight", _case(7, 64, 8, 128, bias=True, weight_dtype=torch.float32, **V3)),
    Case("gpt_oss", _case(9, 32, 4, 96, linear_bias=True, scoring="softmax_topk")),
    Case("expert_scale", _case(9, 24, 4, 64, expert_scale=True, renormalize=True)),
    Case("ragged", _case(13, 11, 3, 67)),
    Case("strided_x", _case(4, 8, 2, 33, strided_x=True)),
    Case("preselected", _case(4, 12, 3, 40, preselected=True, scoring="sqrtsoftplus", renormalize=True, norm_eps=1e-20)),
    Case("no_tokens", _case(0, 8, 2, 32)),
    Case("one_token_one_expert", _case(1, 1, 1, 32)),
    Case("v3_decode", _case(1, 256, 8, 7168, bias=True, weight_dtype=torch.float32, **V3), small=False,
         bench="DeepSeek-V3 decode"),
    Case("v2_lite_4096", _case(4096, 64, 6, 2048), small=False, bench="DeepSeek-V2-Lite prefill"),
)  # fmt: skip

SPEC = OpSpec(
    name="gate",
    schema=SCHEMA,
    check=_check,
    ref=ref.gate,
    fake=_fake,
    backends={
        "ref": Backend(ref.gate),
        "cpu": Backend(_run_cpu, lambda: _native.reason_without("_gate_cpu"), _supports_cpu),
    },
    cases=CASES,
    outputs=("fp32", "ids", "fp32"),
    model=_model,
    backward=Backward(("x", "weight", "linear_bias", "expert_scale"), _backward),
    flops=lambda x, weight, **_: 2 * x.shape[0] * weight.numel(),
    bytes=lambda x, weight, **_: (
        x.numel() * x.element_size()
        + weight.numel() * weight.element_size()
        + 4 * x.shape[0] * weight.shape[0]
    ),
)
