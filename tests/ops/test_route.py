"""route's Triton kernels where the generic cases do not look: both structures, the boundary between them, many experts,
chunks of every size. Triton runs in its interpreter where there is no GPU; so this file is its own GPU test."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, strategies as st
from support import available, device_of, same_bits
from torch import Tensor

from moekern import _triton
from moekern.ops import SPECS, route
from moekern.ops.route import config, ref

if not available(SPECS["route"], "triton"):
    pytest.skip("neither Triton's interpreter nor a GPU", allow_module_level=True)

from moekern.ops.route import triton

DEVICE = device_of("triton")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
GPU = _triton.PARTS[90]


def compare(ids: Tensor, num_experts: int, chosen: config.RouteConfig | None = None) -> None:
    found = triton.run(ids.to(DEVICE), num_experts, chosen)
    for name, a, b in zip(("perm", "offsets", "counts"), found, ref.route(ids, num_experts), strict=True):
        assert same_bits(a.cpu(), b), f"{name}: got {a.tolist()}, expected {b.tolist()}"


@st.composite
def id_tensors(draw: st.DrawFn) -> tuple[Tensor, int]:
    num_experts = draw(st.sampled_from((1, 2, 7, 31, 64, 100, 257)))
    shape = draw(st.integers(0, 40)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    # Few distinct experts make long runs; a negative lower bound gives ids outside.
    low, high = draw(st.sampled_from(((0, num_experts), (-3, num_experts + 3), (0, min(3, num_experts)))))
    ids = torch.randint(low, high, shape, generator=generator)
    if draw(st.booleans()) and ids.numel() > 1:
        ids[0, 0], ids[-1, -1] = 2**31 - 1, -(2**31)
    return ids.to(draw(st.sampled_from((torch.int32, torch.int64)))), num_experts


@given(case=id_tensors(), chunk=st.sampled_from((16, 64, 128)), block_experts=st.sampled_from((64, 256)))
def test_one_launch(case: tuple[Tensor, int], chunk: int, block_experts: int) -> None:
    compare(*case, config.RouteConfig(chunk, block_experts))


@given(case=id_tensors(), chunk=st.sampled_from((16, 32, 128)), num_chunks=st.integers(1, 4))
def test_several_launches(case: tuple[Tensor, int], chunk: int, num_chunks: int) -> None:
    compare(*case, config.several_launches(case[1], num_chunks, chunk))


@given(case=id_tensors())
def test_as_chosen(case: tuple[Tensor, int]) -> None:
    compare(*case)


@pytest.mark.parametrize("num_pairs", [config.ONE_LAUNCH_PAIRS, config.ONE_LAUNCH_PAIRS + 1])
def test_the_boundary_between_the_structures(num_pairs: int) -> None:
    chosen = config.choose(num_pairs, 24, _triton.gpu_of(DEVICE))
    assert (chosen.num_chunks == 0) == (num_pairs == config.ONE_LAUNCH_PAIRS)
    ids = torch.randint(-1, 25, (num_pairs, 1), generator=torch.Generator().manual_seed(num_pairs))
    compare(ids, 24)


@pytest.mark.parametrize("num_experts", [255, 256, 257, 1023, 1024, 1025, 4096])
@pytest.mark.parametrize("several", [False, True])
def test_many_experts(num_experts: int, several: bool) -> None:
    chosen = config.several_launches(num_experts, 2, 32) if several else config.RouteConfig(32, 512)
    compare(
        torch.randint(-2, num_experts + 2, (25, 5), generator=torch.Generator().manual_seed(3)),
        num_experts,
        chosen,
    )


@pytest.mark.parametrize("value", [0, 6, 7, -1, 2**31 - 1, -(2**31), 2**63 - 1, 2**32 + 3, -(2**63)])
@pytest.mark.parametrize(
    "chosen", [config.RouteConfig(64, 64), config.several_launches(7, 2, 16)], ids=["one", "several"]
)
def test_all_ids_equal(value: int, chosen: config.RouteConfig) -> None:
    """To one expert, or outside in every way: 2^32 + 3 would be expert 3 if it were cut to 32 bits before the check."""
    compare(torch.full((45, 3), value), 7, chosen)


def test_more_than_it_holds_counters_for_goes_to_ref() -> None:
    ids = torch.randint(0, 5000, (9, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with pytest.raises(RuntimeError, match="exceeds 4096"):
        route(ids, 5000, backend="triton")
    for a, b in zip(route(ids, 5000), ref.route(ids, 5000), strict=True):
        assert same_bits(a, b)


def test_choose_covers_every_shape() -> None:
    sizes = (0, 1, 16, 17, 100, 512, 4096, 4097, 24576, 1 << 20, 2**31 - 1)
    for n, num_experts, gpu in itertools.product(sizes, (1, 7, 64, 1000, 4096), _triton.PARTS.values()):
        picked = config.choose(n, num_experts, gpu)
        for c in (picked, *config.candidates(n, num_experts, gpu)):
            assert c.chunk & (c.chunk - 1) == 0
            assert c.block_experts & (c.block_experts - 1) == 0
            if c.num_chunks:
                assert c.bins >= num_experts
                num_programs = -(-n // (c.chunk * c.num_chunks))
                assert num_programs <= 8 * gpu.num_sms, "the prefix sum would be long"
        if picked.num_chunks == 0:
            assert picked.chunk * picked.block_experts <= 2 * config.ONE_HOT
