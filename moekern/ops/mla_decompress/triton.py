"""mla_decompress in Triton: a GEMM per head whose epilogue writes the keys and values where attention reads them.

B batch, S tokens, H heads, R latent rank, N nope width, P rope width, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moekern import _triton
from moekern._triton_lib import dot, round_to
from moekern.ops.mla_decompress.config import MlaDecompressConfig, choose, column_tiles, next_power_of_2


@triton.jit
def _mla_decompress_fwd_kernel(
    latent,  # [B, S, R]: a pointer, or a descriptor of it as [rows, R]
    w_kv_b,  # [H * (N + V), R]: a pointer, or a descriptor
    k_rope_ptr,  # [B, S, P]
    k_ptr,  # [B, H, S, N + P]
    v_ptr,  # [B, H, S, V_WIDTH]
    num_tokens,
    num_heads,
    stride_latent_b,  # in elements; with TMA in rows of the descriptor
    stride_latent_s,
    stride_w,
    stride_rope_b,
    stride_rope_s,
    RANK: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    V_WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GROUP_S: tl.constexpr,
    TMA: tl.constexpr,
):
    K_TILES: tl.constexpr = (NOPE + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = K_TILES + (VALUE + BLOCK_N - 1) // BLOCK_N
    K_WIDTH: tl.constexpr = NOPE + ROPE

    # GROUP_S token blocks pass through all columns before the next: a wave of programs shares both operands in L2.
    blocks = tl.cdiv(num_tokens, BLOCK_S)
    columns = num_heads * TILES
    b = tl.program_id(0) // (blocks * columns)
    at = tl.program_id(0) % (blocks * columns)
    first = at // (GROUP_S * columns) * GROUP_S
    size = min(blocks - first, GROUP_S)
    within = at % (GROUP_S * columns)
    s0 = (first + within % size) * BLOCK_S
    head = within // size // TILES
    tile = within // size % TILES

    is_value = tile >= K_TILES
    c0 = tl.where(is_value, tile - K_TILES, tile) * BLOCK_N
    width = tl.where(is_value, VALUE, NOPE)
    w0 = head * (NOPE + VALUE) + tl.where(is_value, NOPE, 0) + c0
    s = s0 + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    live = s < num_tokens
    b64 = b.to(tl.int64)
    out_row = (b64 * num_heads + head) * num_tokens + s

    # The last key tile of a head (without any, its first tile) carries the rotary key: loaded here, stored at the end,
    # so that the loop hides the way to memory.
    if ROPE > 0:
        p = tl.arange(0, BLOCK_P)[None, :]
        carried = (live & (tile == max(K_TILES - 1, 0)))[:, None] & (p < ROPE)
        rope_row = k_rope_ptr + b64 * stride_rope_b + s.to(tl.int64) * stride_rope_s
        rope = tl.load(rope_row[:, None] + p, mask=carried, other=0.0)

    acc = tl.zeros([BLOCK_S, BLOCK_N], dtype=tl.float32)
    if TMA:
        # Beyond R the descriptors give zeros. Rows beyond S or the part are another's: they reach nothing that is stored.
        row = (b64 * stride_latent_b).to(tl.int32) + s0
        for r0 in range(0, RANK, BLOCK_R):
            x = latent.load([row, r0])
            w = w_kv_b.load([w0, r0])
            acc = dot(x, w.T, acc)
    else:
        x_ptrs = latent + b64 * stride_latent_b + s.to(tl.int64)[:, None] * stride_latent_s + r[None, :]
        w_ptrs = w_kv_b + (w0 + c).to(tl.int64)[:, None] * stride_w + r[None, :]
        x_live = live[:, None]
        w_live = (c0 + c < width)[:, None]
        for r0 in range(0, RANK, BLOCK_R):
            if RANK % BLOCK_R == 0:
                x = tl.load(x_ptrs, mask=x_live, other=0.0)
                w = tl.load(w_ptrs, mask=w_live, other=0.0)
            else:
                x = tl.load(x_ptrs, mask=x_live & (r0 + r < RANK)[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=w_live & (r0 + r < RANK)[None, :], other=0.0)
            acc = dot(x, w.T, acc)
            x_ptrs += BLOCK_R
            w_ptrs += BLOCK_R

    out = round_to(acc, k_ptr.dtype.element_ty)
    inside = live[:, None] & (c0 + c < width)[None, :]
    if is_value:
        v_row = v_ptr + out_row * V_WIDTH
        tl.store(v_row[:, None] + (c0 + c)[None, :], out, mask=inside)
        for pad0 in range(VALUE, V_WIDTH, BLOCK_N):
            pad = pad0 + c[None, :]
            padded = (live & (tile == TILES - 1))[:, None] & (pad < V_WIDTH)
            tl.store(v_row[:, None] + pad, tl.zeros([BLOCK_S, BLOCK_N], dtype=out.dtype), mask=padded)
    else:
        tl.store((k_ptr + out_row * K_WIDTH)[:, None] + (c0 + c)[None, :], out, mask=inside)
    if ROPE > 0:
        tl.store((k_ptr + out_row * K_WIDTH + NOPE)[:, None] + p, rope, mask=carried)


def _constants(config: MlaDecompressConfig, rank: int, nope: int, rope: int, value: int,
               v_width: int, tma: bool) -> dict[str, int | bool]:  # fmt: skip
    return {
        "RANK": rank, "NOPE": nope, "ROPE": rope, "VALUE": value, "V_WIDTH": v_width,
        "BLOCK_S": config.block_tokens, "BLOCK_N": config.block_columns, "BLOCK_R": config.block_rank,
        "BLOCK_P": next_power_of_2(rope), "GROUP_S": config.group_tokens, "TMA": tma,
    }  # fmt: skip


def _vectorised(rows: Tensor) -> Tensor:
    """The same [..., R], if need be copied to rows that load 16 bytes at a time.

    Triton knows a stride as a multiple of 16 elements or not at all; element by element a tile would take more registers
    than there are. Latent ranks are multiples of 64, so this is for weights and caches that are odd slices of something.
    """
    if rows.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in rows.stride()[:-1]):
        return rows
    rank = rows.shape[-1]
    return rows.new_empty(*rows.shape[:-1], -(-rank // 16) * 16)[..., :rank].copy_(rows)


def _takes_tma(latent: Tensor, weight: Tensor) -> bool:
    """Whether descriptors can describe both: no overlapping rows, the latent's at one pitch across the batch."""
    batch, _, rank = latent.shape
    stride_b, stride_s, _ = latent.stride()
    one_pitch = batch == 1 or (
        stride_s > 0 and stride_b % stride_s == 0 and batch * stride_b < stride_s << 31
    )
    return min(stride_s, weight.stride(0)) >= rank and one_pitch


