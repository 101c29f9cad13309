"""mla_cache_write in Triton: one warp reads a token's row, normalises, rotates, and writes both parts to its slot.

T tokens, R latent rank, P rope width.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from moekern import _triton
from moekern._triton_lib import round_to
from moekern.ops.mla_cache_write.config import MlaCacheWriteConfig, choose, next_power_of_2
from moekern.ops.mla_cache_write.ref import ROPES

INTERLEAVED: tl.constexpr = tl.constexpr(ROPES.index("interleaved"))
HALF: tl.constexpr = tl.constexpr(ROPES.index("half"))


@triton.jit
def _mla_cache_write_fwd_kernel(
    kv_ptr,  # [T, R + P], rows stride_kv apart
    norm_weight_ptr,  # [R]
    cos_ptr,  # [T, P / 2 or P], any strides; the first P / 2 columns are read
    sin_ptr,  # like cos
    slots_ptr,  # [T] int32 or int64, stride_slot apart
    latent_cache_ptr,  # [num_slots, R], rows stride_latent apart
    rope_cache_ptr,  # [num_slots, P], rows stride_rope apart
    num_tokens,
    num_slots,
    eps,
    stride_kv,
    stride_cos_t,
    stride_cos_p,
    stride_sin_t,
    stride_sin_p,
    stride_slot,
    stride_latent,
    stride_rope,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    dtype: tl.constexpr = kv_ptr.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(slots_ptr + t * stride_slot, mask=t < num_tokens, other=-1).to(tl.int64)
    # A token without a slot is not read either.
    live = ((slot >= 0) & (slot < num_slots))[:, None]
    row = kv_ptr + (t * stride_kv)[:, None]

    # Every load comes before the first use of one: a token is one round trip to memory after that of its slot.
    r = tl.arange(0, BLOCK_R)[None, :]
    real = r < RANK
    x = tl.load(row + r, mask=live & real, other=0.0).to(tl.float32)
    weight = tl.load(norm_weight_ptr + r, mask=real, other=0.0).to(tl.float32)
    if ROPE > 0:
        p = tl.arange(0, BLOCK_P)[None, :]
        angle = live & (p < ROPE // 2)
        cos = tl.load(cos_ptr + (t * stride_cos_t)[:, None] + p * stride_cos_p, mask=angle, other=0.0).to(
            tl.float32
        )
        sin = tl.load(sin_ptr + (t * stride_sin_t)[:, None] + p * stride_sin_p, mask=angle, other=0.0).to(
            tl.float32
        )
        both = tl.arange(0, 2 * BLOCK_P)[None, :]
        if LAYOUT == HALF:
            a = tl.load(row + RANK + p, mask=angle, other=0.0).to(tl.float32)
            b = tl.load(row + (RANK + ROPE // 2) + p, mask=angle, other=0.0).to(tl.float32)
        else:
            pairs = tl.load(row + RANK + both, mask=live & (both < ROPE), other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(pairs, [BLOCK_T, BLOCK_P, 2]))

    # The mean is over R values, whatever the block; the normalised row is rounded before the weight, as transformers does.
    mean = tl.sum(x * x, axis=1)[:, None] / RANK
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    normed = weight * round_to(x * scale, dtype).to(tl.float32)
    tl.store(
        latent_cache_ptr + (slot * stride_latent)[:, None] + r, round_to(normed, dtype), mask=live & real
    )

    if ROPE > 0:
        first = round_to(a * cos - b * sin, dtype)
        second = round_to(b * cos + a * sin, dtype)
        out = rope_cache_ptr + (slot * stride_rope)[:, None]
        if LAYOUT == INTERLEAVED:
            rotated = tl.reshape(tl.join(first, second), [BLOCK_T, 2 * BLOCK_P])
            tl.store(out + both, rotated, mask=live & (both < ROPE))
        else:
            tl.store(out + p, first, mask=angle)
            tl.store(out + ROPE // 2 + p, second, mask=angle)


def _constants(config: MlaCacheWriteConfig, rank: int, rope_dim: int, layout: int) -> dict[str, int]:
    return {
        "RANK": rank, "ROPE": rope_dim, "LAYOUT": layout, "BLOCK_T": config.block_tokens,
        "BLOCK_R": next_power_of_2(rank), "BLOCK_P": next_power_of_2(rope_dim // 2),
    }  # fmt: skip


def run(kv: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, latent_cache: Tensor, rope_cache: Tensor,
        slots: Tensor, eps: float, rope: str) -> None:  # fmt: skip
    """Writes the caches. The last dimension of everything but cos, sin and slots is contiguous."""
    num_tokens, rank = kv.shape[0], norm_weight.shape[0]
    config = choose(num_tokens, rank, _triton.gpu_of(kv.device).num_sms)
    constants = _constants(config, rank, rope_cache.shape[1], ROPES.index(rope))
    with _triton.guard(kv):
        _mla_cache_write_fwd_kernel[(triton.cdiv(num_tokens, config.block_tokens),)](
            kv, norm_weight, cos, sin, slots, latent_cache, rope_cache, num_tokens, latent_cache.shape[0], eps,
            kv.stride(0), *cos.stride(), *sin.stride(), slots.stride(0), latent_cache.stride(0),
            rope_cache.stride(0), **constants, num_warps=config.num_warps,
        )  # fmt: skip


STRIDES = ("stride_kv", "stride_cos_t", "stride_cos_p", "stride_sin_t", "stride_sin_p", "stride_slot",
           "stride_latent", "stride_rope")  # fmt: skip


def _variant(rank: int, rope_dim: int, rope: str, config: MlaCacheWriteConfig, dtype: str, worst: bool,
             what: str = "", types: dict[str, str] | None = None, contiguous: bool = True,
             aligned: bool = True) -> _triton.Variant:  # fmt: skip
    """contiguous: cos, sin and slots have stride 1, which Triton makes a constant. aligned: rows are 16 bytes apart."""
    # 16 bytes a lane, where a program has that many values.
    wide = rank * config.block_tokens * (4 if dtype == "fp32" else 2) >= 16 * 32 * config.num_warps
    known = dict.fromkeys(("stride_cos_p", "stride_sin_p", "stride_slot"), 1) if contiguous else {}
    every = {
        "kv_ptr": f"*{dtype}", "norm_weight_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32",
        "slots_ptr": "*i64", "latent_cache_ptr": f"*{dtype}", "rope_cache_ptr": f"*{dtype}", "num_tokens": "i32",
        "num_slots": "i32", "eps": "fp32", **dict.fromkeys(STRIDES, "i32"), **(types or {}),
    }  # fmt: skip
    divisible = [n for n, t in every.items() if t.startswith("*")]
    if aligned:
        divisible += ["stride_kv", "stride_cos_t", "stride_sin_t", "stride_latent", "stride_rope"]
    return _triton.Variant(
        name=f"R{rank} P{rope_dim} {rope} {dtype} BT{config.block_tokens}{what}",
        kernel=_mla_cache_write_fwd_kernel,
        types={n: t for n, t in every.items() if n not in known},
        constants={**_constants(config, rank, rope_dim, ROPES.index(rope)), **known},
        aligned=tuple(n for n in divisible if n not in known),
        num_warps=config.num_warps,
        requires=("LDG.128", "STG.128") if aligned and wide else (),
        worst=worst,
    )


def aot_variants(gpu: _triton.Gpu) -> Iterator[_triton.Variant]:
    """Specialisations for the static gate: every configuration that `choose` returns, and what calls make of them."""
    for rank, rope_dim in ((512, 64), (256, 32), (128, 64), (64, 32), (1024, 64), (2048, 128)):
        tokens = (1, *(16 * gpu.num_sms * n for n in (2, 4, 8)))
        for config in dict.fromkeys(choose(t, rank, gpu.num_sms) for t in tokens):
            for dtype in ("bf16", "fp16", "fp32"):
                for rope in ROPES:
                    yield _variant(
                        rank, rope_dim, rope, config, dtype, worst=(dtype, rope) == ("bf16", "interleaved")
                    )
    config = choose(1, 512, gpu.num_sms)
    yield _variant(512, 64, "half", config, "bf16", True, " angles in bf16, int32 slots",
                   {"cos_ptr": "*bf16", "sin_ptr": "*bf16", "slots_ptr": "*i32"})  # fmt: skip
    yield _variant(512, 64, "deinterleave", config, "fp32", True, " any strides",
                   dict.fromkeys(STRIDES, "i64"), contiguous=False, aligned=False)  # fmt: skip
