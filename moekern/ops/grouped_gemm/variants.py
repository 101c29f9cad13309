"""Specialisations of grouped_gemm's kernels for the static gate: every configuration that `choose` returns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moekern import _triton
from moekern.ops.grouped_gemm.activation import ACTIVATIONS
from moekern.ops.grouped_gemm.config import GroupedGemmConfig, choose, ring_bytes

# Both products of expert layers, from few wide experts to many narrow ones, and of anything between.
SHAPES = list(
    itertools.product(
        (1, 4, 8, 64, 128, 256, 512), (64, 512, 2048, 14336), (64, 512, 2048, 7168), (False, True)
    )
)
ROWS = (1, 6, 48, 96, 256, 512, 1024, 2048, 6144, 24576, 131072, 524288)


def specialisation(config: GroupedGemmConfig) -> GroupedGemmConfig:
    """What of a configuration the kernel is compiled for: not how many splits there are, nor how many programs."""
    return replace(config, split_k=min(config.split_k, 2), programs_per_sm=0)


def configs(gpu: _triton.Gpu, dtype_bytes: int) -> dict[GroupedGemmConfig, bool]:
    """Each specialisation once, and whether a gated product, the larger kernel, uses it."""
    found: dict[GroupedGemmConfig, bool] = {}
    for num_experts, n, d, gated in SHAPES:
        for num_rows in ROWS:
            key = specialisation(choose(num_rows, num_experts, n, d, dtype_bytes, gated, gpu))
            found[key] = found.get(key, False) or gated
    return found


def forward_variant(kernel: Any, config: GroupedGemmConfig, dtype: str, gpu: _triton.Gpu, worst: bool, *, gated: bool,
                    interleaved: bool = False, transposed: bool = False, gathered: bool = True, pointers: bool = False,
                    activation: str = "silu", even_k: bool = True) -> _triton.Variant:  # fmt: skip
    """`gathered`: x by pointers and every optional argument; otherwise none of them and x as the configuration likes.
    `pointers`: no descriptors, as for tensors that are not aligned to 16 bytes."""
    w_tma = config.tma and not pointers
    x_tma = w_tma and not gathered
    split = config.split_k > 1
    types = {
        "x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "offsets_ptr": "*i32", "gather_ptr": "*i32",
        "scatter_ptr": "*i32", "bias_ptr": f"*{dtype}", "row_scale_ptr": "*fp32",
        "out_ptr": "*fp32" if split else f"*{dtype}",
        **dict.fromkeys(("num_rows", "num_x_rows", "num_out_rows", "num_experts", "n_out", "d", "gather_div", "split_k",
                         "stride_x", "stride_we", "stride_wr", "stride_bias", "stride_out"), "i32"),
    }  # fmt: skip
    if x_tma:
        types["x_ptr"] = f"tensordesc<{dtype}[{config.block_m},{config.block_k}]>"
    if w_tma:
        columns = [2, config.block_n // 2] if gated and not interleaved else [config.block_n]
        box = [1, config.block_k, *columns] if transposed else [1, *columns, config.block_k]
        types["weight_ptr"] = f"tensordesc<{dtype}[{','.join(map(str, box))}]>"
    known: dict[str, Any] = {} if split else {"split_k": 1}
    if not gathered:
        known |= dict.fromkeys(("gather_ptr", "scatter_ptr", "bias_ptr", "row_scale_ptr")) | {"gather_div": 1}
    constants = {
        "ACTIVATION": ACTIVATIONS.index(activation if gated else "none"), "GATED": gated, "INTERLEAVED": interleaved,
        "TRANSPOSED": transposed, "LIMIT": 7.0, "ALPHA": 1.702, "UP_SHIFT": 1.0, "X_TMA": x_tma, "W_TMA": w_tma,
        "SWAP": config.swap, "SPLIT": split, "EVEN_K": even_k, "GROUP_M": config.group_m, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_E": 128,
    }  # fmt: skip
    matrix = {90: "HGMMA", 100: "UTCHMMA"}.get(gpu.capability, "HMMA")
    words = (f"{config.block_m}x{config.block_n}x{config.block_k}", f"{config.num_warps}w{config.num_stages}s",
             "swap" * config.swap, "split" * split, "tma" * w_tma, "gated" * gated, "interleaved" * interleaved,
             "transposed" * transposed, "gathered" * gathered, activation * (activation != "silu"),
             "ragged" * (not even_k), dtype)  # fmt: skip
    numbers = (
        "num_rows",
        "num_x_rows",
        "n_out",
        "d",
        "stride_x",
        "stride_we",
        "stride_wr",
        "stride_bias",
        "stride_out",
    )
    size = 4 if dtype == "fp32" else 2
    stage = ring_bytes(config, size) // config.num_stages
    return _triton.Variant(
        name=" ".join(word for word in words if word),
        kernel=kernel,
        types={n: t for n, t in types.items() if n not in known},
        constants={**constants, **known},
        aligned=tuple(n for n, t in types.items() if n not in known and (t.startswith("*") or n in numbers)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        tensor_cores="" if dtype == "fp32" else matrix,
        requires=(*(("UTMALDG",) if w_tma else ()), *(() if x_tma else ("LDGSTS.128",))),
        min_shared=(config.num_stages - 1) * stage,  # x and weights both pass through the ring: none through registers
        worst=worst,
    )  # fmt: skip


def reduce_variant(kernel: Any, columns: int, gated: bool, interleaved: bool) -> _triton.Variant:
    numbers = ("num_rows", "num_out_rows", "num_experts", "n_out", "split_k", "stride_bias", "stride_out")
    types = {"partial_ptr": "*fp32", "offsets_ptr": "*i32", "scatter_ptr": "*i32", "bias_ptr": "*bf16",
             "row_scale_ptr": "*fp32", "out_ptr": "*bf16", **dict.fromkeys(numbers, "i32")}  # fmt: skip
    return _triton.Variant(
        name=f"{columns} columns{' gated' * gated}{' interleaved' * interleaved} bf16",
        kernel=kernel,
        types=types,
        constants={"ACTIVATION": ACTIVATIONS.index("silu"), "GATED": gated, "INTERLEAVED": interleaved, "LIMIT": 7.0,
                   "ALPHA": 1.702, "UP_SHIFT": 1.0, "BLOCK_N": columns, "BLOCK_E": 128},
        aligned=(*(n for n, t in types.items() if t.startswith("*")), "n_out", "stride_bias", "stride_out"),
        worst=gated and not interleaved,
    )  # fmt: skip


def variants(gpu: _triton.Gpu, forward: Any, reduce: Any, columns: int) -> Iterator[_triton.Variant]:
    for config, gated in configs(gpu, 2).items():
        # Interleaved, gathered and with every option needs most registers; each other property once on every tile.
        yield forward_variant(forward, config, "bf16", gpu, True, gated=gated, interleaved=gated)
        plain = {"gated": gated, "gathered": False}
        for dtype in ("bf16", "fp16"):
            for options in ({"gated": gated}, plain, {"gated": gated, "transposed": True}, {**plain, "transposed": True},
                            {"gated": gated, "pointers": True, "even_k": False},
                            {"gated": gated, "transposed": True, "pointers": True},
                            {"gated": gated, "activation": "gelu"}):  # fmt: skip
                if config.tma or not options.get("pointers"):
                    yield forward_variant(forward, config, dtype, gpu, False, **options)
    for config, gated in configs(gpu, 4).items():
        yield forward_variant(forward, config, "fp32", gpu, True, gated=gated)
        yield forward_variant(forward, config, "fp32", gpu, False, gated=gated, transposed=True)
    for gated, interleaved in ((True, False), (True, True), (False, False)):
        yield reduce_variant(reduce, columns, gated, interleaved)
