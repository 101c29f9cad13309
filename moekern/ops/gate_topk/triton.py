"""gate_topk in Triton: one program holds a few rows' selection keys in registers and takes K maxima.

T tokens, E experts, K selected, G groups of S experts. A row is laid out as G_pad runs of S_pad slots (powers of two), so
that groups are a reshape; slot order is expert order.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from moekern import _triton
from moekern._triton_lib import exp_nonpositive, key_value, ordered_key, sigmoid, softplus
from moekern.ops.gate_topk.config import GateTopkConfig, choose, next_power_of_2
from moekern.ops.gate_topk.ref import SCORINGS

SOFTMAX: tl.constexpr = tl.constexpr(SCORINGS.index("softmax"))
SIGMOID: tl.constexpr = tl.constexpr(SCORINGS.index("sigmoid"))
SQRTSOFTPLUS: tl.constexpr = tl.constexpr(SCORINGS.index("sqrtsoftplus"))
SOFTMAX_TOPK: tl.constexpr = tl.constexpr(SCORINGS.index("softmax_topk"))
SIGMOID_TOPK: tl.constexpr = tl.constexpr(SCORINGS.index("sigmoid_topk"))

TAKEN: tl.constexpr = tl.constexpr(-(2**31))  # the key of padding, of a masked group and of what was selected


@triton.jit
def _score(x, row_max, row_scale, SCORING: tl.constexpr):
    if SCORING == SOFTMAX:
        return exp_nonpositive(x - row_max) * row_scale
    elif SCORING == SIGMOID:
        return sigmoid(x)
    elif SCORING == SQRTSOFTPLUS:
        return tl.sqrt_rn(softplus(x))
    else:
        return x


@triton.jit
def _keep_best_groups(key, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, TOPK_GROUPS: tl.constexpr,
                      GROUP_SIZE: tl.constexpr, TOP2: tl.constexpr):  # fmt: skip
    """TAKEN in every slot [BLOCK_T, BLOCK_G * BLOCK_S] outside the TOPK_GROUPS best groups."""
    key3 = tl.reshape(key, [BLOCK_T, BLOCK_G, BLOCK_S])
    group_key = tl.max(key3, axis=2)
    if TOP2 and GROUP_SIZE > 1:
        # The first slot that holds the maximum goes, not every slot: tied maxima are the two best.
        s = tl.arange(0, BLOCK_S)[None, None, :]
        first = tl.min(tl.where(key3 == tl.expand_dims(group_key, 2), s, BLOCK_S), axis=2)
        second = tl.max(tl.where(s == tl.expand_dims(first, 2), TAKEN, key3), axis=2)
        # A padding group becomes NaN, the lowest key, and comes after every real group of that key.
        group_key = ordered_key(key_value(group_key) + key_value(second))
    g = tl.arange(0, BLOCK_G)[None, :]
    kept = tl.zeros([BLOCK_T, BLOCK_G], dtype=tl.int32)
    for _ in range(TOPK_GROUPS):
        best = tl.max(group_key, axis=1)
        at = tl.min(tl.where(group_key == best[:, None], g, BLOCK_G), axis=1)
        kept = tl.where(g == at[:, None], 1, kept)
        group_key = tl.where(g == at[:, None], TAKEN, group_key)
    key3 = tl.where(tl.expand_dims(kept, 2) == 1, key3, TAKEN)
    return tl.reshape(key3, [BLOCK_T, BLOCK_G * BLOCK_S])


@triton.jit
def _gate_topk_fwd_kernel(
    logits_ptr,  # [T, E], rows stride_t apart
    bias_ptr,  # [E] or None
    expert_scale_ptr,  # [E] or None
    preselected_ptr,  # [T, K] or None
    weights_ptr,  # [T, K] fp32
    ids_ptr,  # [T, K] int32 or int64
    num_tokens,
    stride_t,
    norm_eps,
    norm_min,
    scale,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    SCORING: tl.constexpr,
    TOP2: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    BLOCK_E: tl.constexpr = BLOCK_G * BLOCK_S
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = logits_ptr + t * stride_t
    live = (t < num_tokens)[:, None]
    row_max = tl.zeros([BLOCK_T, 1], dtype=tl.float32)
    row_scale = row_max

    # Scores and keys of all experts.
    if SCORING == SOFTMAX or preselected_ptr is None:
        slot = tl.arange(0, BLOCK_E)[None, :]
        if BLOCK_S == GROUP_SIZE:
            expert = slot  # the compiler sees that loads are contiguous
            real = slot < NUM_EXPERTS
        else:
            expert = slot // BLOCK_S * GROUP_SIZE + slot % BLOCK_S
            real = (slot // BLOCK_S < NUM_GROUPS) & (slot % BLOCK_S < GROUP_SIZE)
        x = tl.load(row[:, None] + expert, mask=live & real, other=float("-inf")).to(tl.float32)
        if SCORING == SOFTMAX:
            row_max = tl.max(x, axis=1)[:, None]
            # A NaN anywhere in the row reaches every score through the sum, as in torch.
            row_scale = tl.div_rn(1.0, tl.sum(exp_nonpositive(x - row_max), axis=1))[:, None]

    # Selection: K rounds of the largest key, then of the lowest slot that holds it. Two 32-bit reductions, because a
    # warp has an instruction for each (redux.sync, sm_80 on) and none for a 64-bit pair.
    k = tl.arange(0, BLOCK_K)[None, :]
    at = t[:, None] * TOP_K + k
    wanted = live & (k < TOP_K)
    if preselected_ptr is None:
        choice = _score(x, row_max, row_scale, SCORING)
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)
        key = tl.where(real, ordered_key(choice), TAKEN)
        if NUM_GROUPS > 1:
            key = _keep_best_groups(key, BLOCK_T, BLOCK_G, BLOCK_S, TOPK_GROUPS, GROUP_SIZE, TOP2)
        ids = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
        for i in range(TOP_K):
            best = tl.max(key, axis=1)
            first = tl.min(tl.where(key == best[:, None], slot, BLOCK_E), axis=1)
            key = tl.where(slot == first[:, None], TAKEN, key)
            ids = tl.where(k == i, first[:, None], ids)
        if BLOCK_S != GROUP_SIZE:
            ids = ids // BLOCK_S * GROUP_SIZE + ids % BLOCK_S
        tl.store(ids_ptr + at, ids.to(ids_ptr.dtype.element_ty), mask=wanted)
        valid = wanted
    else:
        given = tl.load(preselected_ptr + at, mask=wanted, other=-1).to(tl.int64)
        tl.store(ids_ptr + at, given.to(ids_ptr.dtype.element_ty), mask=wanted)
        valid = wanted & (given >= 0) & (given < NUM_EXPERTS)
        ids = tl.where(valid, given, 0).to(tl.int32)

    # Weights: the K selected logits once more, from the cache, and scored again. Carrying a score through each round
    # would be another reduction in it, and the key holds score + bias, which has lost digits.
    chosen = tl.load(row[:, None] + ids, mask=valid, other=float("-inf")).to(tl.float32)
    if SCORING == SOFTMAX_TOPK:
        e = exp_nonpositive(chosen - tl.max(chosen, axis=1)[:, None])
        w = tl.div_rn(e, tl.zeros_like(e) + tl.sum(e, axis=1)[:, None])
    elif SCORING == SIGMOID_TOPK:
        w = sigmoid(chosen)
    else:
        w = _score(chosen, row_max, row_scale, SCORING)
    w = tl.where(valid, w, 0.0)
    if RENORMALIZE:
        total = tl.sum(w, axis=1)[:, None] + norm_eps
        w = tl.div_rn(w, tl.zeros_like(w) + tl.where(total < norm_min, norm_min, total))
    w *= scale
    if expert_scale_ptr is not None:
        w *= tl.load(expert_scale_ptr + ids, mask=valid, other=0.0).to(tl.float32)
    tl.store(weights_ptr + at, w, mask=wanted)


def _constants(config: GateTopkConfig, num_experts: int, top_k: int, scoring: str, num_groups: int, topk_groups: int,
               group_score: str, renormalize: bool) -> dict[str, int | bool]:  # fmt: skip
    block_groups = next_power_of_2(num_groups)
    return {
        "NUM_EXPERTS": num_experts, "TOP_K": top_k, "NUM_GROUPS": num_groups, "TOPK_GROUPS": topk_groups,
        "SCORING": SCORINGS.index(scoring), "TOP2": group_score == "top2", "RENORMALIZE": renormalize,
        "BLOCK_T": config.block_tokens, "BLOCK_G": block_groups, "BLOCK_S": config.block_experts // block_groups,
        "BLOCK_K": next_power_of_2(top_k),
    }  # fmt: skip


def run(weights: Tensor, ids: Tensor, logits: Tensor, scoring: str, bias: Tensor | None, num_groups: int,
        topk_groups: int, group_score: str, renormalize: bool, norm_eps: float, norm_min: float, scale: float,
        expert_scale: Tensor | None, preselected: Tensor | None) -> None:  # fmt: skip
    """Writes weights and ids. logits' last dimension and every other tensor are contiguous."""
    num_tokens, num_experts = logits.shape
    config = choose(num_tokens, num_experts, num_groups, _triton.gpu_of(logits.device).num_sms)
    constants = _constants(
        config, num_experts, ids.shape[1], scoring, num_groups, topk_groups, group_score, renormalize
    )
    grid = (triton.cdiv(num_tokens, config.block_tokens),)
    with _triton.guard(logits):
        _gate_topk_fwd_kernel[grid](
            logits, bias, expert_scale, preselected, weights, ids, num_tokens, logits.stride(0), norm_eps, norm_min,
            scale, **constants, num_warps=config.num_warps,
        )  # fmt: skip


