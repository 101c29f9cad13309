"""What the static gate compiles of the gradients' kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moekern import _triton
from moekern.ops.grouped_gemm import config_backward
from moekern.ops.grouped_gemm.activation import ACTIVATIONS
from moekern.ops.grouped_gemm.config_backward import RowsConfig, WeightGradConfig
from moekern.ops.grouped_gemm.triton_activation_backward import (
    _grouped_gemm_activation_bwd_kernel,
    activation_constants,
)
from moekern.ops.grouped_gemm.triton_backward import (
    REDUCE_BLOCK,
    _grouped_gemm_db_kernel,
    _grouped_gemm_dw_kernel,
    _grouped_gemm_dw_reduce_kernel,
    _grouped_gemm_dx_kernel,
    db_constants,
    dw_constants,
)


def specialised(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], absent: tuple[str, ...],
                 **rest: Any) -> _triton.Variant:  # fmt: skip
    """Pointers and strides aligned, as allocations of models are; `absent` pointers are None."""
    return _triton.Variant(
        name=name,
        kernel=kernel,
        types={n: t for n, t in types.items() if n not in absent},
        constants={**constants, **dict.fromkeys(absent)},
        aligned=tuple(
            n for n, t in types.items()
            if n not in absent and (t[0] == "*" or n.startswith("stride") or n in ("A", "B", "N", "F", "D", "size"))
        ),
        **rest,
    )  # fmt: skip


def _activation_variant(config: RowsConfig, activation: str, gated: bool, interleaved: bool, dtype: str, absent: tuple[str, ...],
                        worst: bool) -> _triton.Variant:  # fmt: skip
    types = {
        "z_ptr": "*fp32", "dh_ptr": f"*{dtype}", "scale_ptr": "*fp32", "index_ptr": "*i32", "offsets_ptr": "*i32",
        "dz_ptr": f"*{dtype}", "h_ptr": f"*{dtype}", "d_scale_ptr": "*fp32",
        **dict.fromkeys(("num_rows", "num_experts", "F", "stride_dh"), "i32"),
        **dict.fromkeys(("limit", "alpha", "up_shift"), "fp32"),
    }  # fmt: skip
    layout = ("interleaved" if interleaved else "halves") if gated else "not gated"
    return specialised(
        f"{dtype} {activation} {layout} {config.block_rows}x{config.block_columns}{' plain' if absent else ''}",
        _grouped_gemm_activation_bwd_kernel, types,
        activation_constants(config, activation, gated, interleaved, True, True), absent, num_warps=config.num_warps,
        worst=worst,
    )  # fmt: skip


def _tensor_cores(gpu: _triton.Gpu, element_size: int) -> str:
    if element_size == 4:
        return ""
    return {90: "HGMMA", 100: "UTCHMMA"}.get(gpu.capability, "HMMA")


def _dw_variant(
    gpu: _triton.Gpu, config: WeightGradConfig, dtype: str, gather: str, worst: bool
) -> _triton.Variant:
    types = {
        "a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "gather_ptr": "*i32", "offsets_ptr": "*i32", "out_ptr": f"*{dtype}",
        "partial_ptr": "*fp32",
        **dict.fromkeys(("num_rows", "num_gathered", "num_experts", "num_slots", "chunk", "A", "B", "stride_a", "stride_b"),
                        "i32"),
    }  # fmt: skip
    absent = (("partial_ptr",) if config.splits == 1 else ()) + (("gather_ptr",) if gather == "none" else ())
    element_size = 4 if dtype == "fp32" else 2
    tile = f"{config.block_a}x{config.block_b}x{config.block_k}"
    return specialised(
        f"{dtype} {tile} splits {config.splits} gather {gather}", _grouped_gemm_dw_kernel, types,
        dw_constants(config, 64, gather == "a", 6), absent, num_warps=config.num_warps, num_stages=config.num_stages,
        tensor_cores=_tensor_cores(gpu, element_size), requires=("LDGSTS.128",),
        min_shared=config.shared(element_size) * (config.num_stages - 1) // config.num_stages, worst=worst,
    )  # fmt: skip


def _small_variants(gpu: _triton.Gpu, dtype: str, worst: bool) -> Iterator[_triton.Variant]:
    """The reductions."""
    names = ("num_rows", "num_gathered", "num_experts", "num_slots", "chunk", "N", "D", "size", "stride_a")
    counts = dict.fromkeys(names, "i32")

    def only(kernel: Any, pointers: dict[str, str]) -> dict[str, str]:
        return {n: {**pointers, **counts}[n] for n in kernel.arg_names if n in pointers or n in counts}

    types = only(
        _grouped_gemm_dw_reduce_kernel,
        {"partial_ptr": "*fp32", "offsets_ptr": "*i32", "out_ptr": f"*{dtype}"},
    )
    for num_experts in (64, 512):
        constants = {"BLOCK": REDUCE_BLOCK, "BLOCK_E": num_experts}
        yield specialised(
            f"{dtype} E{num_experts}", _grouped_gemm_dw_reduce_kernel, types, constants, (), worst=worst
        )
    types = only(_grouped_gemm_db_kernel, {"a_ptr": f"*{dtype}", "gather_ptr": "*i32", "scale_ptr": "*fp32",
                                           "offsets_ptr": "*i32", "out_ptr": f"*{dtype}", "partial_ptr": "*fp32"})  # fmt: skip
    for width in (64, 2048):
        for rows in (1, 1 << 16):
            config = config_backward.choose_column_sum(rows, width, gpu.num_sms)
            cut = min(config.splits, 2)
            yield specialised(
                f"{dtype} {config.block_rows}x{config.block_columns} splits {cut}", _grouped_gemm_db_kernel, types,
                db_constants(config, 64, 6), ("partial_ptr",) if cut == 1 else (), num_warps=config.num_warps,
                worst=worst and cut > 1,
            )  # fmt: skip
    types = only(_grouped_gemm_dx_kernel, {"rows_ptr": f"*{dtype}", "starts_ptr": "*i32", "order_ptr": "*i32",
                                           "ids_ptr": "*i64", "out_ptr": f"*{dtype}"})  # fmt: skip
    for width in (256, 2048):
        config = config_backward.choose_row_sum(width)
        constants = {"K": 8, "BLOCK_D": config.block_columns}
        for how, absent in (("pairs", ("starts_ptr", "order_ptr")), ("sorted", ("ids_ptr",))):
            yield specialised(f"{dtype} {config.block_columns} {how}", _grouped_gemm_dx_kernel, types, constants, absent,
                               num_warps=config.num_warps, worst=worst)  # fmt: skip


def aot_variants(gpu: _triton.Gpu) -> Iterator[_triton.Variant]:
    """Specialisations for the static gate: every configuration that config_backward returns."""
    found: dict[tuple[WeightGradConfig, tuple[str, ...]], None] = {}
    every: tuple[tuple[int, tuple[str, ...]], ...] = ((2, ("bf16", "fp16")), (4, ("fp32",)))
    for element_size, dtypes in every:
        # Wide experts, experts narrow in one dimension and in both; many rows, which are cut, and few.
        for a, b in ((2816, 2048), (2048, 768), (256, 128), (64, 64)):
            for rows in (1, 1 << 16):
                config = config_backward.choose_dw(rows, a, b, element_size, gpu)
                found[replace(config, splits=min(config.splits, 2)), dtypes] = None
    for config, dtypes in found:
        for dtype in dtypes:
            for gather in ("b", "a", "none"):
                yield _dw_variant(gpu, config, dtype, gather, worst=dtype == dtypes[0] and gather == "b")
    for rows in (1, 1 << 16):
        for width in (128, 1408):
            rows_config = config_backward.choose_activation_backward(rows, width, gpu.num_sms)
            for activation in ACTIVATIONS:
                for gated, interleaved in ((True, True), (True, False), (False, False)):
                    for dtype in ("bf16", "fp16", "fp32"):
                        # gelu has the longest code, the interleaved layout the most shuffles.
                        worst = (activation, interleaved, dtype) == ("gelu", True, "bf16")
                        yield _activation_variant(
                            rows_config, activation, gated, interleaved, dtype, (), worst
                        )
    yield _activation_variant(rows_config, "silu", True, False, "bf16", ("scale_ptr", "index_ptr", "h_ptr", "d_scale_ptr"),
                              True)  # fmt: skip
    for dtype in ("bf16", "fp16", "fp32"):
        yield from _small_variants(gpu, dtype, worst=dtype == "bf16")
