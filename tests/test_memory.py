"""What a kernel may touch: nothing outside its buffers, everything inside them however far, nothing unwritten."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded import GuardAllocations, Guarded
from support import available, backend_of, call, same_bits, variants
from torch import Tensor

from moekern.ops import SPECS

HERE = Path(__file__).parent
CPU = [v for v in variants() if v.startswith("cpu")]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if any(available(s, v) for v in CPU)])
def test_nothing_outside_the_buffers_is_touched(name: str) -> None:
    done = python(str(HERE / "guarded.py"), name, *CPU)
    last = done.stdout.splitlines()[-1:] or ["nothing"]
    assert done.returncode == 0, f"exit status {done.returncode} in {last[0]}\n{done.stderr[-2000:]}"
    assert len(done.stdout.splitlines()) >= 2 * len(CPU)


@pytest.mark.parametrize(("at_end", "index"), [(True, "3"), (False, "-1")])
def test_a_guard_page_kills(at_end: bool, index: str) -> None:
    """The guard itself: one element outside, on either side."""
    code = (
        "import ctypes, torch; from guarded import Guarded;"
        f"t = Guarded({at_end}).copy(torch.ones(3)); p = ctypes.cast(t.data_ptr(), ctypes.POINTER(ctypes.c_float));"
        f"print(p[0] + p[2], flush=True); p[{index}]"
    )
    done = python("-c", code)
    assert done.stdout == "2.0\n"
    assert done.returncode == -11


def test_outputs_and_workspace_are_guarded() -> None:
    guarded = Guarded(at_end=True)
    with GuardAllocations(guarded):
        made = [torch.empty(3), torch.ones(2).new_empty(5), torch.ones(2).to(torch.float64)]
    for value in made:
        assert (value.data_ptr() + value.nbytes) % mmap.PAGESIZE == 0
    del made, value
    guarded.free()


MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on
BEYOND = 2**31 + 64  # elements; an int32 offset wraps to about -2**31


def virtual(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros that take memory only where they are written. Behind a wrapped offset lie zeros too, not a crash."""
    numel = 1
    for n in shape:
        numel *= n
    before, size = 2**32 * dtype.itemsize, numel * dtype.itemsize
    region = mmap.mmap(-1, before + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    region.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8, offset=before).view(dtype).view(shape)


def randn(*shape: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32
    ).bfloat16()


def far(value: Tensor) -> Tensor:
    """The same values with more than 2**31 elements between the entries of the first dimension."""
    result = virtual(BEYOND * (value.shape[0] - 1) + value[0].numel()).as_strided(
        value.shape, (BEYOND, *value[0].contiguous().stride())
    )
    return result.copy_(value)


def each(name: str, *, interpreter: bool = False) -> Any:
    """Every backend of an op that can run on CPU tensors here."""
    wanted = [v for v in variants() if available(SPECS[name], v) and v != "cuda"]
    on_gpu = torch.cuda.is_available()
    return pytest.mark.parametrize(
        "variant", [v for v in wanted if v != "triton" or (interpreter and not on_gpu)]
    )


def results(name: str, variant: str, **arguments: Any) -> tuple[Tensor, ...]:
    return call(SPECS[name], variant, SPECS[name].bind((), arguments))


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(a, b), f"output {i}"
        assert a.numel() == 0 or not a.is_floating_point() or a.abs().max() > 0, f"output {i} is all zeros"


@each("gate_topk", interpreter=True)
def test_far_logits(variant: str) -> None:
    logits = randn(2, 64)
    near, there = (results("gate_topk", variant, logits=v, top_k=4) for v in (logits, far(logits)))
    assert_same(there, near)


@each("gate")
def test_far_tokens_of_gate(variant: str) -> None:
    x, weight = randn(2, 96), randn(16, 96)
    near, there = (results("gate", variant, x=v, weight=weight, top_k=4) for v in (x, far(x)))
    assert_same(there, near)


@each("combine")
def test_far_pair_rows(variant: str) -> None:
    num_tokens, top_k, width = 65, 64, 2**19 + 64
    y, row = virtual(num_tokens * top_k, width), randn(1, width)
    y[-1] = row
    weights = torch.full((num_tokens, top_k), 0.5)
    ids = torch.full((num_tokens, top_k), 9)
    ids[-1, -1] = 3
    (found,) = results("combine", variant, y=y, weights=weights, ids=ids, num_experts=9)
    assert torch.equal(found[-1:], row * 0.5)
    assert not found[:-1].any()


@each("grouped_gemm")
def test_far_expert_of_grouped_gemm(variant: str) -> None:
    weight, x = virtual(4096, 1024, 520), randn(3, 520)
    weight[-1] = randn(1024, 520)
    offsets = torch.zeros(4097, dtype=torch.int32)
    offsets[-1] = 3
    found = results("grouped_gemm", variant, x=x, weight=weight, offsets=offsets)
    expected = results("grouped_gemm", variant, x=x, weight=weight[-1:].clone(), offsets=offsets[-2:])
    assert_same(found, expected)


