"""grouped_gemm: rows sorted by expert, times each expert's matrix.

M rows, E experts, D width of a row, N width of a product (2F when gated: F gate and F up columns).
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from moekern import _native, _op, _triton
from moekern._check import expect_dtype, expect_shape
from moekern._op import Backend, Backward, Case, OpSpec
from moekern.ops.grouped_gemm import ref
from moekern.ops.grouped_gemm.activation import ACTIVATIONS, activate, check_activation

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor offsets, *, Tensor? gather=None, Tensor? bias=None, Tensor? row_scale=None, "
    "str activation='none', bool gated=False, bool interleaved=False, bool transposed=False, float? limit=None, "
    "float alpha=1.0, float up_shift=0.0) -> Tensor"
)


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    gather: Tensor | None = None,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_shift: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Multiplies each expert's rows with its matrix; activation and row scale in the same pass.

    Args:
        x: [M, D] float, or any number of rows when `gather` is given.
        weight: [E, N, D] as nn.Linear stores it, or [E, D, N] with `transposed`; the last dimension contiguous, the
            other strides free.
        offsets: [E+1] int32, ascending; rows offsets[e]:offsets[e+1] belong to expert e.
        gather: [M] int32; row i is x[gather[i]]; an index outside x gives a row of zeros.
        bias: [E, N], added to the product.
        row_scale: [M] float, multiplies the finished row.
        activation: "none", "silu", "gelu", "gelu_tanh", "relu" or "relu2".
        gated: the product holds gate and up columns, the result is act(gate) * (up + up_shift).
        interleaved: even columns are gate, odd are up; otherwise the first half is gate.
        transposed: layout of `weight`.
        limit: gate = min(gate, limit), up = clamp(up, -limit, limit); not gated: clamp(product, -limit, limit).
        alpha: silu is g * sigmoid(alpha * g).
        up_shift: added to up.
        backend: forces one backend.

    Returns:
        [M, N], or [M, N/2] when gated, in x.dtype. Rows outside every segment are 0.

    Raises:
        ValueError, TypeError: for arguments that do not fit together, or a weight whose last dimension is strided.

    Notes:
        Accumulates in fp32 (fp64 for fp64 inputs), rounds once. Differentiable in x, weight, bias and row_scale.
        Deterministic; no host sync. Traffic: the matrices of the experts that have rows, the rows in and out.
    """
    return _op.call(
        SPEC, backend, x=x, weight=weight, offsets=offsets, gather=gather, bias=bias, row_scale=row_scale,
        activation=activation, gated=gated, interleaved=interleaved, transposed=transposed, limit=limit, alpha=alpha,
        up_shift=up_shift,
    )  # fmt: skip


def check_weight(
    op: str, name: str, weight: Tensor, letters: str, shape: tuple[int | None, ...], like: Tensor
) -> None:
    """The check of expert matrices that the expert ops share: shape, dtype, device and a contiguous last dimension."""
    expect_shape(op, name, weight, letters, shape, like=like)
    expect_dtype(op, name, weight, "{} like x", weight.dtype == like.dtype, like.dtype)
    if weight.stride(2) != 1 and weight.shape[2] > 1:
        raise ValueError(
            f"{op}: {name} must have a contiguous last dimension (call .contiguous() once, not per call); "
            f"got strides {tuple(weight.stride())}"
        )


def check_bias(
    op: str, name: str, bias: Tensor | None, letters: str, shape: tuple[int, ...], like: Tensor
) -> None:
    if bias is not None:
        expect_shape(op, name, bias, letters, shape, like=like)
        expect_dtype(op, name, bias, "{} like x", bias.dtype == like.dtype, like.dtype)


