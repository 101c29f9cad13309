"""combine: rows of (token, expert) pairs -> weighted sum per token.

T tokens, K pairs per token, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekern import _native, _op, _triton
from moekern._check import expect_dtype, expect_shape
from moekern._op import Backend, Backward, Case, OpSpec
from moekern.ops.combine import ref
from moekern.ops.route import check_ids

SCHEMA = "(Tensor y, Tensor weights, *, Tensor? ids=None, int? num_experts=None) -> Tensor"


def combine(
    y: Tensor,
    weights: Tensor,
    *,
    ids: Tensor | None = None,
    num_experts: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sums each token's pair rows, weighted.

    Args:
        y: [T*K, D] float; row t*K+k belongs to pair k of token t.
        weights: [T, K] float.
        ids: [T, K] int32 or int64; rows whose id is outside [0, E) are skipped and never read.
        num_experts: E; required with ids.
        backend: forces one backend.

    Returns:
        [T, D] in y.dtype.

    Raises:
        ValueError, TypeError: for arguments that do not fit together.

    Notes:
        The sum runs in fp32 (fp64 for fp64 rows) in the order of k and is rounded once. Differentiable in y and weights.
        Deterministic; no host sync. Traffic: the rows and weights in, T*D out.
    """
    return _op.call(SPEC, backend, y=y, weights=weights, ids=ids, num_experts=num_experts)


def _check(y: Tensor, weights: Tensor, ids: Tensor | None, num_experts: int | None) -> None:
    op = "combine"
    expect_shape(op, "weights", weights, "[T, K]", (None, None), like=y)
    expect_dtype(op, "weights", weights, "floating", weights.dtype.is_floating_point)
    expect_shape(op, "y", y, "[T*K, D]", (weights.shape[0] * weights.shape[1], None))
    expect_dtype(op, "y", y, "floating", y.dtype.is_floating_point)
    if (ids is None) != (num_experts is None):
        raise ValueError(f"{op}: ids and num_experts are given together or not at all")
    if ids is not None:
        check_ids(op, ids, weights.shape[0], like=y)
        expect_shape(op, "ids", ids, "[T, K]", tuple(weights.shape))


def _fake(y: Tensor, weights: Tensor, **_: Any) -> Tensor:
    return y.new_empty((weights.shape[0], y.shape[1]))


_cpu_leaf = _native.leaf(
    "_combine_cpu(Tensor y, Tensor weights, Tensor? ids, int num_experts, Tensor(a!) out) -> ()"
)


def _run_cpu(y: Tensor, weights: Tensor, ids: Tensor | None, num_experts: int | None) -> Tensor:
    out = _fake(y, weights)
    rows = y if y.stride(-1) == 1 else y.contiguous()
    ids = None if ids is None else ids.contiguous()
    _cpu_leaf(rows, weights.to(torch.float32).contiguous(), ids, num_experts or 0, out)
    return out


def _supports_cpu(y: Tensor, **_: Any) -> str | None:
    if y.device.type != "cpu":
        return f"y is on {y.device}"
    return None if y.dtype in SPEC.dtypes else f"dtype {y.dtype}"


def _run_triton(y: Tensor, weights: Tensor, ids: Tensor | None, num_experts: int | None) -> Tensor:
    from moekern.ops.combine import triton  # importing Triton takes 0.1 s, so it waits for the first call

    rows = y if y.stride(-1) == 1 else y.contiguous()
    ids = None if ids is None else ids.contiguous()
    return triton.run(_fake(y, weights), rows, weights.contiguous(), ids, num_experts)


def _supports_triton(y: Tensor, weights: Tensor, **_: Any) -> str | None:
    unsupported = [t.dtype for t in (y, weights) if t.dtype not in SPEC.dtypes]
    return _triton.refuses(y) or (f"dtype {unsupported[0]}" if unsupported else None)


def _backward(saved: Any, grads: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    grad_TD, y, weights, ids = grads[0], saved["y"], saved["weights"], saved["ids"]
    if grad_TD is None:
        return {}
    compute = torch.float64 if y.dtype == torch.float64 else torch.float32
    grad_T1D = grad_TD.to(compute).unsqueeze(1)
    found: dict[str, Tensor | None] = {}
    kept = None if ids is None else ((ids >= 0) & (ids < saved["num_experts"])).unsqueeze(-1)
    if "y" in saved["needs"]:
        rows = grad_T1D * weights.to(compute).unsqueeze(-1)
        found["y"] = (rows if kept is None else torch.where(kept, rows, 0.0)).flatten(0, 1).to(y.dtype)
    if "weights" in saved["needs"]:
        terms = grad_T1D * y.unflatten(0, weights.shape).to(compute)
        found["weights"] = (
            (terms if kept is None else torch.where(kept, terms, 0.0)).sum(-1).to(weights.dtype)
        )
    return found


def _model(y: Tensor, weights: Tensor, ids: Tensor | None, num_experts: int | None) -> Tensor:
    """transformers' batched_mm and grouped_mm: a product and a sum over k, in the model's dtype."""
    weighted = y * weights.reshape(-1, 1).to(y.dtype)
    if ids is not None:
        assert num_experts is not None
        weighted = weighted.masked_fill(((ids < 0) | (ids >= num_experts)).reshape(-1, 1), 0.0)
    return weighted.unflatten(0, weights.shape).sum(dim=1)


def _case(num_tokens: int, top_k: int, width: int, *, num_experts: int | None = None,
          low_precision_weights: bool = False) -> Any:  # fmt: skip
    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        y = torch.randn(num_tokens * top_k, width, generator=generator).to(device, dtype)
        weights = torch.rand(num_tokens, top_k, generator=generator).to(device)
        arguments: dict[str, Any] = {
            "y": y,
            "weights": weights.to(dtype) if low_precision_weights else weights,
        }
        if num_experts is not None:
            ids = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=generator).to(device)
            outside = ((ids < 0) | (ids >= num_experts)).reshape(-1, 1)
            # Rows that must never be read.
            arguments |= {"y": y.masked_fill(outside, float("nan")), "ids": ids, "num_experts": num_experts}
        return arguments

    return make


CASES = (
    Case("v2_lite", _case(7, 6, 2048)),
    Case("skipped_rows_are_nan", _case(23, 4, 80, num_experts=6)),
    Case("low_precision_weights", _case(13, 2, 67, low_precision_weights=True)),
    Case("k1", _case(5, 1, 33)),
    Case("width_1", _case(5, 3, 1)),
    Case("no_tokens", _case(0, 6, 64)),
    Case("one_token", _case(1, 8, 2048), bench="Qwen3-30B-A3B decode"),
    Case("prefill_4096", _case(4096, 6, 2048), small=False, bench="DeepSeek-V2-Lite prefill"),
)

SPEC = OpSpec(
    name="combine",
    schema=SCHEMA,
    check=_check,
    ref=ref.combine,
    fake=_fake,
    backends={
        "ref": Backend(ref.combine),
        "cpu": Backend(_run_cpu, lambda: _native.reason_without("_combine_cpu"), _supports_cpu),
        "triton": Backend(_run_triton, _triton.unavailable, _supports_triton),
    },
    cases=CASES,
    outputs=("model",),
    model=_model,
    backward=Backward(("y", "weights"), _backward),
    flops=lambda y, **_: 2 * y.numel(),
    bytes=lambda y, weights, **_: (
        (y.numel() + weights.shape[0] * y.shape[1]) * y.element_size()
        + weights.numel() * weights.element_size()
    ),
)
