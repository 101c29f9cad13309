"""mla_decompress: latents and rotary keys -> the keys and values of all heads.

B batch, S tokens, H heads, R latent rank, N nope width, P rope width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moekern import _native, _op, _triton
from moekern._check import expect_dtype, expect_rows, expect_shape
from moekern._op import Backend, Backward, Case, OpSpec
from moekern.ops.mla_decompress import ref

SCHEMA = "(Tensor latent, Tensor k_rope, Tensor w_kv_b, int num_heads, int nope_dim, *, int v_width=0) -> (Tensor, Tensor)"


def mla_decompress(
    latent: Tensor,
    k_rope: Tensor,
    w_kv_b: Tensor,
    num_heads: int,
    nope_dim: int,
    *,
    v_width: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Expands the latent cache into keys and values: `kv_b_proj`, the split and the concatenation in one op.

    Args:
        latent: [B, S, R], the normalised latents.
        k_rope: [B, S, P], the rotated keys that all heads share. P may be 0.
        w_kv_b: [H * (N + V), R], the weight of `kv_b_proj`: per head N rows for the key, then V for the value.
        num_heads: H.
        nope_dim: N.
        v_width: v is padded with zeros to this width. Attention kernels that need V as wide as K (torch's CPU
            flash attention, whose fallback materialises the scores) take N + P.
        backend: forces one backend.

        The three tensors have one dtype and a contiguous last dimension; other strides are free.

    Returns:
        k [B, H, S, N + P] and v [B, H, S, max(V, v_width)], contiguous.

    Raises:
        ValueError, TypeError: for arguments that do not fit together.

    Notes:
        fp32 accumulation, rounded once. Differentiable in latent, k_rope and w_kv_b. Deterministic; no host sync.
        Traffic: latent, k_rope and w_kv_b in, k and v out.

    Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1.2, equations 10, 11 and 14.
    """
    return _op.call(
        SPEC,
        backend,
        latent=latent,
        k_rope=k_rope,
        w_kv_b=w_kv_b,
        num_heads=num_heads,
        nope_dim=nope_dim,
        v_width=v_width,
    )


def _check(
    latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, num_heads: int, nope_dim: int, v_width: int
) -> None:
    op = "mla_decompress"
    expect_shape(op, "latent", latent, "[B, S, R]", (None, None, None))
    expect_dtype(op, "latent", latent, "floating", latent.dtype.is_floating_point)
    expect_shape(op, "k_rope", k_rope, "[B, S, P]", (*latent.shape[:2], None), like=latent)
    expect_shape(op, "w_kv_b", w_kv_b, "[H * (N + V), R]", (None, latent.shape[2]), like=latent)
    if num_heads < 1:
        raise ValueError(f"{op}: num_heads must be at least 1; got {num_heads}")
    if nope_dim < 0:
        raise ValueError(f"{op}: nope_dim must be >= 0; got {nope_dim}")
    rows = w_kv_b.shape[0]
    if rows % num_heads != 0 or rows // num_heads <= nope_dim:
        raise ValueError(
            f"{op}: w_kv_b must have H * (N + V) rows with H = {num_heads}, N = {nope_dim} and V >= 1; got {rows}"
        )
    if v_width < 0:
        raise ValueError(f"{op}: v_width must be >= 0; got {v_width}")
    for name, value in (("k_rope", k_rope), ("w_kv_b", w_kv_b)):
        expect_dtype(op, name, value, "of latent's dtype {}", value.dtype == latent.dtype, latent.dtype)
    for name, value in (("latent", latent), ("k_rope", k_rope), ("w_kv_b", w_kv_b)):
        expect_rows(op, name, value)


