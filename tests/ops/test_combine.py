"""combine's Triton kernel where the generic cases do not look: more rows than are in flight together, none at all, ids and
weights that must not be read. Triton runs in its interpreter where there is no GPU; so this file is its own GPU test."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from support import DTYPE_IDS, available, device_of, same_bits
from torch import Tensor

from moekern import _triton
from moekern.ops import SPECS, combine
from moekern.ops.combine import config, ref

if not available(SPECS["combine"], "triton"):
    pytest.skip("neither Triton's interpreter nor a GPU", allow_module_level=True)

from moekern.ops.combine import triton

DEVICE = device_of("triton")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


def compare(found: Tensor, y: Tensor, weights: Tensor, ids: Tensor | None, num_experts: int | None) -> None:
    """Within a rounding of the sum's dtype and 2^-22 of its terms."""
    truth = ref.combine(y.double(), weights.double(), ids, num_experts)
    terms = ref.combine(y.double().abs(), weights.double().abs(), ids, num_experts)
    allowed = truth.abs() * torch.finfo(y.dtype).eps / 2 + terms * 2**-22
    assert found.dtype == y.dtype
    assert ((found.cpu().double() - truth).abs() <= allowed).all()


@st.composite
def pair_rows(draw: st.DrawFn) -> dict[str, Any]:
    dtype = draw(st.sampled_from(tuple(DTYPE_IDS)))
    num_tokens, top_k, width = draw(st.integers(0, 6)), draw(st.integers(0, 20)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    y = torch.randn(num_tokens * top_k, width, generator=generator).to(dtype)
    weights = torch.randn(num_tokens, top_k, generator=generator).to(
        draw(st.sampled_from((dtype, torch.float32)))
    )
    ids, num_experts = None, None
    if draw(st.booleans()):
        num_experts = draw(st.integers(1, 9))
        ids = torch.randint(-1, num_experts + 1, (num_tokens, top_k), generator=generator)
        ids[torch.rand(ids.shape, generator=generator) < 0.1] = 2**31 - 1
        outside = (ids < 0) | (ids >= num_experts)
        y[outside.flatten()], weights[outside] = float("nan"), float("nan")
        ids = ids.to(draw(st.sampled_from((torch.int32, torch.int64))))
    return {"y": y, "weights": weights, "ids": ids, "num_experts": num_experts}


@given(arguments=pair_rows())
def test_any_shape(arguments: dict[str, Any]) -> None:
    moved = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    compare(combine(**moved, backend="triton"), **arguments)


@given(arguments=pair_rows(), block_d=st.sampled_from((64, 256)), unroll=st.sampled_from((1, 3, 4)))
def test_the_configuration_does_not_change_the_bits(
    arguments: dict[str, Any], block_d: int, unroll: int
) -> None:
    y, weights, ids, num_experts = (v.to(DEVICE) if isinstance(v, Tensor) else v for v in arguments.values())
    expected = triton.run(y.new_empty(len(weights), y.shape[1]), y, weights, ids, num_experts)
    found = triton.run(
        torch.empty_like(expected), y, weights, ids, num_experts, config.CombineConfig(block_d, unroll, 1)
    )
    assert same_bits(found, expected)


def test_ids_are_compared_before_they_are_cut_to_32_bits() -> None:
    y = torch.ones(4, 8, device=DEVICE)
    ids = torch.tensor([[2**32, 1, -(2**63), 2**32 + 1]], device=DEVICE)
    out = combine(y, torch.ones(1, 4, device=DEVICE), ids=ids, num_experts=3, backend="triton")
    assert (out == 1).all()


def test_choose_covers_every_shape() -> None:
    shapes = itertools.product((1, 7, 64, 4096, 1 << 20), (0, 1, 6, 32), (1, 64, 2048, 7168), (2, 4))
    for (t, k, d, size), gpu in itertools.product(shapes, _triton.PARTS.values()):
        for c in (config.choose(t, k, d, size, gpu), *config.candidates(t, k, d, size, gpu)):
            assert c.block_d & (c.block_d - 1) == 0
            assert c.block_d * size % (32 * c.num_warps * config.LOAD_BYTES) == 0
            assert -(-d // c.block_d) < 65536
            assert c.unroll >= 1
