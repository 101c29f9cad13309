"""gate_topk's GPU backends where the generic cases do not look: values that are no numbers, signs of zero, ties across
masks, wide rows, strides. Triton runs in its interpreter where there is no GPU; so this file is its own GPU test."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import available, device_of
from torch import Tensor

from moekern.ops import SPECS, gate_topk
from moekern.ops.gate_topk import config, ref

SPEC = SPECS["gate_topk"]
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.gpu] if device_of(name).type == "cuda" else [])
    for name in ("triton", "cuda")
    if available(SPEC, name)
]
pytestmark = pytest.mark.skipif(not BACKENDS, reason="neither Triton nor a GPU")
INF, NAN = float("inf"), float("nan")


def both(
    backend: str, logits: Tensor, top_k: int, **gating: Any
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What a backend and the definition return, both on the CPU."""
    moved = {n: v.to(device_of(backend)) if isinstance(v, Tensor) else v for n, v in gating.items()}
    got = gate_topk(logits.to(device_of(backend)), top_k, backend=backend, **moved)
    want = ref.gate_topk(logits, top_k, **gating)
    return (got[0].cpu(), got[1].cpu()), want


def compare(backend: str, logits: Tensor, top_k: int, **gating: Any) -> Tensor:
    (weights, ids), (expected_weights, expected_ids) = both(backend, logits, top_k, **gating)
    assert torch.equal(ids, expected_ids), f"got {ids.tolist()}, expected {expected_ids.tolist()}"
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-7, equal_nan=True)
    return ids