@each("grouped_gemm")
def test_far_gathered_rows(variant: str) -> None:
    rows, weight = randn(2, 1032), randn(1, 40, 1032)
    x = virtual(2**21 + 8, 1032)
    gather = torch.tensor([2**21 + 7, 2**21 + 1], dtype=torch.int32)
    x[gather.long()] = rows
    offsets = torch.tensor([0, 2], dtype=torch.int32)
    found = results("grouped_gemm", variant, x=x, weight=weight, offsets=offsets, gather=gather)
    assert_same(found, results("grouped_gemm", variant, x=rows, weight=weight, offsets=offsets))


@each("fused_experts")
def test_far_expert_of_fused_experts(variant: str) -> None:
    w_gate_up, w_down = virtual(4096, 1024, 1032), virtual(4096, 1032, 512)
    w_gate_up[-2:], w_down[-2:] = randn(2, 1024, 1032) * 0.03, randn(2, 1032, 512) * 0.04
    common = {"x": randn(3, 1032), "weights": torch.rand(3, 2, generator=torch.Generator().manual_seed(0))}
    ids = torch.tensor([[0, 1], [1, 0], [1, 1]])
    found = results("fused_experts", variant, w_gate_up=w_gate_up, w_down=w_down, ids=ids + 4094, **common)
    near = {"w_gate_up": w_gate_up[-2:].clone(), "w_down": w_down[-2:].clone()}
    assert_same(found, results("fused_experts", variant, ids=ids, **near, **common))


@each("fused_experts")
def test_far_tokens_of_fused_experts(variant: str) -> None:
    x, w_gate_up, w_down = randn(2, 64), randn(2, 96, 64), randn(2, 64, 48)
    common = {
        "w_gate_up": w_gate_up,
        "w_down": w_down,
        "weights": torch.ones(2, 1),
        "ids": torch.tensor([[1], [0]]),
    }
    assert_same(
        results("fused_experts", variant, x=far(x), **common),
        results("fused_experts", variant, x=x, **common),
    )


HEADS, RANK, ROPE, NOPE, VALUE = 4, 512, 64, 32, 32


def attention() -> dict[str, Any]:
    weight = (randn(HEADS * (NOPE + VALUE), RANK).float() / RANK**0.5).bfloat16()
    return {"q": randn(2, 1, HEADS, NOPE + ROPE), "w_kv_b": weight, "scale": 0.1}


@each("mla_decode")
def test_far_pages(variant: str) -> None:
    pages, page_size = 2**21 + 4, 16
    latent, k_rope = virtual(pages, page_size, RANK), virtual(pages, page_size, ROPE)
    table = torch.tensor([[pages - 1, 5], [2**18 + 1, pages - 3]], dtype=torch.int32)
    for page in table.flatten().tolist():
        latent[page], k_rope[page] = randn(page_size, RANK), randn(page_size + page % 7, ROPE)[:page_size]
    lengths = torch.tensor([32, 19], dtype=torch.int32)
    common = {**attention(), "lengths": lengths}
    found = results("mla_decode", variant, latent=latent, k_rope=k_rope, block_table=table, **common)
    near_table = torch.arange(4, dtype=torch.int32).view(2, 2)
    near = {"latent": latent[table.flatten().long()], "k_rope": k_rope[table.flatten().long()]}
    assert_same(found, results("mla_decode", variant, block_table=near_table, **near, **common))


@each("mla_decode")
def test_far_sequences(variant: str) -> None:
    latent, k_rope = randn(2, 37, RANK), randn(2, 37, ROPE)
    near = results("mla_decode", variant, latent=latent, k_rope=k_rope, **attention())
    assert_same(results("mla_decode", variant, latent=far(latent), k_rope=far(k_rope), **attention()), near)


@each("mla_decompress", interpreter=True)
def test_far_sequences_of_mla_decompress(variant: str) -> None:
    latent, k_rope = randn(2, 37, RANK), randn(2, 37, ROPE)
    common = {"w_kv_b": attention()["w_kv_b"], "num_heads": HEADS, "nope_dim": NOPE}
    near = results("mla_decompress", variant, latent=latent, k_rope=k_rope, **common)
    found = results("mla_decompress", variant, latent=far(latent), k_rope=far(k_rope), **common)
    # Not the same bits: rows of one block become one matrix product, rows far apart two.
    torch.testing.assert_close(found, near, rtol=2**-7, atol=2**-7)


