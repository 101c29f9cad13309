"""fused_experts: the whole expert layer in one op.

T tokens, E experts, K selected experts per token, D model width, F expert width; a pair is one (token, selected expert).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moekern import _native, _op, _triton
from moekern._check import expect_dtype, expect_shape
from moekern._op import Backend, Backward, OpSpec
from moekern.ops.fused_experts import ref
from moekern.ops.fused_experts.cases import CASES
from moekern.ops.grouped_gemm import (
    backward_in_triton,
    check_bias,
    check_weight,
    rows_contiguous,
    supports_cpu,
)
from moekern.ops.grouped_gemm.activation import ACTIVATIONS, activate, check_activation
from moekern.ops.grouped_gemm.ref import linear
from moekern.ops.route import check_ids

SCHEMA = (
    "(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor ids, *, Tensor? b_gate_up=None, "
    "Tensor? b_down=None, str activation='silu', bool gated=True, bool interleaved=False, bool transposed=False, "
    "float? limit=None, float alpha=1.0, float up_shift=0.0, bool reduce=True) -> Tensor"
)


def fused_experts(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_shift: float = 0.0,
    reduce: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Runs each token through its selected experts and sums the results, weighted.

    Args:
        x: [T, D] float.
        w_gate_up: [E, 2F, D] ([E, F, D] when not gated), or [E, D, 2F] with `transposed`; the last dimension contiguous,
            the other strides free.
        w_down: [E, D, F], or [E, F, D] with `transposed`; likewise.
        weights: [T, K] float routing weights.
        ids: [T, K] int32 or int64. A pair whose id is outside [0, E) costs nothing and contributes nothing.
        b_gate_up: [E, 2F] or [E, F].
        b_down: [E, D].
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu2" or "none".
        gated: h = act(gate) * (up + up_shift); otherwise h = act(x w^T).
        interleaved: even columns of the first product are gate, odd are up; otherwise the first half is gate.
        transposed: layout of both weights.
        limit: gate = min(gate, limit), up = clamp(up, -limit, limit); not gated: clamp(product, -limit, limit).
        alpha: silu is g * sigmoid(alpha * g).
        up_shift: added to up.
        reduce: False returns the unweighted pair rows for a later `combine`.
        backend: forces one backend.

    Returns:
        [T, D] in x.dtype; with reduce=False [T*K, D], row t*K+k for pair k of token t, 0 where skipped.

    Raises:
        ValueError, TypeError: for arguments that do not fit together, or a weight whose last dimension is strided.

    Notes:
        Products accumulate in fp32; h and the pair rows are each rounded once to x.dtype, then summed in fp32 in the
        order of k. Same numbers as route, grouped_gemm, grouped_gemm and combine. Differentiable in x, both weights, both
        biases and the routing weights. Deterministic; no host sync. Traffic: each selected expert's matrices once.

    Source: Mixtral (arXiv 2401.04088) section 2.1; DeepSeekMoE (arXiv 2401.06066) section 3; clamped SwiGLU: gpt-oss
    (`swiglu_limit`).
    """
    return _op.call(
        SPEC, backend, x=x, w_gate_up=w_gate_up, w_down=w_down, weights=weights, ids=ids, b_gate_up=b_gate_up,
        b_down=b_down, activation=activation, gated=gated, interleaved=interleaved, transposed=transposed, limit=limit,
        alpha=alpha, up_shift=up_shift, reduce=reduce,
    )  # fmt: skip


