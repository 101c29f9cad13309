"""Random shapes and parameters: what holds for every input, on the backend that users get and on the portable one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yardstick
from hypothesis import given, strategies as st
from support import available, best_cpu, call, evaluate, same_bits
from torch import Tensor

from moekern.ops import SPECS
from moekern.ops.gate_topk.ref import GROUP_SCORES, SCORINGS
from moekern.ops.grouped_gemm.activation import ACTIVATIONS

DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
SEEDS = st.integers(0, 2**20)


def compared(name: str) -> Any:
    spec = SPECS[name]
    wanted = dict.fromkeys(("cpu-portable", best_cpu(spec)))
    return pytest.mark.parametrize("variant", [v for v in wanted if available(spec, v)] or ["ref"])


def check(name: str, variant: str, arguments: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Judges one call by the yardstick, with slack for the largest error of what may be a handful of values."""
    spec = SPECS[name]
    bound = spec.bind((), arguments)
    truth = evaluate(spec, spec.ref, yardstick.in_fp64(bound))
    model = evaluate(spec, spec.ref, bound)
    sample = yardstick.Sample(bound, truth, model)
    found = call(spec, variant, bound)
    yardstick.check_results(spec, [sample], [found], dtype, slack=3.0)
    return found


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def gatings(draw: Any) -> dict[str, Any]:
    num_groups = draw(st.sampled_from((1, 1, 2, 3, 8)))
    num_experts = num_groups * draw(st.integers(1, 40))
    topk_groups = draw(st.integers(1, num_groups))
    top_k = draw(st.integers(1, min(num_experts // num_groups * topk_groups, 64)))
    arguments = {
        "logits": randn(draw(SEEDS), draw(st.integers(0, 9)), num_experts, dtype=draw(DTYPES)),
        "top_k": top_k, "scoring": draw(st.sampled_from(SCORINGS)), "num_groups": num_groups,
        "topk_groups": topk_groups, "group_score": draw(st.sampled_from(GROUP_SCORES)),
        "renormalize": draw(st.booleans()), "norm_eps": draw(st.sampled_from((0.0, 1e-20))),
        "scale": draw(st.sampled_from((1.0, 2.5))), "ids_dtype": draw(st.sampled_from((None, torch.int32))),
    }  # fmt: skip
    if draw(st.booleans()):
        arguments["bias"] = randn(draw(SEEDS), num_experts)
    return arguments


@compared("gate_topk")
@given(arguments=gatings())
def test_gate_topk(variant: str, arguments: dict[str, Any]) -> None:
    check("gate_topk", variant, arguments, arguments["logits"].dtype)


@compared("gate_topk")
@given(arguments=gatings(), levels=st.integers(1, 4))
def test_ties_go_to_the_lower_id(variant: str, arguments: dict[str, Any], levels: int) -> None:
    """Logits of few values tie everywhere; without groups and bias the order is known without computing scores."""
    logits = (arguments["logits"].float() * levels / 4).round()
    plain = {
        k: v for k, v in arguments.items() if k not in ("bias", "num_groups", "topk_groups", "group_score")
    }
    (_, ids) = call(SPECS["gate_topk"], variant, SPECS["gate_topk"].bind((), {**plain, "logits": logits}))
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, : plain["top_k"]]
    assert torch.equal(ids.long(), expected)


@compared("gate_topk")
@given(arguments=gatings(), seed=SEEDS, share=st.sampled_from((0.1, 0.5, 1.0)))
def test_ids_are_distinct_and_in_range_whatever_the_logits(
    variant: str, arguments: dict[str, Any], seed: int, share: float
) -> None:
    """NaN and infinities, as in the padding rows of a captured graph."""
    logits = arguments["logits"].clone()
    odd = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=logits.dtype)
    where = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < share
    logits[where] = odd[integers(seed, 0, 3, int(where.sum()))]
    (_, ids) = call(SPECS["gate_topk"], variant, SPECS["gate_topk"].bind((), {**arguments, "logits": logits}))
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    for row in ids.tolist():
        assert len(set(row)) == arguments["top_k"]
    nan_only = {**arguments, "logits": torch.full_like(logits, float("nan"))}
    (_, ids) = call(SPECS["gate_topk"], variant, SPECS["gate_topk"].bind((), nan_only))
    for row in ids.tolist():
        assert len(set(row)) == arguments["top_k"]


@st.composite
def routings(draw: Any) -> dict[str, Any]:
    num_experts = draw(st.integers(1, 70))
    shape = draw(st.integers(0, 40)), draw(st.integers(1, 9))
    ids = integers(draw(SEEDS), -2, num_experts + 2, *shape)
    if draw(st.booleans()) and ids.numel() > 1:
        ids[0, 0], ids[-1, -1] = 2**31 - 1, -(2**31)
    return {"ids": ids.to(draw(st.sampled_from((torch.int32, torch.int64)))), "num_experts": num_experts}


@compared("route")
@given(arguments=routings())
def test_route(variant: str, arguments: dict[str, Any]) -> None:
    perm, offsets, counts = check("route", variant, arguments, torch.float32)
    ids, num_experts = arguments["ids"].flatten(), arguments["num_experts"]
    assert torch.equal(offsets.diff(), counts)
    for e in range(num_experts):
        assert torch.equal(perm[offsets[e] : offsets[e + 1]].long(), (ids == e).nonzero().flatten())
    assert (perm[offsets[-1] :] == -1).all()


@st.composite
def activations(draw: Any) -> dict[str, Any]:
    gated, activation = draw(st.booleans()), draw(st.sampled_from(ACTIVATIONS))
    return {
        "activation": activation, "gated": gated, "interleaved": gated and draw(st.booleans()),
        "limit": draw(st.sampled_from((None, 0.75, 7.0))),
        "alpha": draw(st.sampled_from((1.0, 1.702))) if activation == "silu" else 1.0,
        "up_shift": draw(st.sampled_from((0.0, 1.0))) if gated else 0.0, "transposed": draw(st.booleans()),
    }  # fmt: skip


@st.composite
def grouped_gemms(draw: Any) -> tuple[torch.dtype, dict[str, Any]]:
    dtype, options = draw(DTYPES), draw(activations())
    counts = draw(st.lists(st.sampled_from((0, 0, 1, 2, 5, 17, 33)), min_size=1, max_size=6))
    d, f = draw(st.integers(1, 90)), draw(st.integers(1, 70))
    n = 2 * f if options["gated"] else f
    rows = sum(counts) + draw(st.integers(0, 3))
    weight = randn(draw(SEEDS), len(counts), *((d, n) if options["transposed"] else (n, d))) * 1.5 * d**-0.5
    arguments = {"weight": weight.to(dtype), "offsets": torch.tensor([0, *counts]).cumsum(0).int(), **options}
    num_inputs = rows
    if draw(st.booleans()):
        num_inputs = draw(st.integers(1, 9))
        arguments["gather"] = integers(draw(SEEDS), -1, num_inputs + 1, rows).int()
    arguments["x"] = randn(draw(SEEDS), num_inputs, d, dtype=dtype)
    if draw(st.booleans()):
        arguments["bias"] = randn(draw(SEEDS), len(counts), n, dtype=dtype)
    if draw(st.booleans()):
        arguments["row_scale"] = randn(draw(SEEDS), rows)
    return dtype, arguments


@compared("grouped_gemm")
@given(case=grouped_gemms())
def test_grouped_gemm(variant: str, case: tuple[torch.dtype, dict[str, Any]]) -> None:
    check("grouped_gemm", variant, case[1], case[0])


@st.composite
def combines(draw: Any) -> tuple[torch.dtype, dict[str, Any]]:
    dtype, num_experts = draw(DTYPES), draw(st.integers(1, 9))
    shape = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    y = randn(draw(SEEDS), shape[0] * shape[1], draw(st.integers(1, 300)), dtype=dtype)
    arguments: dict[str, Any] = {"y": y, "weights": randn(draw(SEEDS), *shape)}
    if draw(st.booleans()):
        arguments |= {"ids": integers(draw(SEEDS), -1, num_experts + 1, *shape), "num_experts": num_experts}
    return dtype, arguments


@compared("combine")
@given(case=combines())
def test_combine(variant: str, case: tuple[torch.dtype, dict[str, Any]]) -> None:
    check("combine", variant, case[1], case[0])


@st.composite
def expert_layers(draw: Any) -> tuple[torch.dtype, dict[str, Any]]:
    dtype, options = draw(DTYPES), draw(activations())
    num_experts, top_k, num_tokens = (
        draw(st.integers(1, 9)),
        draw(st.integers(1, 5)),
        draw(st.integers(0, 40)),
    )
    d, f = draw(st.integers(1, 90)), draw(st.integers(1, 70))
    n = 2 * f if options["gated"] else f
    shapes = ((d, n), (f, d)) if options["transposed"] else ((n, d), (d, f))
    arguments = {
        "x": randn(draw(SEEDS), num_tokens, d, dtype=dtype),
        "w_gate_up": (randn(draw(SEEDS), num_experts, *shapes[0]) * 1.5 * d**-0.5).to(dtype),
        "w_down": (randn(draw(SEEDS), num_experts, *shapes[1]) * 1.5 * f**-0.5).to(dtype),
        "weights": randn(draw(SEEDS), num_tokens, top_k).abs(),
        "ids": integers(draw(SEEDS), draw(st.sampled_from((0, -1))), num_experts + draw(st.sampled_from((0, 1))),
                        num_tokens, top_k),
        **options,
    }  # fmt: skip
    if draw(st.booleans()):
        arguments["b_gate_up"] = randn(draw(SEEDS), num_experts, n, dtype=dtype)
        arguments["b_down"] = randn(draw(SEEDS), num_experts, d, dtype=dtype)
    return dtype, arguments


@compared("fused_experts")
@given(case=expert_layers(), reduce=st.booleans())
def test_fused_experts(variant: str, case: tuple[torch.dtype, dict[str, Any]], reduce: bool) -> None:
    check("fused_experts", variant, {**case[1], "reduce": reduce}, case[0])


@compared("fused_experts")
@given(case=expert_layers(), seed=SEEDS)
def test_a_pair_row_does_not_depend_on_the_other_pairs(
    variant: str, case: tuple[torch.dtype, dict[str, Any]], seed: int
) -> None:
    """A subset of pairs, or of tokens, gives the bits that all of them gave: experts may be computed in waves."""
    spec, arguments = SPECS["fused_experts"], {**case[1], "reduce": False}
    ids = arguments["ids"]
    (everything,) = call(spec, variant, spec.bind((), arguments))
    kept = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    fewer = torch.where(kept, ids, len(arguments["w_down"]))
    (some,) = call(spec, variant, spec.bind((), {**arguments, "ids": fewer}))
    assert same_bits(some[kept.flatten()], everything[kept.flatten()])
    assert not some[~kept.flatten()].any()
    one = {n: arguments[n][-1:] for n in ("x", "ids", "weights")}
    (last,) = call(spec, variant, spec.bind((), {**arguments, **one}))
    assert same_bits(last, everything[everything.shape[0] - last.shape[0] :])


@st.composite
def decodes(draw: Any) -> tuple[torch.dtype, dict[str, Any]]:
    dtype, batch, queries = draw(DTYPES), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    heads, rank = draw(st.integers(1, 5)), draw(st.sampled_from((1, 16, 33, 64, 512)))
    nope, rope, value = (
        draw(st.integers(1, 40)),
        draw(st.sampled_from((0, 2, 32, 64))),
        draw(st.integers(1, 40)),
    )
    capacity = draw(st.integers(1, 70))
    arguments: dict[str, Any] = {
        "q": randn(draw(SEEDS), batch, queries, heads, nope + rope, dtype=dtype), "scale": (nope + rope) ** -0.5,
        "w_kv_b": (randn(draw(SEEDS), heads * (nope + value), rank) * rank**-0.5).to(dtype),
        "causal": draw(st.booleans()),
    }  # fmt: skip
    shape = (batch, capacity)
    if draw(st.booleans()):
        page_size, pages = draw(st.sampled_from((1, 8, 16, 48))), draw(st.integers(1, 4))
        shape, capacity = (batch * pages + 1, page_size), page_size * pages
        arguments["block_table"] = integers(draw(SEEDS), 0, shape[0], batch, pages).int()
    arguments["latent"] = randn(draw(SEEDS), *shape, rank, dtype=dtype)
    arguments["k_rope"] = randn(draw(SEEDS), *shape, rope, dtype=dtype)
    if draw(st.booleans()):
        arguments["lengths"] = integers(draw(SEEDS), 0, capacity + 1, batch).int()
    if draw(st.booleans()):
        arguments["mask"] = integers(draw(SEEDS), 0, 3, batch, queries, capacity) > 0
    return dtype, arguments


@compared("mla_decode")
@given(case=decodes())
def test_mla_decode(variant: str, case: tuple[torch.dtype, dict[str, Any]]) -> None:
    dtype, arguments = case
    spec = SPECS["mla_decode"]
    bound = spec.bind((), arguments)
    truth = evaluate(spec, spec.ref, yardstick.in_fp64(bound))
    assert spec.model is not None
    sample = yardstick.Sample(bound, truth, evaluate(spec, spec.model, bound))
    found = call(spec, variant, bound)
    yardstick.check_results(spec, [sample], [found], dtype, slack=3.0)
    nothing = truth[1] == -float("inf")
    assert not found[0][nothing].any()