@each("mla_cache_write", interpreter=True)
def test_far_slots(variant: str) -> None:
    """The caches are written in place here: a copy of them would not be virtual."""
    num_slots = 2**25 + 16
    slots = torch.tensor([num_slots - 1, 2**22 + 3, 1])
    angle = torch.rand(3, ROPE // 2, generator=torch.Generator().manual_seed(0))
    common = {"kv": randn(3, RANK + ROPE), "norm_weight": randn(RANK), "cos": angle.cos(), "sin": angle.sin()}
    near = results("mla_cache_write", variant, latent_cache=torch.zeros(3, RANK).bfloat16(),
                   rope_cache=torch.zeros(3, ROPE).bfloat16(), slots=torch.arange(3), **common)  # fmt: skip
    latent, rope = virtual(num_slots, RANK), virtual(num_slots, ROPE)
    from support import use_variant

    from moekern.ops import mla_cache_write

    with use_variant(variant):
        mla_cache_write(
            latent_cache=latent, rope_cache=rope, slots=slots, backend=backend_of(variant), **common
        )
    assert_same((latent[slots], rope[slots]), near)


def test_uninitialised_memory_is_poisoned() -> None:
    """What every comparison in this suite counts on."""
    assert torch.empty(7).isnan().all()
    assert torch.ones(2, dtype=torch.bfloat16).new_empty(3, 5).isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()


@each("grouped_gemm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_of_no_expert_are_zero(variant: str, dtype: torch.dtype) -> None:
    x, weight = randn(9, 40).to(dtype), randn(3, 24, 40).to(dtype)
    offsets = torch.tensor([2, 2, 5, 5], dtype=torch.int32)
    (found,) = results("grouped_gemm", variant, x=x, weight=weight, offsets=offsets)
    assert not found[:2].any()
    assert not found[5:].any()
    assert found[2:5].ne(0).any(-1).all()


@each("fused_experts")
@pytest.mark.parametrize("bad", [4, -1, 2**31 - 1, -(2**31)])
def test_pairs_of_no_expert_are_zero(variant: str, bad: int) -> None:
    """Sentinels: E, negative, the extremes. Their rows are 0 and the other rows keep their bits."""
    common = {"x": randn(5, 40), "w_gate_up": randn(4, 48, 40), "w_down": randn(4, 40, 24),
              "weights": torch.rand(5, 2, generator=torch.Generator().manual_seed(0))}  # fmt: skip
    ids = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [2, 0]])
    (everything,) = results("fused_experts", variant, ids=ids, reduce=False, **common)
    some = ids.clone()
    some[1, 0] = some[3, 1] = some[4, 0] = some[4, 1] = bad
    for typed in (some, some.int()):
        (rows,) = results("fused_experts", variant, ids=typed, reduce=False, **common)
        skipped = (some == bad).flatten()
        assert not rows[skipped].any()
        assert same_bits(rows[~skipped], everything[~skipped])
        (total,) = results("fused_experts", variant, ids=typed, **common)
        assert not total[4].any()
        assert total.isfinite().all()


@each("combine")
def test_a_token_without_experts_is_zero(variant: str) -> None:
    y = torch.full((6, 33), float("nan"))
    y[2:4] = 1.0
    ids = torch.tensor([[-1, 7], [0, 6], [2**31 - 1, -(2**31)]])
    (found,) = results("combine", variant, y=y, weights=torch.ones(3, 2), ids=ids, num_experts=7)
    assert torch.equal(found, torch.tensor([[0.0], [2.0], [0.0]]).expand(3, 33))


@each("mla_decode")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nan_in_unused_positions_is_never_read(variant: str, dtype: torch.dtype) -> None:
    arguments = {n: v.to(dtype) if isinstance(v, Tensor) else v for n, v in attention().items()}
    latent, k_rope = randn(2, 70, RANK).to(dtype), randn(2, 70, ROPE).to(dtype)
    lengths = torch.tensor([33, 0], dtype=torch.int32)
    expected = results("mla_decode", variant, latent=latent, k_rope=k_rope, lengths=lengths, **arguments)
    latent[0, 33:] = k_rope[0, 33:] = latent[1] = k_rope[1] = float("nan")
    out, lse = results("mla_decode", variant, latent=latent, k_rope=k_rope, lengths=lengths, **arguments)
    assert same_bits(out, expected[0])
    assert out[0].isfinite().all()
    assert not out[1].any()
    assert (lse[1] == -float("inf")).all()


@each("mla_decode")
def test_pages_outside_the_cache_are_never_read(variant: str) -> None:
    latent, k_rope = randn(3, 16, RANK), randn(3, 16, ROPE)
    table = torch.tensor([[1, 2**31 - 1, -1], [2, 3, 0]], dtype=torch.int32)
    lengths = torch.tensor([16, 16], dtype=torch.int32)
    found = results(
        "mla_decode", variant, latent=latent, k_rope=k_rope, block_table=table, lengths=lengths, **attention()
    )
    inside = torch.tensor([[1], [2]], dtype=torch.int32)
    assert_same(
        found, results("mla_decode", variant, latent=latent, k_rope=k_rope, block_table=inside, **attention())
    )


def test_virtual_tensors_take_no_memory() -> None:
    before = resident()
    value = virtual(4096, 1024, 1032)
    value[-1, -1, -1] = 1
    assert resident() - before < 2**26
    assert value[-1, -1, -1] == 1


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