def _variant(num_experts: int, num_groups: int, config: GateTopkConfig, scoring: str, dtype: str, worst: bool,
             what: str = "", top_k: int = 64, types: dict[str, str] | None = None,
             known: dict[str, int | None] | None = None) -> _triton.Variant:  # fmt: skip
    """`types` replaces types of arguments, `known` makes arguments constant, as Triton does with None and with 1."""
    top_k = min(top_k, num_experts)
    topk_groups = max(num_groups // 2, -(-top_k * num_groups // num_experts))
    known = {"preselected_ptr": None} if known is None else known
    every = {
        "logits_ptr": f"*{dtype}", "bias_ptr": "*fp32", "expert_scale_ptr": "*fp32", "preselected_ptr": "*i64",
        "weights_ptr": "*fp32", "ids_ptr": "*i64", "num_tokens": "i32", "stride_t": "i32", "norm_eps": "fp32",
        "norm_min": "fp32", "scale": "fp32", **(types or {}),
    }  # fmt: skip
    constants = _constants(config, num_experts, top_k, scoring, num_groups, topk_groups, "top2", True)
    aligned = [n for n, t in every.items() if t.startswith("*") or n == "stride_t"]
    return _triton.Variant(
        name=f"E{num_experts} G{num_groups} K{top_k} {scoring} {dtype} BT{config.block_tokens}{what}",
        kernel=_gate_topk_fwd_kernel,
        types={n: t for n, t in every.items() if n not in known},
        constants={**constants, **known},
        aligned=tuple(n for n in aligned if n not in known),
        num_warps=config.num_warps,
        worst=worst,
    )


def aot_variants(gpu: _triton.Gpu) -> Iterator[_triton.Variant]:
    """Specialisations for the static gate: every configuration that `choose` returns, and what calls make of them."""
    # E, groups: rows of every width, groups whose size is and is not a power of two.
    shapes = [(e, 1) for e in (8, 64, 72, 128, 256, 512, 1024, 2048, 4096)] + [(160, 8), (256, 8), (4095, 65)]
    tokens = (1, 1 << 11, 1 << 12, 1 << 16)
    configs = {(e, g, choose(t, e, g, gpu.num_sms)): None for e, g in shapes for t in tokens}
    for shape in configs:
        # sqrtsoftplus has the longest score, top2 the longest selection, bias and expert_scale the most pointers.
        for scoring in ("sqrtsoftplus", *(s for s in SCORINGS if s != "sqrtsoftplus")):
            for dtype in ("fp32", "bf16", "fp16"):
                yield _variant(*shape, scoring, dtype, worst=(scoring, dtype) == ("sqrtsoftplus", "fp32"))
    absent: dict[str, int | None] = {"bias_ptr": None, "expert_scale_ptr": None, "preselected_ptr": None}
    for num_experts in (64, 256, 2048):
        shape = (num_experts, 1, choose(1, num_experts, 1, gpu.num_sms))
        for scoring in SCORINGS:
            worst = scoring == "softmax"
            yield _variant(*shape, scoring, "bf16", worst, " one token", 8, {}, {**absent, "num_tokens": 1})
            yield _variant(*shape, scoring, "bf16", worst, " preselected", 8, {}, {})
        yield _variant(
            *shape, "softmax", "fp16", True, " int32 ids", 8, {"ids_ptr": "*i32", "stride_t": "i64"}, absent
        )
        yield _variant(*shape, "sqrtsoftplus", "bf16", True, " int32 preselected", 8,
                       {"ids_ptr": "*i32", "preselected_ptr": "*i32"}, {"bias_ptr": None})  # fmt: skip
