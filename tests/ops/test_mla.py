"""The MLA ops: what the cases of their SPECs do not say. Numerics, gradients and compilation are in test_ops.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moekern import _native
from moekern.ops import SPECS, mla_cache_write, mla_decode, mla_decompress
from moekern.ops.mla_decode import cpu, ref
from moekern.ops.mla_decode.cases import MINICPM3, TINY, UNUSED_PAGE, make_case

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(cpu.unavailable() is not None, reason="the native library is not built")


def decode_arguments(generator: torch.Generator, dtype: torch.dtype = torch.float32, *args: Any,
                     **kwargs: Any) -> dict[str, Any]:  # fmt: skip
    return make_case(*args, **kwargs)(generator, dtype, CPU)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- mla_decode ----


def change(name: str, to: Any) -> Any:
    return lambda a: a.update({name: to(a[name]) if callable(to) else to})


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (change("q", lambda q: q[0]), ValueError, r"q must be \[B, Q, H, N \+ P\]"),
        (change("q", lambda q: q.expand(-1, 9, -1, -1)), ValueError, "q must have 1..8 query tokens; got 9"),
        (change("q", lambda q: q[:, :0]), ValueError, "q must have 1..8 query tokens; got 0"),
        (change("q", lambda q: q.long()), TypeError, "q must be floating"),
        (change("q", lambda q: q[..., :32]), ValueError, "q must be wider than k_rope's P = 32; got 32"),
        (change("q", lambda q: q.transpose(-1, -2).contiguous().transpose(-1, -2)), ValueError,
         "the last dimension of q must be contiguous"),
        (change("latent", lambda t: t[0]), ValueError, r"latent must be \[B, S, R\]"),
        (change("latent", lambda t: t[:1]), ValueError, r"latent must be \[B, S, R\] = \[2, \*, \*\]"),
        (change("latent", lambda t: t[..., :63]), ValueError, r"w_kv_b must be \[H \* \(N \+ V\), R\] = \[\*, 63\]"),
        (change("latent", lambda t: t.half()), TypeError, "latent must be of q's dtype torch.float32"),
        (change("k_rope", lambda t: t[:, :-1]), ValueError, r"k_rope must be \[B, S, P\] = \[2, 40, \*\]"),
        (change("k_rope", lambda t: t.to("meta")), ValueError, "k_rope must be on cpu; got meta"),
        (change("w_kv_b", lambda w: w[:-1]), ValueError, r"w_kv_b must have H \* \(N \+ V\) rows with H = 4, N = 32"),
        (change("w_kv_b", lambda w: w[:128]), ValueError, r"w_kv_b must have .* V >= 1; got 128"),
        (change("lengths", lambda t: t.long()), TypeError, "lengths must be int32; got torch.int64"),
        (change("lengths", lambda t: t[:1]), ValueError, r"lengths must be \[B\] = \[2\]; got \[1\]"),
        (change("mask", torch.ones(2, 1, 39, dtype=torch.bool)), ValueError, r"S = 40 \(latent's S\); got \[2, 1, 39\]"),
        (change("mask", torch.ones(2, 4, 1, 40, dtype=torch.bool)), ValueError, "mask must be"),
        (change("mask", torch.ones(2, 1, 40)), TypeError, "mask must be bool; got torch.float32"),
        (change("block_table", torch.zeros(1, 3, dtype=torch.int32)), ValueError,
         r"block_table must be \[B, max_pages\] = \[2, \*\]; got \[1, 3\]"),
        (change("block_table", torch.zeros(2, 3)), TypeError, "block_table must be int32"),
    ],
)  # fmt: skip
def test_decode_names_what_does_not_fit(
    generator: torch.Generator, edit: Any, error: type[Exception], message: str
) -> None:
    arguments = decode_arguments(generator, torch.float32, [40, 7], 4, **TINY)
    mla_decode(**arguments)
    edit(arguments)
    with pytest.raises(error, match=f"mla_decode: .*{message}"):
        mla_decode(**arguments)


def test_decode_checks_values_when_asked(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = decode_arguments(generator, torch.float32, [40, 7], 4, page_size=16, **TINY)
    short = {**arguments, "block_table": arguments["block_table"][:, :2]}
    wrong = {**arguments, "block_table": arguments["block_table"].clone()}
    wrong["block_table"][1, 0] = 99
    mla_decode(**short)  # bounded without a look at the values
    monkeypatch.setenv("MOEKERN_CHECK", "1")
    mla_decode(**arguments)
    with pytest.raises(ValueError, match="block_table holds 32 positions; got a length of 40"):
        mla_decode(**short)
    with pytest.raises(
        ValueError, match=r"block_table must name pages in 0..\d+ up to each length; got \[99\]"
    ):
        mla_decode(**wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_give_the_bits_of_a_contiguous_cache(generator: torch.Generator, dtype: torch.dtype) -> None:
    arguments = decode_arguments(generator, dtype, [100, 33], 16, page_size=16, **MINICPM3)
    table = arguments.pop("block_table")
    latent, k_rope = (ref.gather_pages(arguments[n], table) for n in ("latent", "k_rope"))
    paged = mla_decode(**arguments, block_table=table, return_lse=True)
    dense = mla_decode(**{**arguments, "latent": latent, "k_rope": k_rope}, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(paged, dense, strict=True))


@pytest.mark.parametrize("page", [UNUSED_PAGE, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_outside_the_cache_counts_as_masked(
    generator: torch.Generator, dtype: torch.dtype, page: int
) -> None:
    arguments = decode_arguments(generator, dtype, [40, 33], 4, page_size=16, **TINY)
    arguments["block_table"][0, 1] = page
    mask = torch.ones(2, 1, 64, dtype=torch.bool)
    mask[0, :, 16:32] = False
    replaced = arguments["block_table"].clone()
    replaced[0, 1] = replaced[0, 0]
    masked = mla_decode(**{**arguments, "block_table": replaced}, mask=mask)
    assert torch.equal(mla_decode(**arguments), masked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_static_cache_gives_what_its_used_part_gives(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    used = decode_arguments(generator, dtype, 90, 16, **MINICPM3)
    latent, k_rope = (F.pad(used[n], (0, 0, 0, 2000)) for n in ("latent", "k_rope"))
    mask = torch.zeros(1, 1, 1, latent.shape[1], dtype=torch.bool)
    mask[..., :90] = True
    static = {**used, "latent": latent, "k_rope": k_rope, "mask": mask, "causal": False}
    out, lse = mla_decode(**static, return_lse=True)
    expected, expected_lse = mla_decode(**used, return_lse=True)
    assert torch.equal(out, expected)
    close(lse, expected_lse)


def test_parts_merge_by_their_log_sum_exp(generator: torch.Generator) -> None:
    arguments = decode_arguments(generator, torch.float32, [80, 50], 4, num_queries=2, causal=False, **TINY)
    whole, whole_lse = mla_decode(**arguments, return_lse=True)
    position = torch.arange(80).expand(2, 2, 80)
    parts = [mla_decode(**arguments, mask=m, return_lse=True) for m in (position < 60, position >= 60)]
    lse = torch.stack([p[1] for p in parts])
    assert (lse[1][1] == float("-inf")).all()  # the second sequence ends before the second part
    weights = (lse - lse.logsumexp(0)).exp()
    close(sum(w[..., None] * p[0] for w, p in zip(weights, parts, strict=True)), whole)
    close(lse.logsumexp(0), whole_lse)


def test_lengths_are_clamped(generator: torch.Generator) -> None:
    arguments = decode_arguments(generator, torch.float32, [40, 40], 4, **TINY)
    arguments["lengths"] = torch.tensor([1000, -3], dtype=torch.int32)
    out, lse = mla_decode(**arguments, return_lse=True)
    arguments["lengths"] = torch.tensor([40, 0], dtype=torch.int32)
    assert torch.equal(out, mla_decode(**arguments))
    assert not out[1].any()
    assert (lse[1] == float("-inf")).all()


def test_batch_one_mask_serves_every_sequence(generator: torch.Generator) -> None:
    arguments = decode_arguments(generator, torch.float32, [40, 40, 40], 4, **TINY)
    mask = torch.rand(1, 1, 40, generator=generator) < 0.5
    shared = mla_decode(**arguments, mask=mask)
    assert torch.equal(shared, mla_decode(**arguments, mask=mask.repeat(3, 1, 1)))
    assert not torch.equal(shared, mla_decode(**arguments))


@needs_native
def test_threads_split_the_cache_without_changing_the_result(generator: torch.Generator) -> None:
    arguments = decode_arguments(generator, torch.float32, [3000, 5, 1100], 4, **TINY)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(mla_decode(**arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        close(results[0], other)


def test_splits_serve_every_thread_and_stay_long() -> None:
    assert cpu.num_splits_of(batch=1, rows=16, positions=4096, threads=2) == 4
    assert cpu.num_splits_of(batch=1, rows=16, positions=300, threads=8) == 2
    assert cpu.num_splits_of(batch=64, rows=16, positions=4096, threads=8) == 1
    assert cpu.num_splits_of(batch=1, rows=16, positions=0, threads=8) == 1
    for threads in (1, 2, 8, 64):
        splits = cpu.num_splits_of(batch=3, rows=128, positions=100_000, threads=threads)
        assert 3 * splits >= 2 * threads


@needs_native
@pytest.mark.parametrize("heads", [1, 16, 63, 128])
def test_workspace_is_what_the_kernel_uses(generator: torch.Generator, heads: int) -> None:
    """The size is computed in Python and in C++; one float less must be refused, the exact size not."""
    a = decode_arguments(generator, torch.float32, [40], heads, num_queries=2, **TINY)
    threads = torch.get_num_threads()
    size = cpu.workspace_size(1, 2 * heads, 64, 32, 32, 32, splits=1, threads=threads)
    out, lse = SPECS["mla_decode"].fake(**a)

    def run(floats: int) -> None:
        cpu._leaf(a["q"], a["latent"], a["k_rope"], a["w_kv_b"], None, None, None, a["scale"], True, 1,
                  torch.empty(floats), out, lse)  # fmt: skip

    _native.load()
    run(size)
    close(out, mla_decode(**a))
    with pytest.raises(RuntimeError, match=rf"workspace must hold {size} floats; got {size - 1}"):
        run(size - 1)


# ---- mla_decompress ----


def test_decompressed_attention_is_the_absorbed_one(generator: torch.Generator) -> None:
    a = decode_arguments(generator, torch.float32, 50, 5, num_queries=3, **TINY)
    k, v = mla_decompress(a["latent"], a["k_rope"], a["w_kv_b"], 5, 32, v_width=64)
    assert v.shape[-1] == 64
    assert not v[..., 32:].any()
    newest = torch.arange(50) <= torch.arange(47, 50)[:, None]
    out = F.scaled_dot_product_attention(a["q"].transpose(1, 2), k, v, attn_mask=newest, scale=a["scale"])
    close(out[..., :32].transpose(1, 2), mla_decode(**a))


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (change("latent", lambda t: t[0]), ValueError, r"latent must be \[B, S, R\]"),
        (change("k_rope", lambda t: t[:, 1:]), ValueError, r"k_rope must be \[B, S, P\] = \[2, 9, \*\]"),
        (change("k_rope", lambda t: t.double()), TypeError, "k_rope must be of latent's dtype"),
        (change("w_kv_b", lambda t: t[:, 1:]), ValueError, r"w_kv_b must be \[H \* \(N \+ V\), R\]"),
        (change("w_kv_b", lambda t: t.t().contiguous().t()), ValueError, "the last dimension of w_kv_b"),
        (change("num_heads", 3), ValueError, r"rows with H = 3, N = 32 and V >= 1; got 256"),
        (change("num_heads", 0), ValueError, "num_heads must be at least 1; got 0"),
        (change("nope_dim", 64), ValueError, "V >= 1"),
        (change("v_width", -1), ValueError, "v_width must be >= 0; got -1"),
    ],
)
def test_decompress_names_what_does_not_fit(
    generator: torch.Generator, edit: Any, error: type[Exception], message: str
) -> None:
    a = {"latent": torch.randn(2, 9, 64), "k_rope": torch.randn(2, 9, 32), "w_kv_b": torch.randn(256, 64),
         "num_heads": 4, "nope_dim": 32}  # fmt: skip
    mla_decompress(**a)
    edit(a)
    with pytest.raises(error, match=f"mla_decompress: .*{message}"):
        mla_decompress(**a)


# ---- mla_cache_write ----


def cache_write_arguments() -> dict[str, Any]:
    angle = torch.rand(6, 16) * 6
    return {"kv": torch.randn(6, 96), "norm_weight": torch.rand(64) + 0.5, "cos": angle.cos(), "sin": angle.sin(),
            "latent_cache": torch.zeros(10, 64), "rope_cache": torch.zeros(10, 32), "slots": torch.arange(6)}  # fmt: skip


def test_written_tokens_are_attended_to(generator: torch.Generator) -> None:
    """A paged cache filled by mla_cache_write, read by mla_decode through the block table of the same slots."""
    a = cache_write_arguments()
    a["latent_cache"] = torch.full((40, 64), float("nan"))
    a["rope_cache"] = torch.full((40, 32), float("nan"))
    a["slots"] = torch.tensor([28, 29, 30, 31, 8, 9])  # pages 7 and 2 of 4 rows
    mla_cache_write(**a)
    table = torch.tensor([[7, 2, -1]], dtype=torch.int32)
    q, weight = torch.randn(1, 1, 4, 64, generator=generator), torch.randn(256, 64, generator=generator)
    out = mla_decode(q, a["latent_cache"].view(10, 4, 64), a["rope_cache"].view(10, 4, 32), weight, scale=0.1,
                     lengths=torch.tensor([6], dtype=torch.int32), block_table=table)  # fmt: skip
    rows = a["slots"][None]
    dense = mla_decode(q, a["latent_cache"][rows], a["rope_cache"][rows], weight, scale=0.1)
    close(out, dense)


@pytest.mark.parametrize("rope", ["interleaved", "half", "deinterleave"])
def test_rotation_keeps_the_products_of_relative_positions(rope: str) -> None:
    """Rotary embedding: the product of two rotated vectors depends on the difference of their positions only."""
    frequency = torch.rand(16, dtype=torch.float64)
    x = torch.randn(2, 32, dtype=torch.float64)

    def rotated(first: int, second: int) -> Tensor:
        angle = torch.tensor([[first], [second]]) * frequency
        cache = torch.zeros(2, 32, dtype=torch.float64)
        mla_cache_write(torch.cat((torch.ones(2, 1), x), 1).double(), torch.ones(1, dtype=torch.float64), angle.cos(),
                        angle.sin(), torch.zeros(2, 1, dtype=torch.float64), cache, torch.arange(2), rope=rope)  # fmt: skip
        return cache[0] @ cache[1]

    close(rotated(3, 5), rotated(10, 12), 1e-10)
    assert (rotated(3, 5) - rotated(3, 6)).abs() > 1e-6


def test_skipped_slots_leave_the_cache_alone() -> None:
    a = cache_write_arguments()
    a["slots"] = torch.tensor([0, -1, 10, 2, 2**40, -(2**40)])
    mla_cache_write(**a)
    written = a["latent_cache"].any(1)
    assert written.tolist() == [i in (0, 2) for i in range(10)]
    assert torch.equal(a["rope_cache"].any(1), written)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (change("kv", lambda t: t[0]), ValueError, r"kv must be \[T, R \+ P\]"),
        (change("kv", lambda t: t[:, :95]), ValueError, "P = kv's width - R must be even; got 95 - 64"),
        (
            change("norm_weight", torch.ones(97)),
            ValueError,
            r"norm_weight must have 1..96 \(R \+ P\) values; got 97",
        ),
        (change("norm_weight", lambda t: t.half()), TypeError, "norm_weight must be of kv's dtype"),
        (change("cos", lambda t: t[:, :5]), ValueError, "cos must have P / 2 = 16 or P = 32 columns; got 5"),
        (change("sin", lambda t: t[1:]), ValueError, r"sin must be \[T, P / 2 or P\] = \[6, \*\]"),
        (
            change("latent_cache", lambda t: t[:, 1:]),
            ValueError,
            r"latent_cache must be \[num_slots, R\] = \[\*, 64\]",
        ),
        (
            change("rope_cache", lambda t: t[1:]),
            ValueError,
            r"rope_cache must be \[num_slots, P\] = \[10, 32\]",
        ),
        (change("slots", lambda t: t[1:]), ValueError, r"slots must be \[T\] = \[6\]; got \[5\]"),
        (change("slots", lambda t: t.float()), TypeError, "slots must be int32 or int64"),
        (
            change("rope", "neox"),
            ValueError,
            "rope must be one of interleaved, half, deinterleave; got 'neox'",
        ),
    ],
)
def test_cache_write_names_what_does_not_fit(edit: Any, error: type[Exception], message: str) -> None:
    a = {**cache_write_arguments(), "rope": "half"}
    mla_cache_write(**a)
    edit(a)
    with pytest.raises(error, match=f"mla_cache_write: .*{message}"):
        mla_cache_write(**a)