def _check(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor, b_gate_up: Tensor | None,
           b_down: Tensor | None, activation: str, gated: bool, interleaved: bool, transposed: bool,
           limit: float | None, alpha: float, up_shift: float, reduce: bool) -> None:  # fmt: skip
    op = "fused_experts"
    expect_shape(op, "x", x, "[T, D]", (None, None))
    expect_dtype(op, "x", x, "floating", x.dtype.is_floating_point)
    num_tokens, d = x.shape
    if transposed:
        check_weight(op, "w_down", w_down, "[E, F, D]", (None, None, d), x)
        num_experts, f = w_down.shape[:2]
    else:
        check_weight(op, "w_down", w_down, "[E, D, F]", (None, d, None), x)
        num_experts, f = w_down.shape[0], w_down.shape[2]
    n, letter = (2 * f, "2F") if gated else (f, "F")
    if transposed:
        check_weight(op, "w_gate_up", w_gate_up, f"[E, D, {letter}]", (num_experts, d, n), x)
    else:
        check_weight(op, "w_gate_up", w_gate_up, f"[E, {letter}, D]", (num_experts, n, d), x)
    check_ids(op, ids, num_tokens, like=x)
    expect_shape(op, "weights", weights, "[T, K]", tuple(ids.shape), like=x)
    expect_dtype(op, "weights", weights, "floating", weights.dtype.is_floating_point)
    check_bias(op, "b_gate_up", b_gate_up, f"[E, {letter}]", (num_experts, n), x)
    check_bias(op, "b_down", b_down, "[E, D]", (num_experts, d), x)
    check_activation(op, activation, gated, interleaved, limit, alpha, up_shift)


def _fake(x: Tensor, ids: Tensor, reduce: bool, **_: Any) -> Tensor:
    return x.new_empty((x.shape[0] if reduce else x.shape[0] * ids.shape[1], x.shape[1]))


_cpu_leaf = _native.leaf(
    "_fused_experts_cpu(Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor ids, Tensor? b_gate_up, "
    "Tensor? b_down, int activation, bool gated, bool interleaved, bool transposed, float limit, float alpha, "
    "float up_shift, Tensor(a!) rows, Tensor(b!)? out) -> ()"
)


def _run_cpu(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor, b_gate_up: Tensor | None,
             b_down: Tensor | None, activation: str, gated: bool, interleaved: bool, transposed: bool,
             limit: float | None, alpha: float, up_shift: float, reduce: bool) -> Tensor:  # fmt: skip
    rows = x.new_empty((ids.numel(), x.shape[1]))
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if reduce else None
    b_gate_up, b_down = (None if b is None else rows_contiguous(b) for b in (b_gate_up, b_down))
    _cpu_leaf(rows_contiguous(x), w_gate_up, w_down, weights.to(torch.float32).contiguous(), ids.contiguous(), b_gate_up,
              b_down, ACTIVATIONS.index(activation), gated, interleaved, transposed,
              math.inf if limit is None else limit, alpha, up_shift, rows, out)  # fmt: skip
    return rows if out is None else out


def _supports_cpu(x: Tensor, **_: Any) -> str | None:
    return supports_cpu(x, SPEC.dtypes)


def _run_triton(x: Tensor, weights: Tensor, ids: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None,
                **arguments: Any) -> Tensor:  # fmt: skip
    from moekern.ops.fused_experts import (
        triton,
    )  # importing Triton takes 0.1 s, so it waits for the first call

    b_gate_up, b_down = (None if b is None else rows_contiguous(b) for b in (b_gate_up, b_down))
    return triton.run(rows_contiguous(x), weights=weights.contiguous(), ids=ids.contiguous(), b_gate_up=b_gate_up,
                      b_down=b_down, **arguments)  # fmt: skip


def _supports_triton(x: Tensor, **_: Any) -> str | None:
    return _triton.refuses(x) or (None if x.dtype in SPEC.dtypes else f"dtype {x.dtype}")


_DIFFERENTIABLE = ("x", "w_gate_up", "w_down", "weights", "b_gate_up", "b_down")


def _run_backward(*args: Any) -> list[Tensor]:
    *arguments, backend = args
    if not backward_in_triton(arguments[1], backend):
        return ref.fused_experts_backward(*arguments)
    from moekern.ops.fused_experts.triton_backward import fused_experts_backward  # imports Triton

    return fused_experts_backward(*arguments)