def run(
    latent: Tensor, k_rope: Tensor, w_kv_b: Tensor, num_heads: int, nope: int, k: Tensor, v: Tensor
) -> None:
    """Writes k and v. Every last dimension is contiguous."""
    latent, w_kv_b = _vectorised(latent), _vectorised(w_kv_b)
    batch, num_tokens, rank = latent.shape
    rope, value = k_rope.shape[2], w_kv_b.shape[0] // num_heads - nope
    stride_b, stride_s, _ = latent.stride()
    stride_w = w_kv_b.stride(0)
    config = choose(num_tokens, batch, num_heads, nope, value, rank, latent.element_size(),
                    _triton.gpu_of(latent.device))  # fmt: skip
    tma = config.tma and _takes_tma(latent, w_kv_b)
    constants = _constants(config, rank, nope, rope, value, v.shape[3], tma)
    tiles = column_tiles(nope, value, config.block_columns)
    grid = (batch * -(-num_tokens // config.block_tokens) * num_heads * tiles,)
    x: Tensor | TensorDescriptor = latent
    w: Tensor | TensorDescriptor = w_kv_b
    if tma:
        stride_b = 0 if batch == 1 else stride_b // stride_s
        rows = (batch - 1) * stride_b + num_tokens
        x = TensorDescriptor(latent, [rows, rank], [stride_s, 1], [config.block_tokens, config.block_rank])
        w = TensorDescriptor(
            w_kv_b, [w_kv_b.shape[0], rank], [stride_w, 1], [config.block_columns, config.block_rank]
        )
    with _triton.guard(latent):
        _mla_decompress_fwd_kernel[grid](
            x, w, k_rope, k, v, num_tokens, num_heads, stride_b, stride_s, stride_w, k_rope.stride(0),
            k_rope.stride(1), **constants, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


STRIDES = ("stride_latent_b", "stride_latent_s", "stride_w", "stride_rope_b", "stride_rope_s")
MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def _variant(gpu: _triton.Gpu, config: MlaDecompressConfig, nope: int, rope: int, value: int, v_width: int,
             rank: int, dtype: str, worst: bool, tma: bool, odd_rope: bool = False) -> _triton.Variant:  # fmt: skip
    """odd_rope: nothing is known of the strides of k_rope, and all strides are 64-bit."""
    every = {
        "latent": f"*{dtype}", "w_kv_b": f"*{dtype}", "k_rope_ptr": f"*{dtype}", "k_ptr": f"*{dtype}",
        "v_ptr": f"*{dtype}", "num_tokens": "i32", "num_heads": "i32",
        **dict.fromkeys(STRIDES, "i64" if odd_rope else "i32"),
    }  # fmt: skip
    if tma:
        every["latent"] = f"tensordesc<{dtype}[{config.block_tokens},{config.block_rank}]>"
        every["w_kv_b"] = f"tensordesc<{dtype}[{config.block_columns},{config.block_rank}]>"
    known = [n for n, t in every.items() if t.startswith("*") or n in STRIDES]
    stage = (config.block_tokens + config.block_columns) * config.block_rank * (4 if dtype == "fp32" else 2)
    # A loop of one step is no loop, and has no copies ahead of it.
    loads = ("UTMALDG",) if tma else ("LDGSTS.128",) if rank > config.block_rank else ()
    return _triton.Variant(
        name=f"N{nope} P{rope} V{value}/{v_width} R{rank} {dtype} {config.block_tokens}x{config.block_columns}"
        f"x{config.block_rank}{' TMA' if tma else ''}{' odd k_rope' if odd_rope else ''}",
        kernel=_mla_decompress_fwd_kernel,
        types=every,
        constants=_constants(config, rank, nope, rope, value, v_width, tma),
        aligned=tuple(n for n in known if not (odd_rope and n.startswith("stride_rope"))),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores="" if dtype == "fp32" else MATRIX[gpu.capability],
        requires=(*loads, *(("STG.128",) if value % 8 == 0 else ())),
        min_shared=(config.num_stages - 1) * stage if rank > config.block_rank else 0,
        worst=worst,
    )


# N, P, V, width of v, R: DeepSeek with padded values, GLM-4.7-Flash, MiniCPM3; tiles of 32 and 16 columns, which only
# models of tests have.
SHAPES = ((128, 64, 128, 192, 512), (192, 64, 256, 256, 512), (64, 32, 64, 96, 256))
TINY_SHAPES = ((32, 16, 32, 48, 64), (16, 8, 12, 24, 16))


def aot_variants(gpu: _triton.Gpu) -> Iterator[_triton.Variant]:
    """Specialisations for the static gate: every configuration that `choose` returns, and what calls make of them."""
    for shape in SHAPES + TINY_SHAPES:
        nope, _, value, _, rank = shape
        for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            calls = ((t, h) for t in (64, 128, 512, 4096) for h in (16, 40, 128))
            configs = dict.fromkeys(choose(t, 1, h, nope, value, rank, itemsize, gpu) for t, h in calls)
            # SHAPES[1] has the tiles of SHAPES[0] in fp32.
            worst = shape in SHAPES and (dtype == "bf16" or (dtype == "fp32" and shape != SHAPES[1]))
            for config in configs:
                yield _variant(gpu, config, *shape, dtype, worst, config.tma)
                if config.tma:
                    yield _variant(gpu, config, *shape, dtype, worst and shape == SHAPES[0], False)
    config = choose(4096, 1, 16, 128, 128, 512, 2, gpu)
    yield _variant(gpu, config, *SHAPES[0], "bf16", True, config.tma, odd_rope=True)
