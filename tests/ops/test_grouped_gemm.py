"""grouped_gemm's Triton kernels where the generic cases do not look: every kind of launch configuration on small shapes,
odd offsets, and what `run` offers other ops. Triton runs in its interpreter where there is no GPU; so this file is its
own GPU test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from support import available, device_of, same_bits
from torch import Tensor

from moekern import _triton
from moekern.ops import SPECS
from moekern.ops.grouped_gemm import config, ref
from moekern.ops.grouped_gemm.activation import ACTIVATIONS
from moekern.ops.grouped_gemm.config import GroupedGemmConfig

if not available(SPECS["grouped_gemm"], "triton"):
    pytest.skip("neither Triton's interpreter nor a GPU", allow_module_level=True)

from moekern.ops.grouped_gemm import triton, variants

DEVICE = device_of("triton")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
TMA = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)

# Tiles of 16 x 32 x 16, so that small tensors have several of each, in every kind of launch.
PLAIN = GroupedGemmConfig(16, 32, 16, num_warps=4, num_stages=2, group_m=2)
KINDS = {
    "plain": PLAIN,
    "persistent": replace(PLAIN, programs_per_sm=1),
    "swap": replace(PLAIN, swap=True),
    "split": replace(PLAIN, split_k=3),
    "swap_split": replace(PLAIN, swap=True, split_k=2),
    "split_in_more_than_there_is": replace(PLAIN, split_k=5),
    "wide": replace(PLAIN, block_n=256, num_warps=8),
    "tma": replace(PLAIN, tma=True),
    "tma_swap_persistent": replace(PLAIN, tma=True, swap=True, programs_per_sm=1, group_m=1),
    "tma_split": replace(PLAIN, tma=True, split_k=2),
}


@pytest.fixture(autouse=True)
def few_sms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A part with 3 SMs, so that a persistent grid goes round several times."""
    monkeypatch.setattr(_triton, "gpu_of", lambda device: replace(_triton.ASSUMED, num_sms=3))
    triton._plan.cache_clear()
    yield
    triton._plan.cache_clear()


def whole(generator: torch.Generator, *shape: int) -> Tensor:
    """Small whole numbers: their sums of products are exact in every order, in fp32 and, rounded, in 16 bits."""
    return torch.randint(-3, 4, shape, generator=generator).float()