def _backward_fake(grad: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor,
                   b_gate_up: Tensor | None, b_down: Tensor | None, *rest: Any) -> list[Tensor]:  # fmt: skip
    inputs = (x, w_gate_up, w_down, weights, b_gate_up, b_down)
    return [torch.empty_like(t, memory_format=torch.contiguous_format)
            for t, need in zip(inputs, rest[-2], strict=True) if need and t is not None]  # fmt: skip


# An op of its own, so that a compiler does not trace into the loop over experts.
_op._define(
    "_fused_experts_backward",
    "(Tensor grad, Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor ids, Tensor? b_gate_up, "
    "Tensor? b_down, str activation, bool gated, bool interleaved, bool transposed, float? limit, float alpha, "
    "float up_shift, bool reduce, bool[] needs, str? backend) -> Tensor[]",
    _run_backward,
    _backward_fake,
)


def _backward(saved: Any, grads: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    if grads[0] is None:
        return {}
    needs = [name in saved["needs"] for name in _DIFFERENTIABLE]
    found = torch.ops.moekern._fused_experts_backward(
        grads[0], *(saved[n] for n in SPEC.arguments), needs, saved.get("backend")
    )
    return dict(zip((n for n, need in zip(_DIFFERENTIABLE, needs, strict=True) if need), found, strict=True))


def _model(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, ids: Tensor, b_gate_up: Tensor | None,
           b_down: Tensor | None, activation: str, gated: bool, interleaved: bool, transposed: bool,
           limit: float | None, alpha: float, up_shift: float, reduce: bool) -> Tensor:  # fmt: skip
    """The loop over experts of transformers' experts classes (DeepseekV2Experts.forward), in the model's dtype."""
    out = torch.zeros_like(x) if reduce else x.new_zeros((ids.numel(), x.shape[1]))
    for e, pairs in ref.pairs_by_expert(ids, w_gate_up.shape[0]):
        tokens = pairs // ids.shape[1]
        z = linear(x[tokens], w_gate_up[e], None if b_gate_up is None else b_gate_up[e], transposed)
        h = activate(z, activation, gated, interleaved, limit, alpha, up_shift)
        y = linear(h, w_down[e], None if b_down is None else b_down[e], transposed)
        if reduce:
            out.index_add_(0, tokens, (y * weights.reshape(-1)[pairs, None]).to(x.dtype))
        else:
            out[pairs] = y
    return out


def _distinct(ids: Tensor, num_experts: int) -> int:
    """Experts with at least one pair."""
    return int(ids[(ids >= 0) & (ids < num_experts)].unique().numel())


def _flops(w_gate_up: Tensor, w_down: Tensor, ids: Tensor, **_: Any) -> int:
    num_pairs = int(((ids >= 0) & (ids < w_gate_up.shape[0])).sum())
    return 2 * num_pairs * (w_gate_up[0].numel() + w_down[0].numel())


def _bytes(x: Tensor, w_gate_up: Tensor, w_down: Tensor, ids: Tensor, reduce: bool = True, **_: Any) -> int:
    matrices = _distinct(ids, w_gate_up.shape[0]) * (w_gate_up[0].numel() + w_down[0].numel())
    rows = x.shape[0] * (1 + (1 if reduce else ids.shape[1]))
    return (matrices + rows * x.shape[1]) * x.element_size()


SPEC = OpSpec(
    name="fused_experts",
    schema=SCHEMA,
    check=_check,
    ref=ref.fused_experts,
    fake=_fake,
    backends={
        "ref": Backend(ref.fused_experts),
        "cpu": Backend(_run_cpu, lambda: _native.reason_without("_fused_experts_cpu"), _supports_cpu),
        "triton": Backend(_run_triton, _triton.unavailable, _supports_triton),
    },
    cases=CASES,
    outputs=("model",),
    model=_model,
    backward=Backward(_DIFFERENTIABLE, _backward),
    flops=_flops,
    bytes=_bytes,
)