SPECIAL = torch.tensor([
    [0.5, NAN, 1.0, -INF, 2.0, -0.0, 0.0, -1.0],
    [NAN] * 8,
    [-INF] * 8,
    [INF, 1.0, INF, -INF, NAN, 0.0, 0.0, 2.0],
    [-0.0, 0.0, -0.0, 0.0, -1e-40, 1e-40, -0.0, 0.0],
    [-INF, NAN, torch.finfo(torch.float32).min, -INF, NAN, -3e38, 3e38, 0.0],
    [1.0] * 8,
])  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scoring", ref.SCORINGS)
@pytest.mark.parametrize(
    "groups", [(1, 1, "max"), (4, 2, "max"), (4, 3, "top2"), (8, 6, "top2"), (2, 1, "top2")]
)
def test_values_that_are_no_numbers(backend: str, scoring: str, groups: tuple[int, int, str]) -> None:
    num_groups, topk_groups, group_score = groups
    logits = SPECIAL
    if scoring == "sqrtsoftplus":
        logits = logits.clamp(
            max=1e30
        )  # the definition's own softplus(inf) is fine; inf - inf in a sum is not
    ids = compare(backend, logits, 4, scoring=scoring, num_groups=num_groups, topk_groups=topk_groups,
                  group_score=group_score)  # fmt: skip
    assert all(len(set(row)) == 4 for row in ids.tolist()), "ids repeat"


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_zero_ties_with_zero(backend: str) -> None:
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    assert compare(backend, logits, 4, scoring="softmax_topk").tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_group_ranks_below_nan(backend: str) -> None:
    """Two groups stay; one of them holds only NaN, which still comes before the finite experts of a masked group."""
    logits = torch.tensor([[5.0, 4.0, NAN, NAN, -3.0, -4.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, -INF, -INF])
    logits[0, 4:] = NAN
    assert compare(
        backend, logits, 4, scoring="sigmoid", bias=bias, num_groups=3, topk_groups=2
    ).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_maxima_are_the_two_best_of_a_group(backend: str) -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.9, 0.0, 0.0]])  # 1 + 1 > 1.9 + 0, but 1 + 0 < 1.9 + 0
    ids = compare(backend, logits, 2, scoring="softmax_topk", num_groups=2, topk_groups=1, group_score="top2")
    assert ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_experts", "num_groups", "top_k"), [
    (1, 1, 1), (2, 2, 1), (31, 1, 31), (33, 1, 5), (64, 64, 6), (96, 3, 8), (100, 4, 10), (255, 1, 64), (257, 1, 8),
    (512, 1, 10), (768, 24, 8), (1000, 8, 64), (1024, 1, 64),
])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_shapes(backend: str, num_experts: int, num_groups: int, top_k: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(num_experts)
    logits = torch.randn(5, num_experts, generator=generator) * 2
    if tied:
        logits = logits.round()
    kept = -(-top_k * num_groups // num_experts)
    compare(backend, logits, top_k, scoring="sigmoid_topk", num_groups=num_groups, topk_groups=min(num_groups, kept + 1),
            group_score="top2")  # fmt: skip


@pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] == "triton"])
@pytest.mark.parametrize("num_experts", [1536, 4096])
def test_rows_beyond_one_warp(backend: str, num_experts: int) -> None:
    logits = (torch.randn(3, num_experts, generator=torch.Generator().manual_seed(1)) * 3).round()
    compare(backend, logits, 16, scoring="softmax_topk")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_as_asked(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(device_of(backend))
    weights, ids = gate_topk(logits, 4, ids_dtype=dtype, backend=backend)
    assert ids.dtype == dtype
    assert torch.equal(ids.cpu(), ref.gate_topk(logits.cpu(), 4)[1].to(dtype))
    given, weights_of_given = ids.clone(), weights
    weights, ids = gate_topk(logits, 4, preselected=given, ids_dtype=dtype, backend=backend)
    assert torch.equal(ids, given)
    torch.testing.assert_close(weights, weights_of_given, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scoring", ref.SCORINGS)
def test_hostile_preselected_ids(backend: str, scoring: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 8, generator=generator)
    ids = torch.tensor([[-1, 8, 2**31 - 1, 3], [-(2**31), 7, 7, 0]])
    (weights, got), (expected, _) = both(backend, logits, 4, scoring=scoring, preselected=ids,
                                         expert_scale=torch.rand(8, generator=generator))  # fmt: skip
    assert torch.equal(got, ids)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-7)
    assert (weights[0, :3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scoring", ref.SCORINGS)
@pytest.mark.parametrize("bounds", [(0.0, 0.0), (0.5, 0.0), (0.0, 100.0), (0.25, 0.3)])
def test_the_sum_is_offset_and_bounded(backend: str, scoring: str, bounds: tuple[float, float]) -> None:
    logits = torch.rand(5, 40, generator=torch.Generator().manual_seed(7)) + 0.1
    compare(
        backend,
        logits,
        5,
        scoring=scoring,
        renormalize=True,
        norm_eps=bounds[0],
        norm_min=bounds[1],
        scale=2.5,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_far_apart_and_columns_that_are_not_contiguous(backend: str) -> None:
    logits = torch.randn(4, 24, generator=torch.Generator().manual_seed(5))
    wide = torch.full((4, 1000), NAN)
    wide[:, 3:27] = logits
    for view in (wide[:, 3:27], logits.t().contiguous().t(), logits[::2], logits[:1].expand(4, 24)):
        compare(backend, view, 3, renormalize=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tokens_take_several_rows_per_program(backend: str) -> None:
    """1100 rows are the fewest that make `choose` put two of 8 experts into one program on 132 SMs."""
    assert config.choose(1100, 8, 1, 132).block_tokens > 1
    logits = (torch.randn(1100, 8, generator=torch.Generator().manual_seed(2)) * 2).round()
    compare(backend, logits, 3, num_groups=4, topk_groups=2, group_score="top2")


def test_choose_covers_every_shape() -> None:
    for num_experts, num_tokens, num_sms in itertools.product(
        (1, 7, 64, 100, 1024, 4096), (1, 63, 4096, 1 << 20), (16, 132)
    ):
        for num_groups in (g for g in (1, 2, 5, 8, 64) if num_experts % g == 0):
            c = config.choose(num_tokens, num_experts, num_groups, num_sms)
            assert c.block_experts >= num_experts
            for n in (c.block_experts, c.block_tokens, c.num_warps):
                assert n & (n - 1) == 0
            assert 1 <= c.num_warps <= 32
            assert c.block_experts <= 32 * c.num_warps * config.KEYS_PER_LANE
            assert c.block_tokens == 1 or num_tokens >= 4 * num_sms * c.block_tokens
            assert c.block_tokens * c.block_experts <= 256 or c.block_tokens in (1, 16)
