"""combine in Triton: a program sums the rows of one token over some columns, all of a token's loads in flight together.

T tokens, K pairs per token, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from moekern import _triton
from moekern._triton_lib import round_to
from moekern.ops.combine.config import CombineConfig, choose, unroll_of


@triton.jit
def _combine_fwd_kernel(
    y_ptr,  # [T*K, D], rows stride_y apart
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K] int32 or int64, or None
    out_ptr,  # [T, D]
    width,
    stride_y,
    num_experts,
    TOP_K: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, TOP_K, UNROLL):
        for j in tl.static_range(UNROLL):
            k = start + j
            kept = k < TOP_K
            pair = t * TOP_K + k
            if ids_ptr is not None:
                e = tl.load(ids_ptr + pair, mask=kept, other=-1)
                kept = kept & (e >= 0) & (e < num_experts)
            # A skipped row adds 0 * 0: neither it nor its weight, which may be NaN, is read.
            w = tl.load(weights_ptr + pair, mask=kept, other=0.0).to(tl.float32)
            row = tl.load(y_ptr + pair * stride_y + d, mask=kept & (d < width), other=0.0)
            acc += row.to(tl.float32) * w
    tl.store(out_ptr + t * width + d, round_to(acc, out_ptr.dtype.element_ty), mask=d < width)


def run(out: Tensor, y: Tensor, weights: Tensor, ids: Tensor | None = None, num_experts: int | None = None,
        config: CombineConfig | None = None) -> Tensor:  # fmt: skip
    """Writes and returns out [T, D]. The last dimension of y and every other tensor are contiguous."""
    num_tokens, top_k = weights.shape
    width = y.shape[1]
    if out.numel() == 0:
        return out
    config = config or choose(num_tokens, top_k, width, y.element_size(), _triton.gpu_of(y.device))
    grid = (num_tokens, triton.cdiv(width, config.block_d))
    with _triton.guard(y):
        _combine_fwd_kernel[grid](
            y, weights, ids, out, width, y.stride(0), num_experts or 0,
            TOP_K=top_k, UNROLL=config.unroll, BLOCK_D=config.block_d, num_warps=config.num_warps,
        )  # fmt: skip
    return out


def aot_variants(gpu: _triton.Gpu) -> Iterator[_triton.Variant]:
    """Specialisations for the static gate: every configuration that `choose` returns."""
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for top_k in range(1, 9):
            found = {choose(t, top_k, 2048, size, gpu): None for t in (1, 64, 128, 256, 4096)}
            for c in found:
                worst = top_k in (1, 8) and dtype != "fp16"
                yield _variant(dtype, top_k, c, worst, ids="i64")
                yield _variant(dtype, top_k, c, False, ids="i32")
                yield _variant(dtype, top_k, c, False, ids=None)
    # More rows than are in flight together, and strides beyond 32 bits.
    for top_k in (10, 32):
        c = CombineConfig(1024, unroll_of(top_k), 4)
        yield _variant("bf16", top_k, c, top_k == 10, ids="i64", stride="i64")


def _variant(dtype: str, top_k: int, c: CombineConfig, worst: bool, ids: str | None,
             stride: str = "i32") -> _triton.Variant:  # fmt: skip
    types = {"y_ptr": f"*{dtype}", "weights_ptr": "*fp32", "ids_ptr": f"*{ids}", "out_ptr": f"*{dtype}", "width": "i32",
             "stride_y": stride, "num_experts": "i32"}  # fmt: skip
    constants: dict[str, int | None] = {"TOP_K": top_k, "UNROLL": c.unroll, "BLOCK_D": c.block_d}
    if ids is None:
        constants["ids_ptr"] = None
        del types["ids_ptr"]
    return _triton.Variant(
        name=f"K{top_k} D{c.block_d} {dtype} ids {ids}", kernel=_combine_fwd_kernel, types=types, constants=constants,
        aligned=tuple(n for n in types if n not in ("num_experts",)), num_warps=c.num_warps,
        requires=("LDG.128", "STG.128"), worst=worst,
    )  # fmt: skip