def _check(x: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None, bias: Tensor | None,
           row_scale: Tensor | None, activation: str, gated: bool, interleaved: bool, transposed: bool,
           limit: float | None, alpha: float, up_shift: float) -> None:  # fmt: skip
    op = "grouped_gemm"
    expect_shape(op, "x", x, "[M, D]", (None, None))
    expect_dtype(op, "x", x, "floating", x.dtype.is_floating_point)
    letters, shape = (
        ("[E, D, N]", (None, x.shape[1], None)) if transposed else ("[E, N, D]", (None, None, x.shape[1]))
    )
    check_weight(op, "weight", weight, letters, shape, x)
    num_experts, width = weight.shape[0], weight.shape[2 if transposed else 1]
    if gated and width % 2 != 0:
        raise ValueError(f"{op}: weight must have an even N when gated; got {width}")
    for name, value, size in (("offsets", offsets, num_experts + 1), ("gather", gather, None)):
        if value is not None:
            expect_shape(op, name, value, "[E+1]" if size else "[M]", (size,), like=x)
            expect_dtype(op, name, value, "int32", value.dtype == torch.int32)
    check_bias(op, "bias", bias, "[E, N]", (num_experts, width), x)
    if row_scale is not None:
        expect_shape(op, "row_scale", row_scale, "[M]", ((x if gather is None else gather).shape[0],), like=x)
        expect_dtype(op, "row_scale", row_scale, "floating", row_scale.dtype.is_floating_point)
    check_activation(op, activation, gated, interleaved, limit, alpha, up_shift)


def _fake(
    x: Tensor, weight: Tensor, gather: Tensor | None, gated: bool, transposed: bool, **_: Any
) -> Tensor:
    width = weight.shape[2 if transposed else 1] // (2 if gated else 1)
    return x.new_empty(((x if gather is None else gather).shape[0], width))


_cpu_leaf = _native.leaf(
    "_grouped_gemm_cpu(Tensor x, Tensor weight, Tensor offsets, Tensor? gather, Tensor? bias, Tensor? row_scale, "
    "int activation, bool gated, bool interleaved, bool transposed, float limit, float alpha, float up_shift, "
    "Tensor(a!) out) -> ()"
)