def fake(
    latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, num_heads: int, nope_dim: int, v_width: int
) -> tuple[Tensor, Tensor]:
    batch, tokens, _ = latent.shape
    value_dim = max(w_kv_b.shape[0] // num_heads - nope_dim, v_width)
    k = latent.new_empty(batch, num_heads, tokens, nope_dim + k_rope.shape[2])
    return k, latent.new_empty(batch, num_heads, tokens, value_dim)


_cpu_leaf = _native.leaf(
    "_mla_decompress_cpu(Tensor latent, Tensor k_rope, Tensor w_kv_b, Tensor? kv, Tensor(a!) k, Tensor(b!) v) -> ()"
)


def _run_cpu(
    latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, num_heads: int, nope_dim: int, v_width: int
) -> tuple[Tensor, Tensor]:
    k, v = fake(latent, k_rope, w_kv_b, num_heads, nope_dim, v_width)
    if k.numel() == 0:
        return k, v
    tiles = latent.shape[2] % 32 == 0 and nope_dim % 32 == 0 and w_kv_b.shape[0] // num_heads % 32 == 0
    kv = None
    if not (tiles and latent.dtype == torch.bfloat16 and _native.cpu_isa() == "amx"):
        # Contiguous first: the order in which torch's GEMM sums depends on strides, and results are not to.
        kv = torch.nn.functional.linear(latent.contiguous(), w_kv_b.contiguous())
    _cpu_leaf(latent, k_rope, w_kv_b, kv, k, v)
    return k, v


def _supports_cpu(latent: Tensor, **_: Any) -> str | None:
    if latent.device.type != "cpu":
        return f"latent is on {latent.device}"
    return None if latent.dtype in SPEC.dtypes else f"dtype {latent.dtype}"


def _run_triton(
    latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, num_heads: int, nope_dim: int, v_width: int
) -> tuple[Tensor, Tensor]:
    k, v = fake(latent, k_rope, w_kv_b, num_heads, nope_dim, v_width)
    if v.numel() > 0:
        from moekern.ops.mla_decompress import (
            triton,
        )  # importing Triton takes 0.1 s, so it waits for the first call

        triton.run(latent, k_rope, w_kv_b, num_heads, nope_dim, k, v)
    return k, v


def _supports_triton(latent: Tensor, **_: Any) -> str | None:
    return _triton.refuses(latent) or (None if latent.dtype in SPEC.dtypes else f"dtype {latent.dtype}")


def _bytes(
    latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, num_heads: int, nope_dim: int, v_width: int = 0
) -> int:
    rows = w_kv_b.shape[0] // num_heads
    out = num_heads * (nope_dim + k_rope.shape[2] + max(rows - nope_dim, v_width))
    tokens = latent.shape[0] * latent.shape[1]
    return latent.element_size() * (w_kv_b.numel() + tokens * (latent.shape[2] + k_rope.shape[2] + out))


def _case(
    batch: int,
    tokens: int,
    num_heads: int,
    *,
    rank: int = 512,
    rope: int = 64,
    nope: int = 128,
    value: int = 128,
    v_width: int = 0,
    joint: bool = False,
) -> Any:
    """joint: latent and k_rope are slices of one [B, S, R + P] tensor."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
        kv = torch.randn(batch, tokens, rank + rope, generator=generator).to(device, dtype)
        weight = torch.randn(num_heads * (nope + value), rank, generator=generator) / rank**0.5
        latent, k_rope = kv[..., :rank], kv[..., rank:]
        if not joint:
            latent, k_rope = latent.contiguous(), k_rope.contiguous()
        return {"latent": latent, "k_rope": k_rope, "w_kv_b": weight.to(device, dtype), "num_heads": num_heads,
                "nope_dim": nope, "v_width": v_width}  # fmt: skip

    return make


TINY: dict[str, Any] = {"rank": 64, "rope": 32, "nope": 32, "value": 32}

CASES = (
    Case("v2_lite", _case(1, 37, 16)),
    Case("v2_lite_padded", _case(1, 65, 16, v_width=192)),
    Case("vl2_h32_batch", _case(2, 19, 32, v_width=192)),
    Case("glm4_lite_h20", _case(1, 33, 20, nope=192, value=256)),
    Case("minicpm3_h40", _case(2, 21, 40, rank=256, rope=32, nope=64, value=64, v_width=96)),
    Case("joint_rows", _case(3, 17, 5, **TINY, joint=True)),
    Case("no_rope", _case(2, 9, 4, **{**TINY, "rope": 0})),
    Case("no_nope", _case(2, 9, 4, **{**TINY, "nope": 0})),
    Case("odd_widths", _case(2, 7, 3, rank=40, rope=6, nope=10, value=14, v_width=16)),
    Case("one_token", _case(1, 1, 16)),
    Case("no_tokens", _case(2, 0, 4, **TINY)),
    Case("v3_h128", _case(1, 70, 128), small=False),
    Case("prefill_2k", _case(1, 2048, 16, v_width=192), small=False, bench="DeepSeek-V2-Lite prefill 2048"),
    Case("prefill_4k", _case(1, 4096, 16, v_width=192), small=False, bench="DeepSeek-V2-Lite prefill 4096"),
)

SPEC = OpSpec(
    name="mla_decompress",
    schema=SCHEMA,
    check=_check,
    ref=ref.mla_decompress,
    fake=fake,
    model=ref.model,
    backends={
        "ref": Backend(ref.mla_decompress),
        "cpu": Backend(_run_cpu, lambda: _native.reason_without("_mla_decompress_cpu"), _supports_cpu),
        "triton": Backend(_run_triton, _triton.unavailable, _supports_triton),
    },
    cases=CASES,
    outputs=("model", "model"),
    backward=Backward(("latent", "k_rope", "w_kv_b"), ref.backward),
    flops=lambda latent, w_kv_b, **_: 2 * latent.shape[0] * latent.shape[1] * w_kv_b.numel(),
    bytes=_bytes,
)
