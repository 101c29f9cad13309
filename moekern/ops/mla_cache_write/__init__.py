"""mla_cache_write: kv_a_layernorm, rotary embedding and the write into the latent cache.

T tokens, R latent rank, P rope width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekern import _native, _op, _triton
from moekern._check import expect_dtype, expect_rows, expect_shape
from moekern._op import Backend, Case, OpSpec
from moekern.ops.mla_cache_write import ref

MAX_TRITON_RANK = 8192  # a row is held in the registers of at most 8 warps, 32 values a lane

SCHEMA = (
    "(Tensor kv, Tensor norm_weight, Tensor cos, Tensor sin, Tensor(a!) latent_cache, Tensor(b!) rope_cache, "
    "Tensor slots, *, float eps=1e-06, str rope='interleaved') -> ()"
)


def mla_cache_write(
    kv: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    slots: Tensor,
    *,
    eps: float = 1e-6,
    rope: str = "interleaved",
    backend: str | None = None,
) -> None:
    """Normalises new latents, rotates their shared keys and writes both into the cache.

    Args:
        kv: [T, R + P], the output of `kv_a_proj_with_mqa`.
        norm_weight: [R], the weight of `kv_a_layernorm`.
        cos: [T, P / 2] or [T, P] float; of P columns the first half is used (transformers repeats the angles).
        sin: like cos.
        latent_cache: [num_slots, R], written in place.
        rope_cache: [num_slots, P], written in place.
        slots: int32 or int64 [T], the row of each token; slots outside [0, num_slots) are skipped. No two tokens
            may have the same slot.
        eps: of the RMS norm.
        rope: "interleaved": pairs (2i, 2i + 1) rotated in place (DeepSeek-V2); "deinterleave": pairs in, halves out
            (DeepSeek-V3 with rope_interleave); "half": pairs (i, i + P / 2).
        backend: forces one backend.

        kv, norm_weight and the caches have one dtype; rows are contiguous.

    Raises:
        ValueError, TypeError: for arguments that do not fit together.

    Notes:
        fp32 inside; the normalised latent is rounded to kv's dtype before the product with norm_weight, as in
        transformers. Deterministic; no host sync. Traffic: kv in, as much out.

    Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1.3 and equations 9 and 15.
    """
    _op.call(
        SPEC,
        backend,
        kv=kv,
        norm_weight=norm_weight,
        cos=cos,
        sin=sin,
        latent_cache=latent_cache,
        rope_cache=rope_cache,
        slots=slots,
        eps=eps,
        rope=rope,
    )


def _check(
    kv: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    slots: Tensor,
    eps: float,
    rope: str,
) -> None:
    op = "mla_cache_write"
    expect_shape(op, "kv", kv, "[T, R + P]", (None, None))
    expect_dtype(op, "kv", kv, "floating", kv.dtype.is_floating_point)
    tokens, width = kv.shape
    expect_shape(op, "norm_weight", norm_weight, "[R]", (None,), like=kv)
    rank = norm_weight.shape[0]
    if not 1 <= rank <= width:
        raise ValueError(f"{op}: norm_weight must have 1..{width} (R + P) values; got {rank}")
    dim = width - rank
    if dim % 2 != 0:
        raise ValueError(f"{op}: P = kv's width - R must be even; got {width} - {rank}")
    expect_shape(op, "latent_cache", latent_cache, "[num_slots, R]", (None, rank), like=kv)
    expect_shape(op, "rope_cache", rope_cache, "[num_slots, P]", (latent_cache.shape[0], dim), like=kv)
    for name, value in (("cos", cos), ("sin", sin)):
        expect_shape(op, name, value, "[T, P / 2 or P]", (tokens, None), like=kv)
        expect_dtype(op, name, value, "floating", value.dtype.is_floating_point)
        if value.shape[1] not in (dim // 2, dim):
            raise ValueError(
                f"{op}: {name} must have P / 2 = {dim // 2} or P = {dim} columns; got {value.shape[1]}"
            )
    expect_shape(op, "slots", slots, "[T]", (tokens,), like=kv)
    expect_dtype(op, "slots", slots, "int32 or int64", slots.dtype in (torch.int32, torch.int64))
    for name, value in (
        ("norm_weight", norm_weight),
        ("latent_cache", latent_cache),
        ("rope_cache", rope_cache),
    ):
        expect_dtype(op, name, value, "of kv's dtype {}", value.dtype == kv.dtype, kv.dtype)
    for name, value in (("kv", kv), ("norm_weight", norm_weight), ("latent_cache", latent_cache),
                        ("rope_cache", rope_cache)):  # fmt: skip
        expect_rows(op, name, value)
    if rope not in ref.ROPES:
        raise ValueError(f"{op}: rope must be one of {', '.join(ref.ROPES)}; got {rope!r}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be >= 0; got {eps}")


_cpu_leaf = _native.leaf(
    "_mla_cache_write_cpu(Tensor kv, Tensor norm_weight, Tensor cos, Tensor sin, Tensor slots, float eps, int layout, "
    "Tensor(a!) latent_cache, Tensor(b!) rope_cache) -> ()"
)


def _fp32_rows(value: Tensor) -> Tensor:
    value = value.to(torch.float32)
    return value if value.stride(-1) == 1 else value.contiguous()


def _run_cpu(kv: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, latent_cache: Tensor, rope_cache: Tensor,
             slots: Tensor, eps: float, rope: str) -> None:  # fmt: skip
    _cpu_leaf(kv, norm_weight, _fp32_rows(cos), _fp32_rows(sin), slots.contiguous(), eps, ref.ROPES.index(rope),
              latent_cache, rope_cache)  # fmt: skip


def _supports_cpu(kv: Tensor, **_: Any) -> str | None:
    if kv.device.type != "cpu":
        return f"kv is on {kv.device}"
    return None if kv.dtype in SPEC.dtypes else f"dtype {kv.dtype}"


def _run_triton(kv: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, latent_cache: Tensor, rope_cache: Tensor,
                slots: Tensor, eps: float, rope: str) -> None:  # fmt: skip
    if slots.shape[0] > 0 and latent_cache.shape[0] > 0:
        from moekern.ops.mla_cache_write import (
            triton,
        )  # importing Triton takes 0.1 s, so it waits for the first call

        triton.run(kv, norm_weight, cos, sin, latent_cache, rope_cache, slots, eps, rope)


def _supports_triton(kv: Tensor, norm_weight: Tensor, **_: Any) -> str | None:
    if norm_weight.shape[0] > MAX_TRITON_RANK:
        return f"R = {norm_weight.shape[0]} exceeds {MAX_TRITON_RANK}"
    return _triton.refuses(kv) or (None if kv.dtype in SPEC.dtypes else f"dtype {kv.dtype}")


def _case(
    tokens: int, *, rank: int = 512, dim: int = 64, spare: int = 5, rope: str = "interleaved", wide: bool = False,
    angle_dtype: torch.dtype | None = torch.float32, outside: bool = False, joint: bool = False,
) -> Any:  # fmt: skip
    """wide: cos and sin of P columns. outside: some slots are no rows of the cache. joint: one [num_slots, R + P]."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        num_slots = tokens + spare
        kv = torch.randn(tokens, rank + dim, generator=generator).to(device, dtype)
        weight = (torch.rand(rank, generator=generator) + 0.5).to(device, dtype)
        angle = torch.rand(tokens, dim // 2, generator=generator) * 6.28
        angle = angle.repeat(1, 2) if wide else angle
        cache = torch.randn(num_slots, rank + dim, generator=generator).to(device, dtype)
        latent_cache, rope_cache = cache[:, :rank], cache[:, rank:]
        if not joint:
            latent_cache, rope_cache = latent_cache.contiguous(), rope_cache.contiguous()
        slots = torch.randperm(num_slots, generator=generator)[:tokens]
        if outside:
            slots[0::3], slots[1::3] = -1, num_slots
        cos, sin = (t.to(device, angle_dtype or dtype) for t in (angle.cos(), angle.sin()))
        return {"kv": kv, "norm_weight": weight, "cos": cos, "sin": sin, "latent_cache": latent_cache,
                "rope_cache": rope_cache, "slots": slots.to(device), "rope": rope}  # fmt: skip

    return make


CASES = (
    Case("v2_lite", _case(7)),
    Case("v2_lite_decode", _case(1), bench="DeepSeek-V2-Lite decode"),
    Case("v3_deinterleave", _case(9, rope="deinterleave", wide=True, angle_dtype=None)),
    Case("half_minicpm3", _case(5, rank=256, dim=32, rope="half", wide=True, angle_dtype=None)),
    Case("half_narrow_angles", _case(5, rank=256, dim=32, rope="half")),
    Case("skipped_slots", _case(11, outside=True)),
    Case("joint_cache", _case(6, rank=64, dim=32, joint=True)),
    Case("odd_widths", _case(6, rank=37, dim=6, rope="deinterleave")),
    Case("no_rope", _case(3, rank=64, dim=0)),
    Case("no_tokens", _case(0, rank=64, dim=32)),
    Case("prefill_4k", _case(4096), small=False, bench="DeepSeek-V2-Lite prefill 4096"),
)

SPEC = OpSpec(
    name="mla_cache_write",
    schema=SCHEMA,
    check=_check,
    ref=ref.mla_cache_write,
    fake=lambda **_: None,
    model=ref.model,
    backends={
        "ref": Backend(ref.mla_cache_write),
        "cpu": Backend(_run_cpu, lambda: _native.reason_without("_mla_cache_write_cpu"), _supports_cpu),
        "triton": Backend(_run_triton, _triton.unavailable, _supports_triton),
    },
    cases=CASES,
    outputs=(),
    flops=lambda kv, **_: 6 * kv.numel(),
    bytes=lambda kv, norm_weight, **_: (2 * kv.numel() + norm_weight.numel()) * kv.element_size(),
)