def rows_contiguous(x: Tensor) -> Tensor:
    """x with contiguous rows, any distance apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _run_cpu(x: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None, bias: Tensor | None,
             row_scale: Tensor | None, activation: str, gated: bool, interleaved: bool, transposed: bool,
             limit: float | None, alpha: float, up_shift: float) -> Tensor:  # fmt: skip
    out = _fake(x, weight, gather, gated, transposed)
    gather = None if gather is None else gather.contiguous()
    bias = None if bias is None else rows_contiguous(bias)
    row_scale = None if row_scale is None else row_scale.to(torch.float32).contiguous()
    _cpu_leaf(rows_contiguous(x), weight, offsets.contiguous(), gather, bias, row_scale, ACTIVATIONS.index(activation),
              gated, interleaved, transposed, math.inf if limit is None else limit, alpha, up_shift, out)  # fmt: skip
    return out


def _run_triton(x: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None, bias: Tensor | None,
                row_scale: Tensor | None, **rest: Any) -> Tensor:  # fmt: skip
    from moekern.ops.grouped_gemm import (
        triton,
    )  # importing Triton takes 0.1 s, so it waits for the first call

    return triton.run(
        rows_contiguous(x), weight, offsets.contiguous(), gather=None if gather is None else gather.contiguous(),
        bias=None if bias is None else rows_contiguous(bias),
        row_scale=None if row_scale is None else row_scale.contiguous(), **rest,
    )  # fmt: skip


def _supports_triton(x: Tensor, **_: Any) -> str | None:
    return _triton.refuses(x) or (None if x.dtype in SPEC.dtypes else f"dtype {x.dtype}")


def supports_cpu(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    return None if x.dtype in dtypes else f"dtype {x.dtype}"


def _supports_cpu(x: Tensor, **_: Any) -> str | None:
    return supports_cpu(x, SPEC.dtypes)


_DIFFERENTIABLE = ("x", "weight", "bias", "row_scale")


def backward_in_triton(x: Tensor, backend: str | None) -> bool:
    """Whether a gradient comes from the Triton kernels: as the forward, but other backends have that of ref."""
    forced = backend or os.environ.get("MOEKERN_BACKEND") or None
    if forced != "triton" and (forced is not None or x.device.type != "cuda"):
        return False
    return _triton.unavailable() is None and _supports_triton(x) is None


def _run_backward(*args: Any) -> list[Tensor]:
    *arguments, backend = args
    if not backward_in_triton(arguments[1], backend):
        return ref.grouped_gemm_backward(*arguments)
    from moekern.ops.grouped_gemm.backward import grouped_gemm_backward  # imports Triton

    return grouped_gemm_backward(*arguments)


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None,
                   bias: Tensor | None, row_scale: Tensor | None, *rest: Any) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(t, memory_format=torch.contiguous_format)
            for t, need in zip((x, weight, bias, row_scale), rest[-2], strict=True)
            if need and t is not None]  # fmt: skip


# An op of its own, so that a compiler does not trace into the loop over segments.
_op._define(
    "_grouped_gemm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor offsets, Tensor? gather, Tensor? bias, Tensor? row_scale, "
    "str activation, bool gated, bool interleaved, bool transposed, float? limit, float alpha, float up_shift, "
    "bool[] needs, str? backend) -> Tensor[]",
    _run_backward,
    _backward_fake,
)


def _backward(saved: Any, grads: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    if grads[0] is None:
        return {}
    needs = [name in saved["needs"] for name in _DIFFERENTIABLE]
    found = torch.ops.moekern._grouped_gemm_backward(
        grads[0], *(saved[n] for n in SPEC.arguments), needs, saved.get("backend")
    )
    return dict(zip((n for n, need in zip(_DIFFERENTIABLE, needs, strict=True) if need), found, strict=True))


def _model(x: Tensor, weight: Tensor, offsets: Tensor, gather: Tensor | None, bias: Tensor | None,
           row_scale: Tensor | None, activation: str, gated: bool, interleaved: bool, transposed: bool,
           limit: float | None, alpha: float, up_shift: float) -> Tensor:  # fmt: skip
    """The same loop in the model's dtype, every intermediate rounded to it, as in an experts class of transformers."""
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    out = x.new_zeros((num_rows, weight.shape[2 if transposed else 1] // (2 if gated else 1)))
    for e, rows in ref.segments(offsets, num_rows):
        z = ref.linear(
            ref.rows_of(x, gather, rows).to(x.dtype), weight[e], None if bias is None else bias[e], transposed
        )
        y = activate(z, activation, gated, interleaved, limit, alpha, up_shift)
        out[rows] = y if row_scale is None else (y * row_scale[rows, None]).to(x.dtype)
    return out


def make_weight(generator: torch.Generator, num_experts: int, n: int, d: int, transposed: bool, strided: bool,
                dtype: torch.dtype, device: torch.device) -> Tensor:  # fmt: skip
    """Random matrices of scale 1.5/sqrt(fan_in); `strided`: a slice of a larger tensor, in experts, rows and columns."""
    shape = (num_experts, d, n) if transposed else (num_experts, n, d)
    if strided:
        whole = torch.randn(shape[0] * 2, shape[1] + 3, shape[2] + 5, generator=generator)
        value = (whole * (1.5 * d**-0.5)).to(device, dtype)[1::2, 1 : 1 + shape[1], 2 : 2 + shape[2]]
        return value
    value = torch.empty(shape, dtype=dtype)
    for e in range(num_experts):  # one expert at a time: a layer of a real model in fp32 would be gigabytes
        value[e] = torch.randn(shape[1:], generator=generator) * (1.5 * d**-0.5)
    return value.to(device)


def _case(counts: tuple[int, ...], d: int, n: int, *, tail: int = 0, gather: int | None = None, bias: bool = False,
          row_scale: bool = False, transposed: bool = False, strided: bool = False, **kwargs: Any) -> Any:  # fmt: skip
    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        num_rows = sum(counts) + tail
        arguments: dict[str, Any] = {
            "x": torch.randn(gather or num_rows, d, generator=generator).to(device, dtype),
            "weight": make_weight(generator, len(counts), n, d, transposed, strided, dtype, device),
            "offsets": torch.tensor((0, *counts)).cumsum(0).int().to(device),
            "transposed": transposed,
            **kwargs,
        }
        if gather is not None:
            index = torch.randint(0, gather, (num_rows,), generator=generator, dtype=torch.int32)
            index[: min(2, num_rows)] = torch.tensor([-1, gather], dtype=torch.int32)[:num_rows]
            arguments["gather"] = index.to(device)
        if bias:
            arguments["bias"] = torch.randn(len(counts), n, generator=generator).to(device, dtype)
        if row_scale:
            arguments["row_scale"] = torch.rand(num_rows, generator=generator).to(device)
        return arguments

    return make


CASES = (
    Case("plain", _case((3, 0, 17, 1), 64, 48)),
    Case("gated_silu", _case((3, 0, 17, 1), 64, 96, gated=True, activation="silu")),
    Case("gather_tail", _case((2, 5, 0), 32, 40, tail=3, gather=6)),
    Case("ragged_all_options", _case((5, 2, 20), 50, 74, tail=2, gather=9, bias=True, row_scale=True, gated=True,
                                     interleaved=True, activation="silu", limit=1.5, alpha=1.702, up_shift=1.0)),
    Case("transposed_bias_gpt_oss", _case((4, 1, 18), 48, 64, transposed=True, bias=True, gated=True, interleaved=True,
                                          activation="silu", limit=7.0, alpha=1.702, up_shift=1.0)),
    Case("transposed_ragged", _case((4, 1, 19), 37, 51, transposed=True, row_scale=True)),
    Case("strided_weight", _case((4, 2), 40, 24, strided=True)),
    Case("not_gated_gelu_bias", _case((1, 7), 64, 33, bias=True, activation="gelu")),
    Case("gated_gelu_tanh", _case((6, 2), 32, 64, gated=True, activation="gelu_tanh")),
    Case("not_gated_relu2_limit", _case((6, 2), 32, 64, activation="relu2", limit=0.5)),
    Case("gated_relu", _case((6, 2), 32, 64, gated=True, activation="relu")),
    Case("all_to_one_expert", _case((0, 0, 33, 0, 0), 64, 32)),
    Case("no_rows", _case((0, 0, 0), 64, 32)),
    Case("one_row", _case((0, 1, 0), 64, 32)),
    Case("v2_lite_up_64", _case((6,) * 64, 2048, 2816, gated=True, activation="silu"), small=False,
         bench="DeepSeek-V2-Lite up, 64 tokens"),
)  # fmt: skip


def _rows(x: Tensor, offsets: Tensor, gather: Tensor | None) -> int:
    return min(int(offsets[-1]), (x if gather is None else gather).shape[0])


SPEC = OpSpec(
    name="grouped_gemm",
    schema=SCHEMA,
    check=_check,
    ref=ref.grouped_gemm,
    fake=_fake,
    backends={
        "ref": Backend(ref.grouped_gemm),
        "cpu": Backend(_run_cpu, lambda: _native.reason_without("_grouped_gemm_cpu"), _supports_cpu),
        "triton": Backend(_run_triton, _triton.unavailable, _supports_triton),
    },
    cases=CASES,
    outputs=("model",),
    model=_model,
    backward=Backward(_DIFFERENTIABLE, _backward),
    flops=lambda x, weight, offsets, gather=None, **_: 2 * _rows(x, offsets, gather) * weight[0].numel(),
    bytes=lambda x, weight, offsets, gather=None, gated=False, **_: x.element_size() * (
        int((offsets.diff() > 0).sum()) * weight[0].numel() + _rows(x, offsets, gather) * (
            x.shape[1] + weight[0].numel() // x.shape[1] // (2 if gated else 1))),
)  # fmt: skip