def inputs(counts: tuple[int, ...], d: int, n: int, *, head: int = 0, tail: int = 0, transposed: bool = False,
           seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """Rows of no expert, before the first and after the last, are NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = head + sum(counts) + tail
    x = whole(generator, num_rows, d)
    x[:head], x[num_rows - tail :] = float("nan"), float("nan")
    weight = whole(generator, len(counts), *((d, n) if transposed else (n, d)))
    return {"x": x, "weight": weight, "offsets": torch.tensor((head, *counts)).cumsum(0).int(),
            "transposed": transposed}  # fmt: skip


def to_device(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: v.to(DEVICE, dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
            for n, v in arguments.items()}  # fmt: skip


def compare(
    arguments: dict[str, Any], dtype: torch.dtype, chosen: GroupedGemmConfig | None, exact: bool
) -> None:
    arguments = to_device(arguments, dtype)
    found = triton.run(**arguments, config=chosen)
    if exact:
        assert torch.equal(found, ref.grouped_gemm(**arguments))  # but for the signs of zeros
        return
    truth = ref.grouped_gemm(**{n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
                                for n, v in arguments.items()})  # fmt: skip
    close = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * 0.51  # one rounding
    torch.testing.assert_close(found.double(), truth, rtol=close, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("columns", ["single", "gated", "interleaved"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_launch(kind: str, columns: str, transposed: bool) -> None:
    if KINDS[kind].tma and not TMA:
        pytest.skip("no tensor descriptors on this GPU")
    gated = columns != "single"
    # N and D leave edges in every block, and rows at multiples of 16 bytes, as descriptors want them.
    arguments = inputs((3, 0, 17), 24, 48, head=2, tail=3, transposed=transposed)
    compare({**arguments, "gated": gated, "interleaved": columns == "interleaved"}, torch.bfloat16, KINDS[kind], True)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_in_every_kind_of_launch(kind: str, dtype: torch.dtype) -> None:
    if KINDS[kind].tma and not TMA:
        pytest.skip("no tensor descriptors on this GPU")
    arguments = inputs((3, 0, 17), 24, 48, head=2, tail=3)
    generator = torch.Generator().manual_seed(1)
    num_rows = arguments["x"].shape[0]
    arguments["x"] = torch.randn(9, 24, generator=generator)
    arguments["weight"] = torch.randn(3, 48, 24, generator=generator) / 5
    arguments["gather"] = torch.randint(-2, 11, (num_rows,), generator=generator, dtype=torch.int32)
    arguments["bias"] = torch.randn(3, 48, generator=generator)
    arguments["row_scale"] = torch.rand(num_rows, generator=generator)
    compare({**arguments, "gated": True, "interleaved": True, "activation": "silu", "limit": 1.5, "alpha": 1.702,
             "up_shift": 1.0}, dtype, KINDS[kind], False)  # fmt: skip


@pytest.mark.parametrize("gated", [False, True], ids=["single", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_activations(activation: str, gated: bool, dtype: torch.dtype) -> None:
    """Over the whole range, infinities and NaN included: x times the unit matrix is x."""
    values = torch.tensor([-torch.inf, -3e4, -100, -20, -5, -1, -1e-3, -0.0, 0.0, 1e-4, 0.5, 1, 3, 9, 30, 3e4, torch.inf, torch.nan])  # fmt: skip
    if activation == "gelu":
        values[-2] = 3e4  # torch's vectorised gelu makes NaN of infinity
    g, u = values[:, None], torch.ones(len(values), 1)
    x = torch.cat((g, u), 1) if gated else g
    for limit, split in itertools.product((None, 7.0), (1, 2)):
        arguments = to_device({"x": x, "weight": torch.eye(x.shape[1])[None].contiguous(), "offsets": torch.tensor([0, len(values)]).int(), "activation": activation,
                               "gated": gated, "limit": limit}, dtype)  # fmt: skip
        if gated:  # the other column of an infinity would be inf * 0
            arguments["x"] = arguments["x"].nan_to_num(nan=1.0, posinf=6e4, neginf=-6e4)
        found = triton.run(**arguments, config=replace(PLAIN, split_k=split))
        expected = ref.grouped_gemm(**arguments)
        close = 2e-6 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(found, expected, rtol=close, atol=4e-7, equal_nan=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Any], torch.dtype, GroupedGemmConfig | None]:
    counts = tuple(draw(st.lists(st.sampled_from((0, 0, 1, 2, 15, 16, 17, 35)), min_size=1, max_size=4)))
    d, n = draw(st.sampled_from((1, 8, 31, 32, 50))), draw(st.sampled_from((2, 8, 34)))
    arguments = inputs(counts, d, n, head=draw(st.sampled_from((0, 3))), tail=draw(st.sampled_from((0, 2, 20))),
                       transposed=draw(st.booleans()), seed=draw(st.integers(0, 99)))  # fmt: skip
    columns = draw(st.sampled_from(("single", "gated", "interleaved")))
    arguments.update(gated=columns != "single", interleaved=columns == "interleaved")
    kinds = [None, *(c for c in KINDS.values() if TMA or not c.tma)]
    return arguments, draw(st.sampled_from((torch.float32, torch.bfloat16))), draw(st.sampled_from(kinds))


@given(problems())
def test_any_offsets(problem: tuple[dict[str, Any], torch.dtype, GroupedGemmConfig | None]) -> None:
    compare(*problem, exact=True)


@pytest.mark.parametrize(
    "offsets", [(9, 9, 9), (-5, 4, 100), (4, 2, 7), (0, 2**31 - 1, 2**31 - 1), (-(2**31), 0, 5)]
)
@pytest.mark.parametrize("kind", ["plain", "persistent", "tma", "swap_split"])
def test_offsets_that_lie_touch_nothing_outside(offsets: tuple[int, ...], kind: str) -> None:
    """Offsets out of range are clamped as in ref; descending ones give some finite rows, and no access outside."""
    if KINDS[kind].tma and not TMA:
        pytest.skip("no tensor descriptors on this GPU")
    arguments = inputs((4, 5), 16, 32)
    arguments["offsets"] = torch.tensor(offsets, dtype=torch.int32)
    if list(offsets) == sorted(offsets):
        compare(arguments, torch.float32, KINDS[kind], True)
    else:
        triton.run(**to_device(arguments, torch.float32), config=KINDS[kind])


@pytest.mark.parametrize("kind", ["plain", "swap", "split"])
def test_rows_of_pairs_are_gathered_and_scattered(kind: str) -> None:
    """A permutation of (token, expert) pairs as `route` gives it: tokens in, rows in the order of pairs out."""
    num_tokens, top_k, counts = 7, 3, (4, 0, 11)
    generator = torch.Generator().manual_seed(0)
    x, weight = whole(generator, num_tokens, 40), whole(generator, 3, 24, 40)
    perm = torch.randperm(num_tokens * top_k, generator=generator).int()
    perm[15:] = -1  # pairs of no expert
    offsets = torch.tensor((0, *counts)).cumsum(0).int()
    out = torch.full((num_tokens * top_k, 24), 77.0)
    x, weight, perm, offsets, out = (t.to(DEVICE) for t in (x, weight, perm, offsets, out))
    found = triton.run(
        x, weight, offsets, gather=perm, gather_div=top_k, scatter=perm, out=out, config=KINDS[kind]
    )
    assert found is out
    sorted_rows = ref.grouped_gemm(x, weight, offsets, gather=torch.where(perm < 0, -1, perm // top_k))
    expected = torch.full_like(out, 77.0)
    expected[perm[:15].long()] = sorted_rows[:15]
    assert same_bits(out, expected)


def test_rows_are_written_into_a_wider_tensor() -> None:
    arguments = to_device(inputs((3, 4), 16, 24), torch.float32)
    for kind in ("plain", "split"):
        wide = torch.full((7, 40), 77.0, device=DEVICE)
        triton.run(**arguments, out=wide[:, 8:32], config=KINDS[kind])
        assert same_bits(wide[:, 8:32].contiguous(), ref.grouped_gemm(**arguments))
        assert bool((wide[:, :8] == 77).all() & (wide[:, 32:] == 77).all())


def test_tensors_that_no_descriptor_takes() -> None:
    """Bases and strides of other than 16 bytes go by pointers, whatever the configuration says."""
    arguments = to_device(inputs((3, 4), 16, 24), torch.bfloat16)
    expected = ref.grouped_gemm(**arguments)
    x = torch.zeros(7, 17, dtype=torch.bfloat16, device=DEVICE)[:, 1:].copy_(arguments["x"])
    weight = torch.zeros(2, 24, 19, dtype=torch.bfloat16, device=DEVICE)[..., 3:].copy_(arguments["weight"])
    for odd in ({"x": x}, {"weight": weight}, {"x": x, "weight": weight}):
        assert same_bits(triton.run(**{**arguments, **odd}, config=KINDS["tma"]), expected)


def test_empty_dimensions() -> None:
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32, device=DEVICE)
    for m, n, d in itertools.product((0, 3), (0, 4), (0, 8)):
        x, weight = torch.ones(m, d, device=DEVICE), torch.ones(2, n, d, device=DEVICE)
        for chosen in (None, KINDS["tma"] if TMA else None, KINDS["split"]):
            found = triton.run(x, weight, offsets.clamp(max=m), config=chosen)
            assert found.shape == (m, n)
            assert bool((found == d).all())


# (E, N, D, gated) x rows: what the named models ask for.
NAMED = [
    (num_tokens * top_k, num_experts, n, k, gated)
    for num_tokens, top_k, num_experts, d, f in (
        (32768, 4, 64, 4096, 2048), (32768, 16, 256, 4096, 256), *((t, 6, 64, 2048, 1408) for t in (1, 16, 64, 256, 1024, 2048, 4096, 8192)),
        *((t, 8, 128, 2048, 768) for t in (1, 16, 64, 256, 2048, 4096, 8192)), (1, 2, 8, 4096, 7168), (32, 2, 8, 4096, 7168),
        (1, 10, 512, 2048, 128))
    for n, k, gated in ((2 * f, d, True), (d, f, False))
]  # fmt: skip


@pytest.mark.parametrize("gpu", _triton.PARTS.values(), ids=lambda g: str(g.capability))
def test_choices_fit_the_part_and_are_compiled_by_the_gate(gpu: _triton.Gpu) -> None:
    for size in (2, 4):
        compiled = variants.configs(gpu, size)
        # Both products of a gated and of a plain layer, from one row to a million, few experts to many.
        shapes = [*NAMED, *((m, e, n, d, gated) for m in (1, 7, 100, 1000, 20000, 10**6) for e in (1, 8, 100, 512)
                            for n in (64, 1024, 8192) for d in (64, 512, 8192) for gated in (False, True))]  # fmt: skip
        for num_rows, num_experts, n, d, gated in shapes:
            chosen = config.choose(num_rows, num_experts, n, d, size, gated, gpu)
            assert config.ring_bytes(chosen, size) <= gpu.shared - config.BESIDE_RING
            key = variants.specialisation(chosen)
            assert compiled[key] or not gated, f"{chosen} is not in the gate"
            if chosen.split_k > 1:
                assert chosen.split_k * num_rows * n * 4 <= config.MAX_PARTIALS
                assert d >= chosen.split_k * config.MIN_SPLIT_BLOCKS * chosen.block_k


def test_choices_for_the_named_shapes() -> None:
    def chosen(tokens: int, top_k: int, num_experts: int, d: int, f: int, capability: int = 90) -> Any:
        return config.choose(tokens * top_k, num_experts, 2 * f, d, 2, True, _triton.PARTS[capability])

    for shape in (
        (32768, 4, 64, 4096, 2048),
        (32768, 16, 256, 4096, 256),
        (4096, 6, 64, 2048, 1408),
        (4096, 8, 128, 2048, 768),
    ):
        large = chosen(*shape)
        assert (large.block_m, large.block_n, large.tma, large.programs_per_sm) == (128, 256, True, 1)
        assert not chosen(*shape, capability=80).tma
    for tokens in (1, 16, 64):
        few = chosen(tokens, 6, 64, 2048, 1408)
        assert (few.swap, few.block_m) == (True, 16)
        assert not chosen(tokens, 6, 64, 2048, 1408, capability=80).swap
    assert chosen(256, 6, 64, 2048, 1408).block_m == 64
    # 10 experts of 256 columns are 20 tiles: without a split 112 of 132 SMs idle.
    assert chosen(1, 10, 512, 2048, 128).split_k > 1
    assert chosen(1, 6, 64, 2048, 1408).split_k == 1  # 22 x 6 tiles are one wave as they are


def test_row_blocks_are_bounded() -> None:
    for counts in ((0, 0), (1, 1, 1), (17, 16, 1), (160, 1)):
        worst = config.max_row_blocks(sum(counts), len(counts), 16)
        assert sum(-(-c // 16) for c in counts) <= worst <= sum(counts)
